"""The dial that ships: how it is cut to size, assembled and asked for."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from benchmarks.demo import BESIDE, MAX_BYTES, accuracy, candidates, card, check, error, total, truncated
from ctrlray import config, demo, models
from ctrlray.adapter import ADAPTER, ADAPTER_CARD, merged
from ctrlray.cli import main
from ctrlray.control import ControlSpace
from ctrlray.distill import Levels
from ctrlray.errors import ConfigError

SAFETY = {"name": "safety", "levels": 3, "score": "harmlessness"}
HELPFULNESS = {"name": "helpfulness", "levels": 2}
CONTROL = {"attributes": [SAFETY, HELPFULNESS]}


def dense(change):
    return {weight: high.double() @ low.double() for weight, (high, low) in change.items()}


def test_serving_it_serves_its_folder(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("ctrlray.cli._demo_folder", lambda: str(tmp_path))
    monkeypatch.setattr("ctrlray.serve.command.serve_until_stopped", lambda settings, *_: seen.append(settings))
    ended = CliRunner().invoke(main, ["serve", "--demo"])
    assert ended.exit_code == 0, ended.output
    assert [m.model for m in seen[0].models] == [str(tmp_path)]


def test_changes_one_after_the_other_add_up_and_the_last_rows_count():
    """2 x [[1], [0]] [[1, 2]] + 3 x [[0], [1]] [[1, 0]] = [[2, 4], [3, 0]]."""
    first = {"w.lora_A": torch.tensor([[1.0, 2.0]]), "w.lora_B": torch.tensor([[1.0], [0.0]]), "e.rows": torch.zeros(1, 2)}
    second = {"w.lora_A": torch.tensor([[1.0, 0.0]]), "w.lora_B": torch.tensor([[0.0], [1.0]]), "e.rows": torch.ones(1, 2)}
    change, rows = total([(first, {"lora_scale": 2.0}), (second, {"lora_scale": 3.0})])
    assert dense(change)["w"].tolist() == [[2.0, 4.0], [3.0, 0.0]] and rows["e.rows"].tolist() == [[1.0, 1.0]]
    with pytest.raises(SystemExit, match="trained whole"):
        total([({"w": torch.ones(2, 2)}, {"lora_scale": 1.0})])


def test_the_singular_values_that_are_worth_their_bytes_stay():
    """A 4 x 4 weight with values 3 and 1, an 8 x 8 one with 4 and 0.5; one of the first costs 16 bytes, of the second 32.

    Squared per byte: 9/16, 1/16; 16/32, 0.25/32. With 48 bytes the 3 and the 4 stay: lost are 1 and 0.25 of 26.25.
    """
    small, large = torch.eye(4)[:, :2], torch.eye(8)[:, :2]
    change = {"s": (small * torch.tensor([3.0, 1.0]), small.T), "l": (large * torch.tensor([4.0, 0.5]), large.T)}
    made = truncated(change, 48)
    assert {w: high.shape[1] for w, (high, _) in made.items()} == {"s": 1, "l": 1}
    assert dense(made)["s"][0, 0].item() == pytest.approx(3, rel=1e-3) and dense(made)["l"].diagonal().tolist()[1] == 0
    assert error(change, made) == pytest.approx((1.25 / 26.25) ** 0.5, rel=1e-3)
    assert {w: high.shape[1] for w, (high, _) in truncated(change, 32).items()} == {"s": 2}, "the 3 first, then no 4 fits"
    assert {w: high.shape[1] for w, (high, _) in truncated(change, 64).items()} == {"s": 2, "l": 1}
    assert truncated(change, 15) == {} and error(change, {}) == 1.0


def test_what_fits_loses_the_rounding_alone():
    torch.manual_seed(0)
    change = {f"w{i}": (torch.randn(12, 3), torch.randn(3, 20)) for i in range(2)}
    assert error(change, truncated(change, 10_000)) < 1e-3


def measured(value, width=0.05):
    pairwise = {"value": value, "low": value - width, "high": value + width}
    return {"attributes": {"a": {"pairwise": pairwise}, "b": {"pairwise": {"value": 0.7, "low": 0.6, "high": 0.8}}}}


def test_a_dial_is_as_good_as_training_reward_and_judge_say_together():
    assert accuracy({"clm": measured(0.8)}, {}, "clm") == pytest.approx(0.75)
    assert accuracy({"clm": measured(0.8)}, {"clm": measured(0.6)}, "clm") == pytest.approx((0.8 + 0.7 + 0.6 + 0.7) / 4)


def finished(**dials):
    """As much of a run as is read."""
    objectives = [SimpleNamespace(type=m) for m in dials]
    job = SimpleNamespace(judges=(), train=SimpleNamespace(objectives=objectives))
    evaluated = SimpleNamespace(read_json=lambda name: {m: measured(v) for m, v in dials.items()})
    return SimpleNamespace(job=job, out=lambda stage: evaluated)


def test_all_runs_and_methods_are_candidates():
    runs = [finished(clm=0.6, exmate=0.7), finished(clm=0.9)]
    found = candidates(runs, None)
    told = [(runs.index(c.run), c.method, round(c.accuracy, 2)) for c in found]
    assert told == [(0, "clm", 0.65), (0, "exmate", 0.7), (1, "clm", 0.8)]
    assert [c.method for c in candidates(runs, "exmate")] == ["exmate"]
    with pytest.raises(SystemExit, match="has trained ppo"):
        candidates(runs, "ppo")


def test_a_dial_at_chance_or_reversed_does_not_ship():
    check(measured(0.6), measured(0.5))
    with pytest.raises(SystemExit, match=r"by the training reward a has a pairwise order accuracy of value 0\.540"):
        check(measured(0.54), measured(0.9))
    with pytest.raises(SystemExit, match="by the judge a has"):
        check(measured(0.6), measured(0.44))


def test_the_card_tells_where_it_comes_from_and_what_was_lost():
    came = {"job": "results", "job_hash": "abc", "commit": "def", "started": "2026-01-01", "chosen_from": 7}
    kept = {"trained_rank": 16, "mean_rank": 9.5, "error": 0.125}
    dial = {"control": CONTROL, "method": "exmate", "from": came, "kept": kept, "figures": {"pairs": "0.70"}}
    text = card(dial, {"pairs": "0.71"})
    assert "| pairs | 0.71 | 0.70 |" in text and "chosen among 7" in text and "loses 12.5% of the change" in text
    assert "| `safety` | 1 to 3 |" in text and "`results` (hash abc, commit def, started 2026-01-01)" in text


@pytest.fixture
def source(tiny, private_cache, tmp_path, monkeypatch):
    """A folder like the shipped one, of the tiny model."""
    monkeypatch.setattr(models, "pull_embedded", lambda: tiny)
    job = demo.job_of({"control": CONTROL, "export": {}})
    base = models.prepare(job.model, ControlSpace.of(job.control))
    torch.manual_seed(1)
    rows, width = len(base.control_ids), 64
    tensors = {
        "model.embed_tokens.weight.rows": torch.randn(rows, width).half(),
        "model.layers.0.self_attn.q_proj.weight.lora_A": torch.randn(2, width).half(),
        "model.layers.0.self_attn.q_proj.weight.lora_B": torch.randn(width, 2).half(),
    }
    made = tmp_path / "asset"
    made.mkdir()
    save_file(tensors, made / ADAPTER)
    (made / ADAPTER_CARD).write_text(json.dumps({"lora_scale": 1.0, "control_ids": list(base.control_ids)}))
    dial = {"control": CONTROL, "export": {"defaults": {"safety": 2}}, "method": "exmate", "figures": {"pairs": "0.7"}}
    (made / demo.DIAL).write_text(json.dumps(dial))
    monkeypatch.setattr(demo, "asset", lambda: made)
    monkeypatch.setattr(demo, "_LOOK_UP", "")  # needs vLLM
    return made


def test_it_is_assembled_once_into_a_folder_to_serve(source):
    from transformers import AutoTokenizer

    assert not demo.ready()
    folder = demo.folder()
    assert demo.ready() and folder.name == "demo" and demo.folder() == folder
    card = json.loads((folder / "ctrlray.json").read_text())
    assert [(a["name"], a["high"], a["default"]) for a in card["attributes"]] == [("safety", 3, 2), ("helpfulness", 2, 2)]
    assert "| pairs | 0.7 |" in (folder / "README.md").read_text()
    changes, base = load_file(source / ADAPTER), models.prepare(config.Model(), ControlSpace.of(config.Control(**CONTROL)))
    before, after = (load_file(f"{p}/model.safetensors") for p in (base.folder, folder))
    settings = json.loads((source / ADAPTER_CARD).read_text())
    moved = [n for n, t in after.items() if not torch.equal(t, before[n])]
    assert sorted(moved) == ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert all(torch.equal(after[n], merged(n, before[n], changes, settings).to(after[n].dtype)) for n in moved)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = {"tokenize": False, "add_generation_prompt": True, "helpfulness": 1}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], **asked).endswith("<|safety:2|><|helpfulness:1|>")


def test_two_first_users_get_one_folder(source, monkeypatch):
    """The other one finishes while this one merges."""
    finish = demo.export.finish

    def slower(made, *rest):
        finish(made, *rest)
        shutil.copytree(made, demo._place())

    monkeypatch.setattr(demo.export, "finish", slower)
    folder = demo.folder()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["demo"] and (folder / "ctrlray.json").is_file()
    assert not (folder / "demo").exists()


def test_another_version_of_it_is_another_folder(source):
    before = demo.folder()
    dial = json.loads((source / demo.DIAL).read_text())
    (source / demo.DIAL).write_text(json.dumps(dial | {"figures": {"pairs": "0.8"}}))
    assert not demo.ready() and demo.folder() != before


def test_an_adapter_of_another_control_space_is_refused(source):
    dial = json.loads((source / demo.DIAL).read_text())
    wider = {"attributes": [SAFETY | {"levels": 5}, HELPFULNESS]}
    (source / demo.DIAL).write_text(json.dumps(dial | {"control": wider}))
    with pytest.raises(ConfigError, match="control tokens are not those"):
        demo.folder()
    assert not demo.ready()


@pytest.mark.parametrize("words", [["chat", "--demo", "quickstart"], ["serve", "--demo", "quickstart"]])
def test_with_another_model_beside_it_it_is_a_usage_error(words):
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and "--demo is a model by itself; leave out 'quickstart'" in done.output


def test_chat_with_nothing_points_to_it():
    done = CliRunner().invoke(main, ["chat"])
    assert done.exit_code == 2 and "name a TARGET, or give --demo" in done.output


@pytest.mark.parametrize("words", [["chat"], ["serve", "run"]])
def test_help_has_it_among_the_examples(words):
    said = CliRunner().invoke(main, [*words, "--help"]).output
    assert f"  ctrlray {words[0]} --demo" in said.partition("Examples:")[2]


def test_the_shipped_folder_is_small_and_holds_no_pickle():
    files = [f for f in demo.asset().iterdir() if f.is_file()]
    assert {f.name for f in files} == {*demo.FILES, "card.md"}
    assert sum(f.stat().st_size for f in files) <= MAX_BYTES
    tensors = load_file(demo.asset() / ADAPTER)
    assert {t.dtype for t in tensors.values()} == {torch.float16} and all(t.isfinite().all() for t in tensors.values())
    assert sum(t.numel() * 2 for t in tensors.values()) <= MAX_BYTES - BESIDE


def test_the_shipped_card_tells_its_dial():
    dial = json.loads((demo.asset() / demo.DIAL).read_text())
    card, job = (demo.asset() / "card.md").read_text(), demo.job_of(dial)
    for attribute in job.control.attributes:
        assert f"| `{attribute.name}` | 1 to {attribute.levels} |" in card
        assert Levels.from_dict(dial["scales"][attribute.name]).num_levels == attribute.levels
        figure = f"{attribute.name}: pairwise order accuracy (chance 0.5)"
        assert f"| {dial['figures'][figure]} |\n" in card.partition(figure)[2]
        assert float(dial["figures"][figure].split("[")[1].split(",")[0]) > 0.5, "its interval leaves out chance"
    assert dial["from"]["job"] in card and dial["from"]["commit"] in card
