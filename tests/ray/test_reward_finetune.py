"""Fine-tuned reward models on real local Ray: labels in, a folder out that scores as it was measured."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from ctrlray import config
from ctrlray.cli import main
from ctrlray.config import LoRA, Model
from ctrlray.errors import ConfigError, DataError
from ctrlray.rewards.finetune import finetune
from ctrlray.rewards.hf import UNITS, HFScorer
from ctrlray.rewards.job import FineTune, LabelFiles, RewardTrainJob
from ctrlray.rewards.target import evaluation_of
from tests.fakes import tiny_tokenizer

pytestmark = pytest.mark.slow
WORDS = ["red", "blue", "tall", "slow", "warm", "odd"]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 wherever this process scores, so that numbers can be compared."""
    monkeypatch.setattr("ctrlray.models.pick_dtype", lambda *_, **__: "float32")


def answer(rng: random.Random, good: bool) -> str:
    words = rng.sample(WORDS, 2)
    words.insert(rng.randrange(3), "yes" if good else "no")
    return " ".join(words)


def write_pairs(path: Path, count: int, seed: int) -> str:
    rng = random.Random(seed)
    rows = [{"prompt": f"q{i}", "chosen": answer(rng, True), "rejected": answer(rng, False), "margin": 0.5} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def write_ratings(path: Path, count: int, seed: int) -> str:
    """Ratings 1 and 5 of what the word says, and a second attribute that every other row has."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        good = rng.random() < 0.5
        row = {"prompt": f"q{i}", "response": answer(rng, good), "kind": 5 if good else 1}
        rows.append(row | ({"curt": 0.0 if good else 3.0} if i % 2 else {}))
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def pair_files(folder: Path, train: int, valid: int = 24) -> LabelFiles:
    return LabelFiles(
        name="kind", train=write_pairs(folder / "t.jsonl", train, 1), valid=write_pairs(folder / "v.jsonl", valid, 2)
    )


def make_job(folder: Path, model: Path, files, **method) -> RewardTrainJob:
    return RewardTrainJob(
        name="tiny",
        out=str(folder / "out"),
        model=Model(name=str(model), dtype="float32"),
        attributes=tuple(files),
        method=FineTune(**{"learning_rate": 5e-3, "batch_size": 16, "epochs": 3, "micro_batch_tokens": 1024, **method}),
        reserve_judge_half=False,
        max_tokens=64,
    )


def scorer_of(job: RewardTrainJob) -> HFScorer:
    names = tuple(a.name for a in job.attributes)
    return HFScorer(config.HFReward(model=str(job.folder / job.name), attributes=names))


@pytest.mark.parametrize("lora", [LoRA(rank=4, alpha=8), pytest.param(None, marks=pytest.mark.soak)], ids=["lora", "full"])
def test_a_word_that_wins_is_learned(local_ray, tiny, tmp_path, lora):
    job = make_job(tmp_path, tiny, [pair_files(tmp_path, 96)], lora=lora, margin="rows")
    card = finetune(job)
    folder = job.folder / job.name
    assert card["measured"]["kind"]["accuracy"][0] > 0.95
    assert sorted(p.name for p in folder.iterdir() if p.suffix in {".safetensors", ".md"}) == ["card.md", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "kind"}
    assert not list(job.folder.glob(".*"))  # what training needed is gone
    curves = json.loads((folder / "curves.json").read_text())
    assert len(curves) == 18
    # a head at zero: every gap is 0, and log(1 + exp(margin 0.5)) by hand
    assert curves[0]["bradley_terry"] == pytest.approx(np.log1p(np.exp(0.5)), rel=1e-5)
    # what was measured last in training is what the saved folder does
    scorer = scorer_of(job)
    rows = [json.loads(line) for line in Path(job.attributes[0].valid).read_text().splitlines()]
    chats = [[{"role": "user", "content": r["prompt"]}] for r in rows]
    gaps = scorer(chats, [r["chosen"] for r in rows])["kind"] - scorer(chats, [r["rejected"] for r in rows])["kind"]
    assert np.mean(np.log1p(np.exp(0.5 - gaps))) == pytest.approx(curves[-1]["valid_bradley_terry"], rel=1e-3, abs=1e-4)
    # stock transformers reads the folder, and cuts where training cut
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).model_max_length == 64 == scorer.encode.max_tokens


@pytest.mark.soak
def test_ratings_of_several_attributes_come_back_in_their_units(local_ray, tiny, tmp_path):
    train, valid = write_ratings(tmp_path / "t.jsonl", 120, 1), write_ratings(tmp_path / "v.jsonl", 40, 2)
    files = [LabelFiles(name=name, train=train, valid=valid) for name in ("kind", "curt")]
    job = make_job(tmp_path, tiny, files, epochs=4)
    card = finetune(job)
    units = card["units"]["kind"]
    assert 2 < units["mean"] < 4 and 1.5 < units["std"] <= 2
    saved = json.loads((job.folder / "tiny" / "config.json").read_text())[UNITS]
    assert saved["mean"] == [units["mean"], card["units"]["curt"]["mean"]]
    scores = scorer_of(job)([[{"role": "user", "content": "q"}]] * 2, ["red yes tall", "red no tall"])
    np.testing.assert_allclose(scores["kind"], [5, 1], atol=0.7)
    np.testing.assert_allclose(scores["curt"], [0, 3], atol=0.7)
    measured = card["measured"]["kind"]["ratings"]["kind"]
    assert measured["mean_absolute_error"][0] < 0.5 < measured["same_for_the_mean_rating"][0]
    assert card["measured"]["curt"]["ratings"]["curt"]["rows"] == 20
    assert "| kind | kind | 40 |" in (job.folder / "tiny" / "card.md").read_text()


def classifier(folder: Path) -> Path:
    """A classifier of its own with a head that is not zero, so that one step moves every weight."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(3)
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 1}
    made = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape))
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.soak
def test_two_ranks_equal_one(local_ray, tmp_path):
    """Seven pairs of uneven length, in more micro batches than ranks; losses of both steps, and all weights after them."""
    model, curves, weights = classifier(tmp_path / "model"), [], []
    rng = random.Random(5)
    rows = [{"prompt": "q" * rng.randint(1, 30), "chosen": answer(rng, True), "rejected": answer(rng, False)} for _ in range(7)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = LabelFiles(name="kind", train=str(tmp_path / "t.jsonl"), valid=write_pairs(tmp_path / "v.jsonl", 5, 2))
    for workers in (1, 2):
        where = tmp_path / str(workers)
        settings = {"lora": None, "batch_size": 7, "epochs": 2, "micro_batch_tokens": 256, "learning_rate": 1e-4}
        job = make_job(where, model, [files], workers=workers, cpus_per_worker=0.5, **settings)
        finetune(job)
        curves.append(json.loads((job.folder / "tiny" / "curves.json").read_text()))
        weights.append(load_file(job.folder / "tiny" / "model.safetensors"))
    for one, two in zip(*curves, strict=True):
        for name in ("loss", "accuracy", "tokens"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
    assert curves[1][-1]["valid_bradley_terry"] == pytest.approx(curves[0][-1]["valid_bradley_terry"], rel=1e-4)
    assert curves[0][1]["loss"] < curves[0][0]["loss"]
    # Adam moves a weight by about the learning rate, 1e-4, whatever its gradient's size: a wrong gradient would show
    start = load_file(model / "model.safetensors")
    for name, one in weights[0].items():
        assert (weights[1][name] - one).abs().mean() < 1e-6, name
    assert (weights[0]["score.weight"] - start["score.weight"]).abs().mean() > 1e-5


def test_mistakes_are_named(local_ray, tiny, tmp_path):
    pairs, ratings = pair_files(tmp_path, 8), write_ratings(tmp_path / "r.jsonl", 8, 3)
    with pytest.raises(DataError, match=r"attributes.kind: one of train=.* holds ratings, the other pairs"):
        finetune(make_job(tmp_path, tiny, [pairs.model_copy(update={"valid": ratings})]))
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 3)
    with pytest.raises(DataError, match=r"margin='rows': no training pair has a margin"):
        finetune(make_job(tmp_path, tiny, [pairs.model_copy(update={"train": str(plain)})], margin="rows"))
    same = tmp_path / "same.jsonl"
    same.write_text('{"prompt": "q", "response": "a", "kind": 3}\n' * 3)
    with pytest.raises(DataError, match="all 3 ratings are 3"):
        finetune(make_job(tmp_path, tiny, [LabelFiles(name="kind", train=str(same), valid=ratings)]))
    with pytest.raises(ConfigError, match=r"there is no .*tiny yet"):
        job = tmp_path / "job.yaml"
        job.write_text(make_job(tmp_path, tiny, [pairs]).model_dump_json())
        evaluation_of(str(job), [], [])


@pytest.mark.soak
def test_train_and_evaluate_from_the_command_line(local_ray, tiny, tmp_path):
    job = make_job(tmp_path, tiny, [pair_files(tmp_path, 32)], epochs=1)
    (tmp_path / "job.yaml").write_text(job.model_dump_json())
    made = CliRunner().invoke(main, ["reward", "train", str(tmp_path / "job.yaml"), "--set", "seed=7"])
    assert made.exit_code == 0, made.output
    assert "# Reward model `tiny`" in made.output and "seed 7" in made.output
    again = CliRunner().invoke(main, ["reward", "evaluate", str(tmp_path / "job.yaml"), "--set", "seed=7"])
    assert again.exit_code == 0, again.output
    folder = job.folder / "tiny"
    card, measured = (json.loads((folder / f"{n}.json").read_text()) for n in ("card", "tiny-evaluation"))
    assert measured["sources"] == card["measured"]
    data = ["--data", f"kind={job.attributes[0].valid}", "--set", f"out={tmp_path}"]
    other = CliRunner().invoke(main, ["reward", "evaluate", str(folder), *data])
    assert other.exit_code == 0, other.output
    assert json.loads((tmp_path / "tiny.json").read_text())["sources"]["kind"]["accuracy"] == card["measured"]["kind"]["accuracy"]
