"""Requests of a large run: ranges of numbers become the same requests that the driver would make of all prompts at once."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pytest

from ctrlray import config, schema
from ctrlray.engine.engine import EngineSpec
from ctrlray.ledger import Silent
from ctrlray.stages import generate, requests
from ctrlray.stages import prompts as prompt_stage
from ctrlray.tables import Storage
from ctrlray.telemetry import NOWHERE
from tests.unit.test_generate import PATIENCE, SETTINGS, Batch, Bytes

MAX_PROMPT = 40
SEVEN = SETTINGS.model_copy(update={"batch_size": 7})


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """23 prompts for training and 6 for evaluation in parts of 5 rows; two for training do not fit under `Decline.`"""
    monkeypatch.setattr(schema, "PROMPTS_PER_PART", 5)
    texts = [f"question {i}" for i in range(27)] + ["w" * 33, "v" * 33]
    chats = [[{"role": "user", "content": t}] for t in texts]
    rows = [{"prompt_id": schema.prompt_id(c), "messages": c, "source": "s"} for c in chats]
    for i, row in enumerate(rows):
        row["split"] = "eval" if i < 6 else "train"
    monkeypatch.setattr(prompt_stage, "read_source", lambda source: [prompt_stage.Row("s#1", r["messages"]) for r in rows])
    monkeypatch.setattr(prompt_stage, "_split", lambda *_: rows)
    out = Storage(str(tmp_path / "prompts"))
    prompt_stage.run(config.Prompts(train=23, eval=6), 0, out, Silent())
    return requests.PromptParts(out, "train")


def expand(stored, out, settings, items, max_prompt=MAX_PROMPT):
    actor = requests.ExpandRange(stored.place, settings, Bytes(), "f", max_prompt, out, NOWHERE)
    paths = [p for i in items for p in actor(pa.Table.from_pylist([i]))["path"].to_pylist()]
    return [read(out, p) for p in paths]


def read(out, path):
    return out.read_part("requests", path.rsplit("/", 1)[1].removesuffix(".parquet"), schema.REQUESTS).to_pylist()


def everything(stored, max_prompt=MAX_PROMPT):
    made, refused = requests.expand_requests(stored.table(), SEVEN, Bytes(), "f", max_prompt)
    return made.to_pylist(), refused.to_pylist()


@pytest.mark.parametrize(("max_prompt", "too_long"), [(MAX_PROMPT, 2), (12, 27)])
@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_ranges_become_every_request_once_and_in_order(stored, tmp_path, batch, max_prompt, too_long):
    made, refused = everything(stored, max_prompt)
    assert len(stored.names) == 6 and len(made) == 23 * 3 - too_long and len(refused) == too_long
    settings = SETTINGS.model_copy(update={"batch_size": batch})
    items, total = requests.ranges(stored, settings, "f", requests.keys([]))
    assert total == 23 * 3
    out = Storage(str(tmp_path / "g"))
    blocks = expand(stored, out, settings, items, max_prompt)
    assert max(map(len, blocks)) <= batch
    assert [r for block in blocks for r in block] == made
    kept = out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    assert sorted(kept, key=str) == sorted(refused, key=str)


def test_what_is_done_is_left_out_and_a_batch_without_work_is_no_range(stored, tmp_path):
    made, _ = everything(stored)
    ids = [r["response_id"] for r in made]
    done = [*ids[:7], ids[9], *ids[-7:]]
    items, _ = requests.ranges(stored, SEVEN, "f", np.sort(requests.keys(done)))
    blocks = expand(stored, Storage(str(tmp_path / "g")), SEVEN, items)
    assert all(blocks)
    assert [r["response_id"] for block in blocks for r in block] == [i for i in ids if i not in done]


def test_conversations_are_found_by_prompt_id_with_few_parts_in_memory(stored):
    there = pickle.loads(pickle.dumps(stored))
    wanted = {p["prompt_id"]: p["messages"] for p in stored.table().to_pylist()}
    assert {i: there[i] for i in reversed(list(wanted))} == wanted == dict(there)
    assert len(there) == 23 and len(there._kept) == 2
    with pytest.raises(KeyError):
        there[schema.prompt_id([{"role": "user", "content": "question 0"}])]  # for evaluation


def test_a_large_run_resumes_by_row_and_accounts_for_every_request(stored, tmp_path, monkeypatch):
    """Without Ray: what the actors do is done in this process, the last third of the batches only on the second run."""
    out, limit, given = Storage(str(tmp_path / "g")), [8], []
    made, refused = everything(stored)

    def answer(items, out, settings, spec):
        actor, batch = requests.ExpandRange(*given), Batch(out)
        for item in items[: limit[0]]:
            yield batch(actor(pa.Table.from_pylist([item])))

    monkeypatch.setattr(generate, "_expanded", lambda items, _, recipe: given.__setitem__(slice(None), recipe) or items)
    monkeypatch.setattr(generate, "generate_stream", answer)
    seen = []
    monkeypatch.setattr(generate, "consume", lambda stream, *_: seen.append([b.num_rows for b in stream]))
    spec = EngineSpec("m", "float32", MAX_PROMPT + SEVEN.sampling.max_tokens, config.EngineSettings())

    def run():
        return generate.run(stored, SEVEN, spec, Bytes(), "f", out, Silent(), PATIENCE)

    first = run()
    assert first.rows_in == 69 and 0 < first.rows_out < len(made)
    # Ray Data reads a mapping among an actor's arguments through and keeps a copy: of a million prompts, half a gigabyte
    assert len(given) == 7 and not any(isinstance(argument, Mapping) for argument in given)
    limit[0] = 100
    last = run().check("generate")
    assert (last.rows_in, last.rows_out, last.quarantined) == (69, len(made), {"prompt_too_long": len(refused)})
    answered = [i for b in out.batches("responses", schema.RESPONSES) for i in b["response_id"].to_pylist()]
    assert sorted(answered) == sorted(r["response_id"] for r in made)
    assert sum(map(sum, seen)) == len(made)
    assert run() == last and len(seen) == 2  # nothing is left


def test_membership_of_no_rows_in_none():
    empty = requests.keys([])
    assert requests.among(requests.keys(["a"]), empty).tolist() == [False]
    assert requests.among(empty, empty).size == 0
    known = np.sort(requests.keys(["a", "b"]))
    assert requests.among(requests.keys(["b", "z", "a"]), known).tolist() == [True, False, True]


def test_keys_are_joined_in_order_and_counted_a_slice_at_a_time(monkeypatch):
    monkeypatch.setattr(requests, "_AT_ONCE", 2)
    some = requests.joined([requests.keys(["c", "a"]), requests.keys(["b", "z", "y"])])
    assert some.tolist() == sorted(map(hash, "abcyz")) and requests.joined([]).size == 0
    assert requests.num_among(some, requests.joined([requests.keys(["a", "y", "no"])])) == 2
