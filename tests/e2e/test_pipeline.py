"""One whole pipeline on real Ray, real vLLM, real DeepSpeed and a tiny random model: two training ranks, two objectives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctrlray import config, models, pipeline, schema
from ctrlray.control import ControlSpace
from ctrlray.tables import Storage
from tests.e2e.tiny_job import tiny_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


REINFORCED = {
    "type": "ppo",
    "start": "exmate",
    "steps": 3,
    "prompts_per_step": 2,
    "group_size": 2,
    "batch_size": 8,
    "max_staleness": 1,
    "learning_rate": 1e-3,
    "sampling": {"max_tokens": 12, "temperature": 1.0, "min_p": 0},
}


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    changes = {
        "train.objectives": [{"type": "clm"}, {"type": "exmate", "weight": 1.0}, REINFORCED],
        "evaluate.methods": ["start", "prompting", "reranking"],
        "evaluate.candidates": 2,
        "train.workers": 2,
        "train.cpus_per_worker": 0.6,  # both beside an engine and a reward on two CPUs
        "train.zero_stage": 2,
        "export": {"objective": "exmate", "levels": {"variety": [2, 2]}, "defaults": {"brevity": 1}, "dtype": "float32"},
    }
    return config.parse(config.Job, tiny_job(tiny, root, changes), where="test")


@pytest.fixture(scope="module")
def run(job, private_cache, local_ray):
    return pipeline.run(job)


def test_every_stage_accounts_for_its_rows(run):
    results = {s: run.result(s) for s in pipeline.STAGES}
    assert all(results.values())
    assert results["generate"]["rows_out"] == 32 and results["score"]["rows_out"] == 32
    for stage, r in results.items():
        assert r["rows_in"] == r["rows_out"] + sum(r["dropped"].values()) + sum(r["quarantined"].values()), stage
    for before, after in (("generate", "score"), ("score", "distill"), ("distill", "train")):
        assert results[before]["rows_out"] == results[after]["rows_in"]
    assert all(results["train"]["facts"][m]["examples"] == results["distill"]["rows_out"] for m in ("clm", "exmate"))
    manifest = run.storage.read_json("manifest.json")
    assert set(manifest["stages"]) == set(pipeline.STAGES) and manifest["versions"]["ray"]


def test_both_objectives_trained_on_two_ranks(run):
    assert run.result("train")["facts"]["workers"] == 2
    for method in ("clm", "exmate"):
        curve = run.out("train").sub(method).read_json("curves.json")
        assert curve[-1]["nll"] < curve[0]["nll"]
        assert ("leak" in curve[0]) == (method == "exmate")
        gaps = run.out("train").sub(method).read_table("code_gaps", schema.code_gaps())
        assert gaps.num_rows and set(gaps["method"].to_pylist()) == {method}


def test_curves_are_there_for_tensorboard(run):
    for method in ("clm", "exmate", "ppo"):
        events = list(Path(run.out("train").sub(method).path("tensorboard")).glob("events.out.tfevents.*"))
        assert events and all(f.stat().st_size for f in events), method


def test_reinforcement_on_two_ranks_samples_while_it_trains(run):
    """ZeRO-2 and one step of staleness: rollouts of step k (from 0) come from version k - 1 or k."""
    place = run.out("train").sub("ppo")
    rows = place.read_table("rollouts", schema.rollouts(["brevity", "variety"])).to_pylist()
    versions = {r["step"]: r["weights_version"] for r in rows}
    assert versions[0] == 0 and all(step - 1 <= version <= step for step, version in versions.items())
    curve = place.read_json("curves.json")
    assert [p["used"] for p in curve] == [8, 8, 8]
    assert [p["staleness"] for p in curve] == [step - versions[step] for step in range(3)]
    # the mean log-ratio of eight answers, sampled a step before, is no KL yet: it is somewhere off 0, where the policy has moved
    assert curve[0]["mismatch"] < 1e-3 and abs(curve[0]["kl"]) < 1e-4 and abs(curve[-1]["kl"]) > 1e-6


def test_grid_is_complete_and_start_ignores_the_dial(run):
    grid = run.out("evaluate").read_table("grid", schema.grid(["brevity", "variety"])).to_pylist()
    methods = ("start", "prompting", "reranking", "clm", "exmate", "ppo")
    assert len(grid) == 3 * 4 * len(methods)  # prompts x cells x methods
    versions = {m: {r["weights_version"] for r in grid if r["method"] == m} for m in methods}
    assert versions == {"start": {0}, "prompting": {0}, "reranking": {0}, "clm": {1}, "exmate": {2}, "ppo": {3}}
    metrics = run.out("evaluate").read_json("metrics.json")
    assert metrics["start"]["attributes"]["brevity"]["pairwise"]["value"] == 0.5
    # all weights of a tiny random model moved a little; the engine's own rounding is far below
    assert all(0 < abs(metrics[m]["kl_base"]["value"]) < 20 for m in ("clm", "exmate", "ppo"))
    assert "kl_base" not in metrics["prompting"]


def test_scores_streamed_behind_generation(run):
    assert run.result("score")["facts"]["streamed_behind"] == "generate"


def test_finished_answers_come_from_the_kept_run_with_their_plain_prompts(run, job):
    responses = run.out("generate").read_table("responses", schema.RESPONSES).to_pylist()
    kept = {(r["prompt_id"], r["text"]) for r in responses if r["finish_reason"] in schema.FINISHED and r["text"].strip()}
    answers = pipeline.finished_answers(job)
    assert {(schema.prompt_id(messages), text) for messages, text in answers} == kept
    assert all(m["content"] != "Decline." for messages, _ in answers for m in messages)


def test_second_run_skips_everything(run, job):
    before = {s: run.result(s)["started"] for s in pipeline.STAGES}
    again = pipeline.run(job)
    assert {s: again.result(s)["started"] for s in pipeline.STAGES} == before


def test_changed_job_redoes_only_what_it_affects(run, job):
    fewer = job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"bootstrap": 101})})
    changed = {s for s in pipeline.STAGES if pipeline.Run(fewer).keys[s] != run.keys[s]}
    assert changed == {"evaluate", "report"}
    colder = job.generate.sampling.model_copy(update={"temperature": 0.5})
    other = job.model_copy(update={"generate": job.generate.model_copy(update={"sampling": colder})})
    assert {s for s in pipeline.STAGES if pipeline.Run(other).keys[s] == run.keys[s]} == {"prompts"}


def test_distill_is_byte_identical(run, job, tmp_path):
    from ctrlray.stages import distill

    responses = run.out("generate").read_table("responses", schema.RESPONSES)
    scores = run.out("score").read_table("scores", schema.scores(["brevity", "variety"]))
    shuffled = responses.take(list(reversed(range(responses.num_rows))))
    distill.run(run.prompts("train"), shuffled, scores, job, Storage(str(tmp_path)))
    for name in ("examples", "dropped"):
        file = f"{name}/part-00000.parquet"
        assert (tmp_path / file).read_bytes() == run.out("distill").read_bytes(*file.split("/"))


def test_report_is_one_page(run):
    page = Path(run.result("report")["facts"]["page"]).read_text()
    assert "exmate" in page and "brevity" in page and 'src="http' not in page


def test_export_obeys_the_dial_in_plain_transformers(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run.result("export")["facts"]["folder"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "hello <|brevity:1|>"}]
    want = run.base.renderer(ControlSpace.of(run.job.control)).render(turns, (1, 2))
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False) == want
    with pytest.raises(Exception, match="variety must be one of"):
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, variety=1)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tokenizer)
    card = (Path(folder) / "README.md").read_text()
    assert "Intended use" in card and "held-out code gap" in card
    assert json.loads((Path(folder) / "ctrlray.json").read_text())["attributes"][1]["low"] == 2


def test_fingerprints_differ_between_base_and_export(run):
    assert models.fingerprint(run.result("export")["facts"]["folder"]) != run.base.base_fingerprint
