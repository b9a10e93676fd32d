from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlray import config, schema
from ctrlray.errors import ConfigError, DataError
from ctrlray.ledger import Silent
from ctrlray.stages import prompts
from ctrlray.tables import Storage

DATA = os.environ.get("CTRLRAY_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="needs CTRLRAY_DATA to point at the folder that holds hh/ and prompts/")


def load(tmp_path, source, train=2, evaluate=1):
    out = Storage(str(tmp_path / "out"))
    result = prompts.run(config.Prompts(sources=(source,), train=train, eval=evaluate), 0, out, Silent()).check("prompts")
    return out.read_table("prompts", schema.PROMPTS).to_pylist(), result, out


def test_every_format_gives_the_same_prompts(tmp_path):
    texts = ["one?", "two?", "three?"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": t}) for t in texts))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    with (tmp_path / "c.csv").open("w") as file:
        csv.writer(file).writerows([["id", "question"], *[[i, t] for i, t in enumerate(texts)]])
    pq.write_table(pa.table({"messages": [[{"role": "user", "content": t}] for t in texts]}), tmp_path / "d.parquet")
    (tmp_path / "e.json").write_text(json.dumps([{"instruction": t} for t in texts]))
    found = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "d.parquet", "e.json"):
        rows, result, _ = load(tmp_path, config.FilePrompts(path=str(tmp_path / name)))
        assert result.rows_in == 3
        found.append({r["prompt_id"] for r in rows})
    assert all(ids == found[0] for ids in found) and len(found[0]) == 3


def test_duplicates_and_bad_rows_are_accounted_for(tmp_path):
    lines = [
        '{"prompt": "a"}',
        '{"prompt": "a"}',
        "{broken",
        '{"prompt": ""}',
        '{"other": 1}',
        '{"prompt": "b"}',
        '{"prompt": "c"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    _, result, out = load(tmp_path, config.FilePrompts(path=str(tmp_path / "x.jsonl")))
    assert result.rows_in == 7 and result.rows_out == 3
    assert result.dropped == {"duplicate": 1} and result.quarantined == {"unreadable": 3}
    table = out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    assert [r["row_id"] for r in table] == ["x.jsonl#3", "x.jsonl#4", "x.jsonl#5"]


def test_one_opening_is_never_in_both_splits(tmp_path):
    rows = [{"chosen": f"\n\nHuman: open{i % 3}\n\nAssistant: x\n\nHuman: more{i}\n\nAssistant: y"} for i in range(40)]
    (tmp_path / "hh.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made, _, _ = load(tmp_path, config.HHPrompts(path=str(tmp_path / "hh.jsonl")), train=20, evaluate=10)
    sides = {}
    for r in made:
        sides.setdefault(schema.first_human_turn(r["messages"]), set()).add(r["split"])
        assert r["messages"][-1]["role"] == "user"
    assert all(len(s) == 1 for s in sides.values()) and {"train", "eval"} == set.union(*sides.values())


def test_hh_without_an_answer_is_quarantined(tmp_path):
    rows = [{"chosen": f"\n\nHuman: q{i}\n\nAssistant: a"} for i in range(3)]
    rows += [{"chosen": "\n\nHuman: only"}, {"chosen": "\n\nAssistant: to nobody"}, {"other": 1}]
    (tmp_path / "hh.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept, result, out = load(tmp_path, config.HHPrompts(path=str(tmp_path / "hh.jsonl")))
    assert len(kept) == 3 and result.quarantined == {"unreadable": 3}
    bad = {r["row_id"]: r["detail"] for r in out.read_table("quarantine", schema.QUARANTINE).to_pylist()}
    assert bad.keys() == {"hh.jsonl#4", "hh.jsonl#5", "hh.jsonl#6"} and "'chosen'" in bad["hh.jsonl#6"]
    assert bad["hh.jsonl#4"].startswith("an HH dialogue ends with the assistant's answer, this one does not; add it")
    assert bad["hh.jsonl#5"] == "an HH dialogue begins with a human's turn; this one is an answer alone"


def test_packaged_prompts_mix_both_kinds(tmp_path):
    rows, result, _ = load(tmp_path, config.PackagedPrompts(), train=96, evaluate=32)
    assert result.rows_in == 256 and len(rows) == 128
    for split, number in (("train", 96), ("eval", 32)):
        sources = [r["source"] for r in rows if r["split"] == split]
        assert sources.count("packaged-safety") == sources.count("packaged-everyday") == number // 2


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("CTRLRAY_DATA", raising=False)
    with pytest.raises(ConfigError, match="CTRLRAY_DATA is not set"):
        prompts.expand("$CTRLRAY_DATA/hh/x.jsonl")
    with pytest.raises(ConfigError, match="no such file"):
        prompts.expand(str(tmp_path / "absent.csv"))
    (tmp_path / "bad.jsonl.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(DataError, match="broken gzip"):
        load(tmp_path, config.FilePrompts(path=str(tmp_path / "bad.jsonl.gz")))
    (tmp_path / "few.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(ConfigError, match=r"lower prompts\.train"):
        load(tmp_path, config.FilePrompts(path=str(tmp_path / "few.jsonl")))


@needs_data
@pytest.mark.parametrize(
    ("kind", "name", "rows"),
    [
        (config.HHPrompts, "hh/harmless-base.valid.jsonl.gz", 368),
        (config.FilePrompts, "prompts/xstest_prompts.csv", 450),
        (config.FilePrompts, "prompts/jailbreakbench_100.json", 100),
        (config.FilePrompts, "prompts/mt_bench_80.jsonl", 80),
    ],
)
def test_real_files_are_read_whole(tmp_path, kind, name, rows):
    made = list(prompts.read_source(kind(path=str(Path(DATA) / name))))
    assert len(made) == rows and all(r.messages for r in made)


def test_a_file_of_other_columns_is_told_by_its_first_row(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"ask": "a"}\n{"ask": "b"}\n{"ask": "c"}\n')
    said = r"sources give 0 different ones.*3 rows could not be read, the first of them x\.jsonl#1: no column messages or .*'ask'"
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, config.FilePrompts(path=str(tmp_path / "x.jsonl")))
