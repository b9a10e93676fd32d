"""The generate stage without Ray or vLLM: requests, actors that die, accounts, and what is said when it stops."""

from __future__ import annotations

import os

import pytest
import ray

from ctrlray import config, schema
from ctrlray.clock import note_start
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.errors import ClusterError, DataError
from ctrlray.ledger import Silent
from ctrlray.patience import Patience
from ctrlray.stages import generate
from ctrlray.stages.journal import IN_FLIGHT, Journal
from ctrlray.tables import Storage, from_rows
from ctrlray.telemetry import Where

PATIENCE = Patience("generate", 5.0, lambda: "3 rows")
SETTINGS = config.Generate(
    samples=3,
    sampling=config.Sampling(max_tokens=10),
    behaviours=(config.Behaviour(name="plain"), config.Behaviour(name="no", system="Decline.", prefix="No.", max_tokens=5)),
)


class Bytes:
    """A renderer whose tokens are bytes."""

    def text_ids(self, text):
        return list(text.encode())

    def render(self, messages):
        return list("|".join(m["content"] for m in messages).encode())


def prompts(*texts):
    rows = [{"prompt_id": t, "messages": [{"role": "user", "content": t}], "source": "s", "split": "train"} for t in texts]
    return from_rows(rows, schema.PROMPTS)


def requests(*texts, max_prompt=1000):
    made, refused = generate.expand_requests(prompts(*texts), SETTINGS, Bytes(), "f", max_prompt)
    return made.to_pylist(), refused.to_pylist()


def test_samples_are_dealt_over_behaviours_each_with_its_own_words_and_limit():
    made, _ = requests("why")
    seen = [(r["behaviour"], r["sample"], bytes(r["prompt_token_ids"]), bytes(r["prefix_token_ids"])) for r in made]
    assert seen == [("plain", 0, b"why", b""), ("no", 0, b"Decline.|why", b"No."), ("plain", 1, b"why", b"")]
    assert [r["max_tokens"] for r in made] == [10, 5, 10]


def test_what_fills_the_context_exactly_fits_and_its_prefix_counts():
    longest = len("Decline.|why")
    made, refused = requests("why", max_prompt=longest + len("No."))
    assert len(made) == 3 and refused == []
    made, (bad,) = requests("why", max_prompt=longest)
    assert [r["behaviour"] for r in made] == ["plain", "plain"]
    assert bad["error"] == "prompt_too_long" and bad["detail"] == "prompt why has 12 tokens, the context leaves room for 12"


class Engine:
    """Upper-cases its prompts; raises at those that say so, like vLLM with a broken request."""

    weights_version = 4

    def __init__(self):
        self.asked = []

    def generate(self, prompts, sampling, max_tokens):
        self.asked += zip(map(bytes, prompts), max_tokens, strict=True)
        if any(b"break" in bytes(p) for p in prompts):
            raise RuntimeError("cannot read this")
        return [[Completion(f" {bytes(p).decode().upper()} ", [1, 2], -1.0, "stop", [-0.5, -0.5])] for p in prompts]

    def decode(self, ids):
        return bytes(ids).decode()


class Batch(generate.GenerateBatch):
    def __init__(self, out):
        self._engine, self._sampling, self._out = Engine(), SETTINGS.sampling, out
        self._where = Where("r1", "generate")
        self._journal = Journal(out.sub(IN_FLIGHT))


def files(out, *texts, samples=3):
    settings = SETTINGS.model_copy(update={"samples": samples})
    made, _ = generate.expand_requests(prompts(*texts), settings, Bytes(), "f", 1000)
    return from_rows([{"path": p} for p in generate.write_blocks(made, out, 100)], generate.pa.schema({"path": "string"}))


def test_prefixes_are_fed_to_the_engine_and_belong_to_the_answer(tmp_path):
    batch, out = Batch(Storage(str(tmp_path))), Storage(str(tmp_path))
    made = batch(files(out, "why", samples=2)).to_pylist()
    assert batch._engine.asked == [(b"why", 10), (b"Decline.|whyNo.", 5)]
    assert [r["text"] for r in made] == ["WHY", "No. DECLINE.|WHYNO."]
    assert [bytes(r["token_ids"]) for r in made] == [b"\1\2", b"No.\1\2"]
    assert {r["weights_version"] for r in made} == {4} and made[1]["prompt_tokens"] == 12
    assert out.read_table("responses", schema.RESPONSES).num_rows == 2


def test_a_block_that_is_asked_for_again_is_not_answered_again(tmp_path):
    """As Ray does when the node is lost that held it."""
    batch, out = Batch(Storage(str(tmp_path))), Storage(str(tmp_path))
    work = files(out, "why", "who")
    first = batch(work)
    asked = len(batch._engine.asked)
    assert batch(work) == first and len(batch._engine.asked) == asked == 6


def test_answers_from_before_a_death_are_passed_on_and_the_killer_is_named(tmp_path, monkeypatch, caplog):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    out = Storage(str(tmp_path))
    work = files(out, "fine", "break", "good")
    for _ in range(7):  # together; then each of the three bad rows alone, twice
        with pytest.raises(SystemExit):
            Batch(out)(work)
    last = Batch(out)
    passed = last(work)["response_id"].to_pylist()
    written = out.read_table("responses", schema.RESPONSES)["response_id"].to_pylist()
    assert sorted(passed) == sorted(written) and len(set(passed)) == 6
    assert b"fine" not in [prompt for prompt, _ in last._engine.asked]  # it was kept
    bad = out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    assert len(bad) == 3 and all(b["detail"].endswith("the engine ended: RuntimeError: cannot read this") for b in bad)
    said = [r.getMessage() for r in caplog.records]
    for b in bad:  # each when it ended the engine, and when it was set aside
        assert f"run=r1 stage=generate row={b['row_id']}: ending the engine, which held 1 rows: cannot read this" in said
        assert any(line.startswith(f"run=r1 stage=generate row={b['row_id']}: quarantined, process_died") for line in said)


def held_up(batch, meanwhile):
    """An engine that others take for dead while it answers: `meanwhile()` is what they do."""
    answer = batch._engine.generate

    def late(*args, **limits):
        made = answer(*args, **limits)
        meanwhile()
        return made

    batch._engine.generate = late
    return batch


@pytest.mark.parametrize("others", ["a successor", "another run"])
def test_an_engine_whose_rows_were_given_away_writes_nothing(tmp_path, monkeypatch, caplog, others):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    out = Storage(str(tmp_path))
    work = files(out, "fine", "good")
    passed = []

    def meanwhile():
        if others == "another run":
            Journal(out.sub(IN_FLIGHT)).clear()
        monkeypatch.setattr(os, "getpid", lambda: 1)
        passed.extend(Batch(out)(work)["text"].to_pylist())

    with pytest.raises(SystemExit):
        held_up(Batch(out), meanwhile)(work)
    assert "another has its 6 rows by now" in caplog.text
    written = out.read_table("responses", schema.RESPONSES)
    assert sorted(written["text"].to_pylist()) == sorted(passed) and len(passed) == 6
    out.check_unique("responses", schema.RESPONSES, "response_id")


def test_a_block_that_is_made_again_has_its_rows_in_the_same_order(tmp_path, monkeypatch):
    def leave(code):
        raise SystemExit(code)

    out = Storage(str(tmp_path))
    work = files(out, *"abcdefgh")
    before = Batch(out)
    before._engine.generate = lambda *_, **__: leave(9)  # its process ends: the next one works in eighths
    with pytest.raises(SystemExit):
        before(work)
    first = Batch(out)(work)
    again = Batch(out)
    assert again(work).equals(first) and not again._engine.asked


def response(key, reason="stop", tokens=3):
    row = {"response_id": key, "prompt_id": "p", "behaviour": "plain", "text": "x", "token_ids": [1] * tokens}
    return row | {"logprob_sum": -1.0, "finish_reason": reason, "weights_version": 0, "prompt_tokens": 2}


def quarantined(key, error):
    return {"stage": "generate", "row_id": key, "error": error, "detail": "d"}


def test_accounts_count_every_request_once(tmp_path):
    """Quarantined and answered later; quarantined; refused; and an answer that nobody asked for."""
    out, (a, b, c) = Storage(str(tmp_path)), (r["response_id"] for r in requests("why")[0])
    out.write_table(from_rows([response(a), response(b, "length", 5)], schema.RESPONSES), "responses", "part-0")
    out.write_table(from_rows([response("stranger")], schema.RESPONSES), "responses", "part-1")
    bad = [quarantined(b, "process_died"), quarantined(c, "process_died"), quarantined("long", "prompt_too_long")]
    out.write_table(from_rows(bad, schema.QUARANTINE), "quarantine")
    asked = generate.keys([a, b, c, "long"])
    for seconds in (30.0, 40.0, 20.0):  # two engines, one of them started twice
        note_start(out, seconds)
    result = generate._accounts(asked, out, 2).check("generate")
    assert (result.rows_in, result.rows_out, result.tokens) == (4, 2, 8)
    assert result.quarantined == {"process_died": 1, "prompt_too_long": 1}
    assert result.facts == {"finish_reasons": {"stop": 1, "length": 1}, "start_s": 45.0}


def test_an_answer_that_is_there_twice_is_no_whole_table(tmp_path):
    out, (a, b, c) = Storage(str(tmp_path)), (r["response_id"] for r in requests("why")[0])
    out.write_table(from_rows([response(a), response(b), response(c)], schema.RESPONSES), "responses", "part-0")
    out.write_table(from_rows([response(c, tokens=5)], schema.RESPONSES), "responses", "part-late")
    with pytest.raises(DataError, match=rf"1 rows are there more than once, among them {c} in .*part-0.*part-late"):
        generate._accounts(generate.keys([a, b, c]), out, 1)


def test_what_is_answered_quarantined_or_too_long_starts_no_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "generate_stream", lambda *_: pytest.fail("everything is accounted for"))
    out, (a, b, c) = Storage(str(tmp_path)), (r["response_id"] for r in requests("why")[0])
    out.write_table(from_rows([response(a), response(b)], schema.RESPONSES), "responses")
    out.write_table(from_rows([quarantined(c, "process_died")], schema.QUARANTINE), "quarantine", "part-died")
    out.write_bytes(b"{}", IN_FLIGHT, "batch", "000000-000001.json")  # of a run that was killed as a whole
    advanced = []

    class Counts(Silent):
        def advance(self, rows, tokens=0):
            advanced.append(rows)

    spec = EngineSpec("m", "float32", 40, config.EngineSettings())  # leaves 30 for the prompt
    result = generate.run(prompts("why", "x" * 31), SETTINGS, spec, Bytes(), "f", out, Counts(), PATIENCE).check("generate")
    assert (result.rows_in, result.rows_out) == (6, 2)
    assert result.quarantined == {"process_died": 1, "prompt_too_long": 3} and sum(advanced) == 3
    assert not out.exists(IN_FLIGHT)


class Stream:
    """A stream whose actors fail."""

    def __init__(self, error):
        self.error = error

    def iter_batches(self, **_):
        raise self.error
        yield


DIED = "ray.exceptions.ActorDiedError: created\n  File x\nValueError: No room for the KV cache; raise gpu_memory_utilization"


@pytest.mark.parametrize(
    ("in_constructor", "said"),
    [
        (True, "generate: an actor did not start; it ended with: ValueError: No room for the KV cache; raise"),
        (False, "generate: an actor died more often than pool.max_restarts allows, with 3 rows; it ended with: ValueError"),
    ],
)
def test_actors_that_are_given_up_say_what_ended_them(in_constructor, said):
    error = ray.exceptions.RayActorError("00", DIED, actor_init_failed=in_constructor)
    with pytest.raises(ClusterError, match=said):
        generate.consume(Stream(error), Silent(), PATIENCE)


def test_a_stall_counts_rows_and_gives_the_latest_error():
    note = {"rows": [1, 2], "first": "r1", "process": "host:7", "since": "09:00", "error": "old"}
    later = note | {"rows": [5], "first": "r5", "since": "09:01", "error": "new"}
    said = generate.waits_for([note, later, later | {"error": ""}])
    assert said == "4 rows in flight, the oldest since 09:00 in process host:7, first of them r1; the last error was new"
