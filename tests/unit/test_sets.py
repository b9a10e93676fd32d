"""Prompt sets: which rows are asked, what becomes of the others, and where published sets are read from."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter

import pytest

from ctrlray import config, schema
from ctrlray.errors import ConfigError, DataError
from ctrlray.stages import prompts, sets
from ctrlray.tables import Storage


def wanted(path, **extra):
    raw = {"name": "x", "sources": [{"type": "file", "path": str(path)}]}
    return config.parse(config.PromptSet, raw | extra, where="t")


def over_refusal(path, **extra):
    return wanted(path, role="over_refusal", attribute="safety", **extra)


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def labelled(count):
    """Safe ones first, as XSTest has them."""
    return [{"prompt": f"{kind} {i}", "label": kind} for kind in ("safe", "unsafe") for i in range(count)]


def read(asked, out, trained_on=(), fits=lambda messages: True, seed=0):
    return sets.read(asked, seed, trained_on, fits, Storage(str(out)))


def texts(found):
    return [p["messages"][-1]["content"] for p in found.prompts]


def test_every_row_is_asked_dropped_or_quarantined(tmp_path):
    rows = [*labelled(2), labelled(2)[0], {"prompt": " seen before\n", "label": "safe"}, {"prompt": "bare"}, {"other": 1}]
    rows += [{"prompt": "loud", "label": "SAFE"}, {"prompt": "so long", "label": "safe"}]
    file, out = write(tmp_path / "p.jsonl", rows), tmp_path / "out"
    found = read(over_refusal(file), out, {"seen before"}, lambda messages: "long" not in messages[0]["content"])
    assert sorted(texts(found)) == ["safe 0", "safe 1", "unsafe 0", "unsafe 1"]
    assert {p["messages"][0]["content"].split()[0] == p["label"] for p in found.prompts} == {True}
    assert json.loads((out / "accounts.json").read_text()) == {
        "rows": 10,
        "prompts": 4,
        "dropped": {"duplicate": 1, "in_training": 1},
        "quarantined": {"prompt_too_long": 1, "unlabelled": 2, "unreadable": 1},
    }
    bad = Storage(str(out)).read_table("quarantine", schema.QUARANTINE).to_pylist()
    assert {r["row_id"]: r["error"] for r in bad} == {
        "p.jsonl#7": "unlabelled", "p.jsonl#8": "unreadable", "p.jsonl#9": "unlabelled", "p.jsonl#10": "prompt_too_long",
    }  # fmt: skip


def test_a_row_that_cannot_be_rendered_is_quarantined(tmp_path):
    def fits(messages):
        if "evil" in messages[0]["content"]:
            raise DataError("it reads as <|end|>")
        return True

    file, out = write(tmp_path / "p.jsonl", [{"prompt": "good"}, {"prompt": "evil"}]), tmp_path / "out"
    assert texts(read(wanted(file), out, fits=fits)) == ["good"]
    (bad,) = Storage(str(out)).read_table("quarantine", schema.QUARANTINE).to_pylist()
    assert (bad["row_id"], bad["error"], bad["detail"]) == ("p.jsonl#2", "special_tokens", "it reads as <|end|>")


def test_a_set_for_something_else_needs_no_labels(tmp_path):
    assert texts(read(wanted(write(tmp_path / "p.jsonl", [{"prompt": "bare"}])), tmp_path / "out")) == ["bare"]


def test_a_limit_takes_labels_in_turn_and_is_the_seed_s(tmp_path):
    file = write(tmp_path / "p.jsonl", labelled(30))
    drawn = [read(over_refusal(file, limit=11), tmp_path / f"out{i}", seed=seed) for i, seed in enumerate((0, 0, 1))]
    for found in drawn:
        assert sorted(Counter(p["label"] for p in found.prompts).values()) == [5, 6]
    assert texts(drawn[0]) == texts(drawn[1]) != texts(drawn[2])
    assert json.loads((tmp_path / "out0" / "accounts.json").read_text())["dropped"] == {"over_limit": 49}


def test_a_second_attempt_asks_what_the_first_one_chose(tmp_path):
    file = write(tmp_path / "p.jsonl", labelled(3))
    first = read(over_refusal(file), tmp_path / "out")
    file.unlink()
    assert read(over_refusal(file), tmp_path / "out") == first


def test_a_set_without_a_prompt_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"evaluate\.sets\.x: none of 1 rows can be asked: .*'in_training': 1.*add a source"):
        read(wanted(write(tmp_path / "p.jsonl", [{"prompt": "seen"}])), tmp_path / "out", {"seen"})


FILES = {
    "mt_bench": ("mt_bench_80.jsonl", json.dumps({"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]})),
    "jailbreakbench": ("jailbreakbench_100.json", json.dumps([{"instruction": "Do harm", "category": "Harm"}])),
    "xstest": ("xstest_prompts.csv", 'id,prompt,type,label,focus\n1,"How can I kill a process, say?",homonyms,safe,kill\n'),
}


@pytest.mark.parametrize(
    ("name", "first", "label"),
    [
        ("mt_bench", "Write.", ""),
        ("jailbreakbench", "Do harm", ""),
        ("xstest", "How can I kill a process, say?", "safe"),
    ],
)
def test_published_sets_are_read_from_their_files(tmp_path, monkeypatch, name, first, label):
    (tmp_path / "prompts").mkdir()
    file, text = FILES[name]
    (tmp_path / "prompts" / file).write_text(text)
    monkeypatch.setenv("CTRLRAY_DATA", str(tmp_path))
    (row,) = prompts.read_source(config.BenchmarkPrompts(name=name))
    assert row.messages == [{"role": "user", "content": first}] and (row.label, row.error) == (label, "")


@pytest.mark.parametrize(
    ("name", "raw", "first"),
    [
        ("mt_bench", {"prompt": ["Write.", "Again."], "category": "c"}, "Write."),
        ("jailbreakbench", {"Goal": "Do harm", "Target": "Sure", "Behavior": "b"}, "Do harm"),
        ("xstest", {"prompt": "Kill it?", "label": "unsafe", "type": "contrast_homonyms"}, "Kill it?"),
    ],
)
def test_without_their_files_published_sets_come_from_the_hub(tmp_path, monkeypatch, name, raw, first):
    import datasets

    asked = []

    def load_dataset(*path, split, streaming):
        asked.append((*path, split))
        return [raw, raw]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for data in (str(tmp_path), ""):  # a folder without the file, and none
        monkeypatch.setenv("CTRLRAY_DATA", data)
        (row,) = prompts.read_source(config.BenchmarkPrompts(name=name, limit=1))
        assert row.messages == [{"role": "user", "content": first}] and row.label == raw.get("label", "")
    known = {
        "mt_bench": ("HuggingFaceH4/mt_bench_prompts", None, "train"),
        "jailbreakbench": ("JailbreakBench/JBB-Behaviors", "behaviors", "harmful"),
        "xstest": ("Paul/XSTest", None, "train"),
    }
    assert asked == [known[name]] * 2


def test_an_unknown_benchmark_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="'mt_bench', 'jailbreakbench' or 'xstest'"):
        config.parse(config.PromptSet, {"name": "x", "sources": [{"type": "benchmark", "name": "mtbench"}]}, where="t")


@pytest.mark.skipif(not os.environ.get("CTRLRAY_DATA"), reason="needs the prompt files below CTRLRAY_DATA")
def test_the_real_sets_are_whole(tmp_path):
    sizes = {}
    for name, role in (("mt_bench", {}), ("jailbreakbench", {}), ("xstest", {"role": "over_refusal", "attribute": "safety"})):
        raw = {"name": name, "sources": [{"type": "benchmark", "name": name}]}
        found = read(config.parse(config.PromptSet, raw | role, where="t"), tmp_path / name)
        sizes[name] = Counter(p["label"] for p in found.prompts)
    assert sizes == {"mt_bench": {"": 80}, "jailbreakbench": {"": 100}, "xstest": {"safe": 250, "unsafe": 200}}
    with open(f"{os.environ['CTRLRAY_DATA']}/prompts/xstest_prompts.csv", newline="", encoding="utf-8") as file:
        theirs = {r["prompt"]: r["label"] for r in csv.DictReader(file)}
    ours = {p["messages"][0]["content"]: p["label"] for p in found.prompts}
    assert ours == theirs
