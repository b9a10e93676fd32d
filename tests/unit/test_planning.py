"""`ctrlray plan`: rates and dollars by hand, refusals with the smallest change, JSON and text, and what jobs' READMEs say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from ctrlray import config, models, planning, rates
from ctrlray.cli import main
from ctrlray.clusters import GPU
from ctrlray.errors import ClusterError, ConfigError
from ctrlray.memory import Shape
from ctrlray.rates import Rates

ROOT = Path(__file__).parent.parent.parent
AWS = ROOT / "cluster" / "aws.yaml"
HH = ("hh-llama2-7b", "hh-qwen3-8b", "hh-llama3-70b")


def planned(*overrides, job="hh-llama2-7b", cluster=AWS, **more):
    return planning.plan(config.load_job(job, overrides), cluster, **more)


def stage(plan, name):
    return next(s for s in plan["stages"] if s["stage"] == name)


def phase(plan, name):
    return next(p for p in plan["phases"] if p["phase"] == name)


def test_what_each_phase_brings_up():
    plan = planned()
    assert phase(plan, "generate and score")["nodes"] == {"generation": 1, "reward": 1}
    assert phase(plan, "train")["nodes"] == {"training": 1}
    assert phase(plan, "train")["bundles"] == [{"count": 8, "bundle": {"CPU": 8.0, "GPU": 1.0, "training": 0.001}}]
    # 4 engines of 2 GPUs and two halves of one; 8 workers; 4 engines; two halves of one
    assert [p["gpus"] for p in plan["phases"]] == [9, 8, 8, 1]
    assert phase(plan, "evaluate: rewards")["nodes"] == {"reward": 1}
    assert phase(plan, "train")["dollars_per_hour"] == pytest.approx(2.02 + 21.96)


def test_a_decoding_rate_by_hand():
    batch = ["generate.batch_size=64", "generate.engine.max_num_seqs=999"]
    job = config.load_job("quickstart", ["generate.pool.gpus=1", "generate.sampling.max_tokens=68", *batch])
    shape = Shape(parameters=10**9, layers=10, hidden=0, linear=0, values=100)
    # a step reads 2 GB of weights and 64 sequences of 128 tokens of 4,000 bytes, at half of 1000 GB/s
    slow = GPU(memory_gib=40, bf16_tflops=10**6, gb_per_s=1000)
    assert rates.decoding(job, shape, slow, Rates()).per_s == pytest.approx(64 * 500e9 / (2e9 + 64 * 128 * 4000))
    # or multiplies 2 GFLOP for each sequence, at 0.3 of the peak
    weak = GPU(memory_gib=40, bf16_tflops=1, gb_per_s=10**9)
    assert rates.decoding(job, shape, weak, Rates()).per_s == pytest.approx(0.3e12 / 2e9)
    # a GPU with 10 MiB of cache, beside 1.5 GiB for its context and 2 GB of weights, holds 20 sequences of 512,000 bytes
    room = (1.5 * 2**30 + 2e9 + 10 * 2**20) / 0.9 / 2**30
    small = GPU(memory_gib=room, bf16_tflops=10**6, gb_per_s=1000)
    assert rates.decoding(job, shape, small, Rates()).per_s == pytest.approx(20 * 500e9 / (2e9 + 20 * 128 * 4000))
    assert rates.decoding(job, shape, small, Rates(generate_tokens_per_s=7.0)) == (7.0, "given")


def test_a_training_rate_by_hand():
    shape, gpu = Shape(10**9, 1, 0, 0), GPU(memory_gib=1, bf16_tflops=100, gb_per_s=1)
    for overrides, flops in (([], 4), (["train.lora=null"], 6), (["train.activation_checkpointing=true"], 6)):
        found = rates.training(config.load_job("quickstart", overrides), shape, gpu, Rates())
        assert found == (pytest.approx(0.3 * 100e12 / (flops * 1e9)), "by formula")
    # a processor: SmolLM2's rate, slower as the model is larger
    assert rates.training(config.load_job("quickstart"), shape, None, Rates()).per_s == pytest.approx(250 * 0.135)


def test_dollars_by_hand_from_given_rates(tmp_path):
    given = tmp_path / "rates.yaml"
    given.write_text("{source: hand, generate_tokens_per_s: 1000, score_rows_per_s: 100, train_tokens_per_s: 500, start_s: 600}")
    plan = planned(given=given)
    generate, train, evaluate = (stage(plan, s) for s in ("generate", "train", "evaluate"))
    # 10,000 prompts x 8 answers x 256 tokens on 4 engines; scoring, 80,000 rows at 100/s, is shorter and runs beside
    assert generate["seconds"] == pytest.approx(80_000 * 256 / 4000 + 600) and generate["basis"] == "given"
    # nodes are paid for until they have been idle for ten minutes, the head while it works
    up = generate["seconds"]
    assert generate["dollars"] == pytest.approx((up * 2.02 + (up + 600) * (12.05 + 0.39)) / 3600)
    assert stage(plan, "score") | {"rows": 80_000} == stage(plan, "score") and stage(plan, "score")["dollars"] == 0
    # 20,000 examples of 60 + 2 x 256 tokens, twice, for two objectives, on 8 workers
    assert train["tokens"] == 20_000 * 572 * 2 * 2
    assert train["seconds"] == pytest.approx(train["tokens"] / 4000 + 600)
    assert train["dollars"] == pytest.approx((train["seconds"] * 2.02 + (train["seconds"] + 600) * 21.96) / 3600)
    # every answer of the grid is sampled by engines, then scored by rewards on nodes of their own
    sampled, scored = evaluate["tokens"] / 4000 + 600, evaluate["rows"] / 100 + 600
    assert evaluate["seconds"] == pytest.approx(sampled + scored)
    paid = (sampled + scored) * 2.02 + (sampled + 600) * 12.05 + (scored + 600) * 0.39
    assert evaluate["dollars"] == pytest.approx(paid / 3600)
    assert plan["total"]["dollars"] == pytest.approx(sum(s["dollars"] for s in plan["stages"]))
    slow = planned("score.pool.max_size=1", given=_rates(tmp_path, score_rows_per_s=1, start_s=0))
    assert stage(slow, "generate")["seconds"] == pytest.approx(80_000)  # what streams behind ends the stage


def _rates(folder, **values):
    path = folder / "other.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_ppo_is_paid_with_its_engines_and_rewards_up(tmp_path):
    given = _rates(tmp_path, generate_tokens_per_s=1000, score_rows_per_s=100, train_tokens_per_s=500, start_s=0)
    sampling = "sampling: {max_tokens: 100, temperature: 1.0, min_p: 0}"
    ppo = f"{{type: ppo, steps: 10, prompts_per_step: 10, settings_per_prompt: 2, group_size: 5, {sampling}}}"
    plan = planned(f"train.objectives=[{ppo}]", given=given)
    # 1,000 rollouts: 100,000 tokens sampled on 4 engines and scored; those and 100 prompts of 60 trained on 8 workers
    trained = 100_000 + 100 * 60
    seconds = 100_000 / 4000 + trained * (1 + 2 / 3) / 4000 + 1000 / 100
    assert stage(plan, "train")["seconds"] == pytest.approx(seconds)
    paid = seconds * 2.02 + (seconds + 600) * (12.05 + 0.39 + 21.96)
    assert stage(plan, "train")["dollars"] == pytest.approx(paid / 3600)
    assert phase(plan, "train ppo")["nodes"] == {"generation": 1, "reward": 1, "training": 1}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.workers=24"], "train needs 24 GPUs, group 'training' of its nodes has 16: 8 too few. .*train.workers=16"),
        (["train.lora=null", "train.zero_stage=0"], r"worker actors that need [\d.]+ GiB of each GPU, which has 39.6"),
        (["generate.pool.min_size=9", "generate.pool.max_size=17"], "group 'generation' of its nodes has 32.*max_size=16"),
        (["generate.pool.nodes=gpus"], "engine actors of 8 CPUs.*more than any node of group 'gpus' has|group 'gpus'.* has 0"),
        (["train.micro_batch_tokens=120000"], "GiB of each GPU.*train.micro_batch_tokens="),
    ],
)
def test_what_cannot_fit_is_refused_with_the_smallest_change(overrides, said):
    with pytest.raises(ClusterError) as caught:
        planned(*overrides)
    assert re.search(said, str(caught.value)), caught.value


def test_advice_on_gpu_memory_fits_when_it_is_followed():
    """An engine with a context of 32,768 tokens does not start on one L4; the fewest GPUs that hold it are named."""
    overrides = ["generate.engine.tensor_parallel=1", "model.max_context=32768", "generate.pool.max_size=2"]
    where = {"job": "hh-qwen3-8b", "cluster": ROOT / "cluster" / "gcp.yaml"}
    with pytest.raises(ClusterError, match=r"need 24\.\d GiB of each GPU.*fits: generate.engine.tensor_parallel=2\. Or"):
        planned(*overrides, **where)
    planned(*overrides, "generate.engine.tensor_parallel=2", **where)


def test_a_head_too_small_to_prepare_the_model_is_refused(tmp_path):
    raw = yaml.safe_load(AWS.read_text())
    raw["available_node_types"]["head"] = {"resources": {"CPU": 8}, "node_config": {"InstanceType": "g6.2xlarge"}}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(raw))
    said = r"prepares the model in 132\.6 GiB, and Ray gives 22\.4 GiB of its 32\. .* a head of 189 GiB"
    with pytest.raises(ClusterError, match=said):
        planned(job="hh-llama3-70b", cluster=path)


def test_other_prices_can_be_given(tmp_path):
    raw = yaml.safe_load((ROOT / "cluster" / "prices.yaml").read_text())
    raw["machines"]["p4d.24xlarge"]["dollars_per_hour"] = 100.0
    path = tmp_path / "prices.yaml"
    path.write_text(yaml.safe_dump(raw | {"source": "mine"}))
    plan = planned(prices=path)
    assert phase(plan, "train")["dollars_per_hour"] == pytest.approx(102.02) and plan["prices"]["source"] == "mine"
    del raw["machines"]["p4d.24xlarge"]
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=r"training: .*machine 'p4d.24xlarge' has no entry in the prices"):
        planned(prices=path)


def test_pools_shrink_where_their_largest_does_not_come_up():
    """One machine of one's own with 8 GPUs: four engines and the rewards do not fit at once, one engine does."""
    plan = planned(cluster=ROOT / "cluster" / "local.yaml", job="hh-llama3-70b")
    (engine,) = (a for a in phase(plan, "generate and score")["actors"] if a["operator"] == "engine")
    assert (engine["least"], engine["planned"]) == (1, 1)


def test_the_command_prints_text_and_json(tmp_path):
    words = ["plan", "hh-llama2-7b", "--cluster", str(AWS)]
    text = CliRunner().invoke(main, words)
    assert text.exit_code == 0, text.output
    for expected in ("worker on A100-40GB", "by formula", "1 x training", "arXiv 2211.05102", "2025-07"):
        assert expected in text.output
    made = json.loads(CliRunner().invoke(main, [*words, "--json"]).output)
    assert made == json.loads(json.dumps(planned())) and made["total"]["dollars"] > 1
    refused = CliRunner().invoke(main, [*words, "--set", "train.workers=99"])
    assert refused.exit_code == 4 and "The smallest change that fits: train.workers=16" in refused.output


@pytest.mark.parametrize("setting", ["model.name", "rewards.1.model"])
def test_a_model_that_nobody_knows_is_named(monkeypatch, setting):
    monkeypatch.setattr(models, "_settings_there", lambda name, revision: {}["hidden_size"])
    with pytest.raises(ConfigError, match=rf"{setting}='org/unknown'.*plan with --set {setting}=FOLDER"):
        planned(f"{setting}=org/unknown")


def test_judges_are_paid_when_the_engines_are_gone(tmp_path):
    given = _rates(tmp_path, generate_tokens_per_s=1000, score_rows_per_s=100, train_tokens_per_s=500, start_s=600)
    outputs = "attributes: [helpfulness, harmlessness]"
    judge = f"{{type: http, url: 'http://judge/v1', {outputs}, judge: true}}"
    model = f"{{type: hf, model: Ray2333/gpt2-large-helpful-reward_model, {outputs}}}"
    plain, judged = (planned(f"rewards=[{model}{more}]", given=given) for more in ("", f", {judge}"))
    assert phase(judged, "evaluate: judges")["stages"] == ["evaluate"]
    assert phase(judged, "evaluate: judges")["nodes"] == {"reward": 1}
    before, after = stage(plain, "evaluate"), stage(judged, "evaluate")
    # the judge's two actors score the grid and the 80,000 sampled answers once more, after their node has come up
    (pool,) = (a for a in phase(judged, "evaluate: judges")["actors"] if a["operator"] == "judge http")
    seconds = (before["rows"] + 80_000) / (100 * pool["planned"]) + 600
    assert after["seconds"] - before["seconds"] == pytest.approx(seconds)
    # the node is the rewards' own, which goes down after the judges now
    assert after["dollars"] - before["dollars"] == pytest.approx(seconds / 3600 * (2.02 + 0.39))
    assert stage(judged, "generate") == stage(plain, "generate")


@pytest.mark.parametrize("name", HH)
def test_the_readme_of_a_job_says_what_the_plan_says(name):
    text = (ROOT / "jobs" / name / "README.md").read_text()
    for cluster in ("aws", "gcp"):
        plan = planned(job=name, cluster=ROOT / "cluster" / f"{cluster}.yaml")
        row = re.search(rf"\| {cluster} \| (.*) \|", text)
        assert row is not None
        generate, train, evaluate = (stage(plan, s)["dollars"] for s in ("generate", "train", "evaluate"))
        total = plan["total"]
        said = f"{generate:.2f} | {train:.2f} | {evaluate:.2f} | {total['dollars']:.2f} | {total['seconds'] / 3600:.1f}"
        assert row[1] == said
    assert "runtime_env" in text and "ctrlray submit" in text
