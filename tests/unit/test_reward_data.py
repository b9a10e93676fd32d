"""Human labels from files: every format and ending, what is dropped and why, and what is refused."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlray.errors import DataError
from ctrlray.hh import Pair, judge_half
from ctrlray.rewards.data import Rated, read_labels
from ctrlray.schema import first_human_turn

ASKED = ({"role": "user", "content": "Q"},)


def write(path, rows):
    """Rows as the path's ending says; a text is written as the line that it is."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    lines = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def said(text, role="assistant"):
    return {"role": role, "content": text}


def test_hh_counts_every_row(tmp_path):
    start = "\n\nHuman: Q\n\nAssistant: "
    rows = [(start + "good", start + "bad"), (start + "same", start + "same"), (start, start + "b"), ("?", "?")]
    lines = [json.dumps({"chosen": c, "rejected": r}) for c, r in rows] + ["{not json", '{"chosen": 1}']
    found = read_labels(write(tmp_path / "rows.jsonl.gz", lines))
    assert found.format == "hh" and found.pairs == (Pair(ASKED, "good", "bad"),)
    assert found.dropped == {"unparsable": 3, "empty answer": 1, "equal answers": 1}
    assert len(found.pairs) + sum(found.dropped.values()) == len(lines)


def test_missing_file_names_the_variable():
    with pytest.raises(DataError, match="CTRLRAY_DATA"):
        read_labels("$CTRLRAY_DATA/hh/no-such-file.jsonl")


PAIRS = [
    {"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": 1.5},
    {"prompt": [said("Q", "user")], "chosen": " good ", "rejected": "bad"},
    {"prompt": "Q", "chosen": [said("Q", "user"), said("good")], "rejected": [said("Q", "user"), said("bad")]},
    {"prompt": [said("Q", "user")], "chosen": [said("good")], "rejected": [said("bad")]},
    {"chosen": [said("Q", "user"), said("good")], "rejected": [said("Q", "user"), said("bad")]},
]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_pairs_in_every_spelling(tmp_path, ending):
    found = read_labels(write(tmp_path / f"pairs.{ending}", PAIRS))
    assert found.format == "pairs" and found.dropped == {}
    assert found.pairs == (Pair(ASKED, "good", "bad", 1.5), *[Pair(ASKED, "good", "bad")] * 4)


@pytest.mark.parametrize("row", PAIRS[1:])
def test_pairs_from_parquet(tmp_path, row):
    assert read_labels(write(tmp_path / "pairs.parquet", [row] * 3)).pairs == (Pair(ASKED, "good", "bad"),) * 3


def test_bad_pairs_are_counted_by_reason(tmp_path):
    good = PAIRS[0]
    rows = [
        good,
        "not json",
        "[1, 2]",
        {"prompt": "Q", "chosen": "only"},
        good | {"prompt": 7},
        good | {"prompt": [{"role": "wizard", "content": "?"}]},
        good | {"prompt": "  "},
        good | {"chosen": [said("Q", "user")]},
        good | {"rejected": ""},
        good | {"rejected": "good"},
        good | {"margin": "much"},
        {"chosen": [said("A", "user"), said("good")], "rejected": [said("B", "user"), said("bad")]},
        '{"prompt": "Q", "chosen": "\\ud83d", "rejected": "bad"}',
    ]
    found = read_labels(write(tmp_path / "pairs.jsonl", rows))
    assert len(found.pairs) == 1
    assert found.dropped == {
        "broken text": 1,
        "empty answer": 1,
        "empty prompt": 1,
        "equal answers": 1,
        "margin is not a number": 1,
        "prompts differ": 1,
        "unparsable": 6,
    }


def test_ratings(tmp_path):
    row = {"prompt": "Q", "response": "fine", "help": 4, "tone": 0.5, "note": "by hand", "ok": True}
    file = write(tmp_path / "ratings.jsonl", [row, row | {"help": None}])
    assert read_labels(file).rated == (Rated(ASKED, "fine", {"help": 4.0, "tone": 0.5}), Rated(ASKED, "fine", {"tone": 0.5}))
    only = read_labels(file, ["help"])
    assert only.format == "ratings" and only.rated == (Rated(ASKED, "fine", {"help": 4.0}),) and only.dropped == {"no rating": 1}
    assert read_labels(write(tmp_path / "r.parquet", [row]), ["tone", "help"]).rated[0].ratings == {"help": 4.0, "tone": 0.5}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "response": " ", "help": 4}, "empty answer"),
        ({"prompt": "Q", "response": "a", "help": "four"}, "rating is not a number"),
        ('{"prompt": "Q", "response": "a", "help": NaN}', "rating is not a number"),
        ('{"prompt": "Q", "response": "a", "help": 1' + "0" * 400 + "}", "rating is not a number"),
        ({"response": "a", "help": 1}, "unparsable"),
        ({"prompt": "Q", "response": None, "help": 1}, "unparsable"),
    ],
)
def test_bad_ratings_are_counted_by_reason(tmp_path, row, reason):
    good = {"prompt": "Q", "response": "a", "help": 1}
    found = read_labels(write(tmp_path / "ratings.jsonl", [good, row]), ["help"])
    assert len(found.rated) == 1 and found.dropped == {reason: 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n', r"first record has \['text'\]; give HH dialogues"),
        ("a.jsonl", b"", "holds no JSON record"),
        ("a.jsonl", b"\xff\xfe\n", "holds no JSON record"),
        ("a.csv", b"a,b\n", "unknown ending"),
        ("a.jsonl.gz", b"not gzip", "broken"),
        ("a.jsonl.gz", gzip.compress(b"x" * 99)[:-9], "broken"),
        ("a.parquet", b"not parquet", "not a readable parquet file"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_labels(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.skipif("CTRLRAY_DATA" not in os.environ, reason="needs CTRLRAY_DATA, the folder that holds hh/*.jsonl.gz")
@pytest.mark.parametrize("name", ["helpful-base", "harmless-base"])
def test_real_files(name):
    found = read_labels(Path(os.environ["CTRLRAY_DATA"]) / "hh" / f"{name}.train.jsonl.gz")
    assert found.dropped.get("unparsable", 0) == 0 and sum(found.dropped.values()) < 10
    assert all(p.messages[-1]["role"] == "user" for p in found.pairs)
    assert 0.4 < sum(judge_half(first_human_turn(p.messages)) for p in found.pairs) / len(found.pairs) < 0.6
