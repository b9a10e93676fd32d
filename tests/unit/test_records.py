"""Files of rows as people have them: packed, damaged, with odd line ends; no row is lost without a word."""

from __future__ import annotations

import csv
import gzip
import json
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlray.errors import ConfigError, DataError
from ctrlray.stages.records import LONGEST_FIELD, Unreadable, json_lines, not_utf8, records

ROWS = [{"prompt": "one"}, {"prompt": "zwei, drei"}, {"prompt": "quatre\n\ncinq \u00e9"}]


def written(folder, ending):
    """The rows as a file of that ending."""
    path = folder / f"a{ending}"
    match ending.removesuffix(".gz"):
        case ".jsonl":
            data = "\n".join(map(json.dumps, ROWS)).encode()
        case ".json":
            data = json.dumps(ROWS).encode()
        case ".csv":
            with (folder / "plain.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([["prompt"], *([r["prompt"]] for r in ROWS)])
            data = (folder / "plain.csv").read_bytes()
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), folder / "plain.parquet")
            data = (folder / "plain.parquet").read_bytes()
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    return path


def values(path, limit=None):
    return [row for _, row in records(path, limit)]


ENDINGS = [".jsonl", ".json", ".csv", ".parquet"]


@pytest.mark.parametrize("ending", [*ENDINGS, *(f"{e}.gz" for e in ENDINGS)])
def test_every_format_is_read_whole_packed_or_not(tmp_path, ending):
    path = written(tmp_path, ending)
    assert list(records(path)) == list(enumerate(ROWS, 1)) and values(path, 2) == ROWS[:2]


@pytest.mark.parametrize("name", ["a.txt", "a.gz", "jsonl", "a.jsonl.bz2"])
def test_other_endings_are_refused_with_those_there_are(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match=r"unknown ending; prompts come as \.jsonl, \.json, \.csv or \.parquet, or one"):
        values(tmp_path / name)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_costs_neither_row_nor_column(tmp_path, ending):
    path = written(tmp_path, ending)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert values(path) == ROWS


def test_broken_gzip_of_every_kind(tmp_path):
    whole = gzip.compress("\n".join(json.dumps({"prompt": f"q{i * 7919}"}) for i in range(50)).encode())
    flipped = bytearray(whole)
    flipped[10] |= 0b110  # the first block is of type 3, which deflate does not have
    with pytest.raises(zlib.error):  # the third kind of error, which is neither OSError nor EOFError
        gzip.decompress(bytes(flipped))
    for broken in (bytes(flipped), whole[:-9], b"not gzip", whole[:-1] + b"\xff"):
        (tmp_path / "a.jsonl.gz").write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz: broken gzip \(.+\); fetch the file again"):
            values(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("content", [b"", b"[1, ", b"{}\n{}", b"[" * 100_000, b"\xff\xfe[\x00"])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_damaged_json_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=rf"{name}: not one JSON value \(.+\); write it again, or name it \.jsonl if"):
        values(tmp_path / name)


@pytest.mark.parametrize("cut", [slice(0), slice(20), slice(-20), slice(40, None)])
def test_a_damaged_parquet_file_is_named(tmp_path, cut):
    path = written(tmp_path, ".parquet")
    path.write_bytes(path.read_bytes()[cut])
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file \(.+\); write it again"):
        values(path)


def test_parquet_columns_whose_names_are_not_text(tmp_path):
    path = written(tmp_path, ".parquet")
    path.write_bytes(path.read_bytes().replace(b"prompt", b"prom\xec\x00"))
    with pytest.raises(DataError, match="not a readable parquet file"):
        values(path)


def test_lines_that_are_no_json_leave_their_reason(tmp_path):
    lines = ['{"prompt": "q"}', "{broken", "", "[" * 100_000, '"text"', "9" * 5000]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines))
    found = dict(json_lines(tmp_path / "a.jsonl"))
    assert list(found) == [1, 2, 4, 5, 6] and found[1] == {"prompt": "q"} and found[5] == "text"
    assert found[2].why.startswith("not JSON: Expecting property name") and "nested too deep" in found[4].why
    assert found[6].why.startswith("not JSON: Exceeds the limit")


def test_csv_keeps_blank_lines_inside_of_quotes(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'id,prompt\r\n\r\n1,"a\r\n\r\nb"\r\n   \r\n2,"say ""x"""\r\n')
    assert list(records(tmp_path / "a.csv")) == [(1, {"id": "1", "prompt": "a\r\n\r\nb"}), (2, {"id": "2", "prompt": 'say "x"'})]


def test_csv_fields_may_be_long(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"prompt\n{'q' * 2**20}\nshort\n")
    assert [len(r["prompt"]) for r in values(tmp_path / "a.csv")] == [2**20, 5] and LONGEST_FIELD > 2**20
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "line"),
    [('id,prompt\n1,a\n\n2,"never closed\n3,c\n', 4), ('id,prompt\n1,"a\nb"\n2,"say "hi""\n', 4), ('"', 1)],
)
def test_broken_csv_is_named_by_file_and_line(tmp_path, content, line):
    """An open quote would otherwise take all rows below it into one field."""
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=rf"a\.csv: the row that begins in line {line} is broken \(.+\); close its quotes"):
        values(tmp_path / "a.csv")


def test_a_csv_row_with_more_fields_than_the_header_is_not_cut(tmp_path):
    (tmp_path / "a.csv").write_text("id,prompt\n1,Hello, how are you?\n2,fine,\n3\n")
    more, trailing, fewer = values(tmp_path / "a.csv")
    assert more == Unreadable("line 2 has 3 fields, the header 2; a text with commas goes into quotes")
    assert trailing == {"id": "2", "prompt": "fine"} and fewer == {"id": "3", "prompt": None}


def test_what_is_not_utf8_by_hand():
    assert not_utf8("caf\u00e9 \U0001f600") is None
    assert not_utf8("ab\udcff") == r"not UTF-8: '\udcff', half of a surrogate pair, after 'ab'; write it as UTF-8"
    assert not_utf8("x" * 30 + "\udcff", raw=True) == f"not UTF-8: byte 0xff after {'x' * 20!r}; write it as UTF-8"


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(DataError, match=r"a\.csv: cannot be read \(Is a directory\); make it readable, or correct the path"):
        values(tmp_path / "a.csv")
