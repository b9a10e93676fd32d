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


def test_a_prompt_that_cannot_be_rendered_is_quarantined_with_all_of_its_samples():
    class Careful(Bytes):
        def render(self, messages):
            if messages[-1]["content"] == "evil":
                raise DataError("the user text 'evil' holds what the model's tokenizer reads as <|end|>; take it out")
            return super().render(messages)

    made, refused = generate.expand_requests(prompts("why", "evil", "how"), SETTINGS, Careful(), "f", 1000)
    assert made["prompt_id"].to_pylist() == ["why"] * 3 + ["how"] * 3
    everything, _ = requests("why", "evil", "how")
    assert [r["row_id"] for r in refused.to_pylist()] == [r["response_id"] for r in everything if r["prompt_id"] == "evil"]
    assert {r["error"] for r in refused.to_pylist()} == {"special_tokens"}
    assert refused["detail"][0].as_py().startswith("prompt evil: the user text 'evil' holds what")


def test_a_prompt_whose_own_system_turn_cannot_be_rendered_is_refused_though_behaviours_hide_it():
    class Careful(Bytes):
        def render(self, messages):
            if "evil" in messages[0]["content"]:
                raise DataError("no")
            return super().render(messages)

    rows = prompts("why").to_pylist()
    rows[0]["messages"].insert(0, {"role": "system", "content": "evil"})
    own = from_rows(rows, schema.PROMPTS)
    polite = [b.model_copy(update={"system": "Be good."}) for b in SETTINGS.behaviours]
    hidden = SETTINGS.model_copy(update={"behaviours": polite})
    for settings in (hidden, SETTINGS):
        made, refused = generate.expand_requests(own, settings, Careful(), "f", 1000)
        assert made.num_rows == 0 and set(refused["error"].to_pylist()) == {"special_tokens"}


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


class Spec:
    """A recipe of engines that live in this process."""

    def __init__(self, make=Engine):
        self.build = make

    def environment(self):
        return {}


class Batch(generate.GenerateBatch):
    def __init__(self, out, make=Engine, max_restarts=10):
        super().__init__(Spec(make), SETTINGS.sampling, out, Where("r1", "generate"), max_restarts)


def files(out, *texts, samples=3):
    settings = SETTINGS.model_copy(update={"samples": samples})
    made, _ = generate.expand_requests(prompts(*texts), settings, Bytes(), "f", 1000)
    return from_rows([{"path": p} for p in generate.write_blocks(made, out, 100)], generate.pa.schema({"path": "string"}))


@pytest.fixture
def mortal(monkeypatch):
    """Processes end by an exception here."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)


def actor(out, blocks, **settings):
    """One actor as Ray keeps it: its process is started anew until every block is done. How often it ended."""
    deaths, todo = 0, list(blocks)
    while True:
        try:
            process = Batch(out, **settings)
            while todo:
                process(todo[0])
                todo.pop(0)
            return deaths
        except SystemExit:
            deaths += 1
            assert deaths < 1000, "nobody ends this"


def quarantine(out):
    return [r["row_id"] for r in out.read_table("quarantine", schema.QUARANTINE).to_pylist()]


@pytest.mark.usefixtures("mortal")
def test_rows_that_kill_in_many_blocks_are_all_set_aside_and_the_rest_is_answered(tmp_path):
    """24 rows a block, the first of the first and of the last eighth guilty.

    24 die, 3 die: two in a row. Then six eighths are answered, and only the other eighth and each guilty row, twice, die.
    """
    out, blocks, guilty = Storage(str(tmp_path)), [], set()
    for b in range(6):
        texts = [f"{b}-{i}" + (" break" if i in (0, 21) else "") for i in range(24)]
        blocks.append(files(out, *texts, samples=1))
        guilty |= {schema.response_id(t, "plain", 0, "f") for t in texts if "break" in t}
    assert actor(out, blocks, max_restarts=2) == 6 * (1 + 2 + 2 * 2)
    assert sorted(quarantine(out)) == sorted(guilty) and len(guilty) == 12
    answered = out.read_table("responses", schema.RESPONSES)["response_id"].to_pylist()
    assert len(answered) == len(set(answered)) == 6 * 22 and not guilty & set(answered)


@pytest.mark.usefixtures("mortal")
def test_a_prompt_all_of_whose_samples_kill_is_no_engine_that_ends_on_everything(tmp_path):
    """Rows 0 to 7 of 24: with the whole and three eighths four processes end in vain, then each row ends two."""
    out = Storage(str(tmp_path))
    block = files(out, "break", "fine", "good", samples=8)
    assert actor(out, [block], max_restarts=4) == 1 + 3 + 8 * 2
    assert len(quarantine(out)) == 8 and out.read_table("responses", schema.RESPONSES).num_rows == 16


class Broken(Engine):
    def generate(self, prompts, sampling, max_tokens):
        raise RuntimeError("the device is lost")


@pytest.mark.usefixtures("mortal")
def test_an_engine_that_ends_on_everything_ends_the_stage_and_blames_no_row(tmp_path):
    """24 rows, then three eighths of them: four processes, the first and its three restarts."""
    out, built = Storage(str(tmp_path)), []

    def build():
        built.append(Broken())
        return built[-1]

    block = files(out, *(f"{i}" for i in range(24)), samples=1)
    said = (
        r"ended 4 times in a row and finished nothing in between, more than pool\.max_restarts=3 allows; the last one with: "
        r"RuntimeError: the device is lost\. What is finished is kept, and 0 rows .* run the same command again"
    )
    with pytest.raises(ClusterError, match=said):
        actor(out, [block], make=build, max_restarts=3)
    assert len(built) == 4 and quarantine(out) == []


@pytest.mark.usefixtures("mortal")
def test_an_engine_that_breaks_later_ends_the_stage_with_what_was_isolated_before(tmp_path):
    """Two rows are isolated in the first block; of the second nothing is answered."""
    out = Storage(str(tmp_path))
    blocks = [files(out, *(f"{i}" + (" break" if i in (2, 9) else "") for i in range(24)), samples=1)]
    blocks.append(files(out, *(f"break {i}" for i in range(24)), samples=1))
    with pytest.raises(ClusterError, match=r"ended 4 times in a row .*, and 2 rows that ended a process alone are quarantined"):
        actor(out, blocks, max_restarts=3)
    assert len(quarantine(out)) == 2 and out.read_table("responses", schema.RESPONSES).num_rows == 22


def test_an_engine_that_ends_while_it_starts_ends_the_stage(tmp_path):
    out, built = Storage(str(tmp_path)), []

    def build():
        built.append(1)
        raise SystemExit

    said = r"ended 3 times in a row .*max_restarts=2 .*: the process ended before it took up work"
    with pytest.raises(ClusterError, match=said):
        actor(out, [files(out, "why")], make=build, max_restarts=2)
    assert len(built) == 3


@pytest.mark.usefixtures("mortal")
def test_a_row_is_in_the_quarantine_before_the_rest_of_its_block_is_tried(tmp_path):
    out, seen = Storage(str(tmp_path)), {}

    class Watching(Engine):
        def generate(self, prompts, sampling, max_tokens):
            seen[bytes(prompts[0])] = quarantine(out)
            return super().generate(prompts, sampling, max_tokens)

    texts = [f"{i}" + (" break" if i in (0, 9) else "") for i in range(16)]  # in eighths 0, 1 and 8, 9
    actor(out, [files(out, *texts, samples=1)], make=Watching)
    first, second = (schema.response_id(texts[i], "plain", 0, "f") for i in (0, 9))
    assert seen[b"2"] == [] and seen[b"1"] == seen[b"9 break"] == [first] and sorted(quarantine(out)) == sorted([first, second])


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


@pytest.mark.usefixtures("mortal")
def test_answers_from_before_a_death_are_passed_on_and_the_killer_is_named(tmp_path, caplog):
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
@pytest.mark.usefixtures("mortal")
def test_an_engine_whose_rows_were_given_away_writes_nothing(tmp_path, monkeypatch, caplog, others):
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


@pytest.mark.usefixtures("mortal")
def test_a_block_that_is_made_again_has_its_rows_in_the_same_order(tmp_path):
    out = Storage(str(tmp_path))
    work = files(out, *"abcdefgh")
    before = Batch(out)
    before._engine.generate = lambda *_, **__: os._exit(9)  # its process ends: the next one works in eighths
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


def test_tokens_are_counted_by_block_whatever_stands_in_it():
    answers = generate.pa.table({"response_id": ["a", "b"], "token_ids": [[1, 2, 3], [4]]})
    counts = generate.pa.table({"response_id": ["a", "b"], "num_tokens": [3, 1]})
    assert generate.num_tokens(answers) == generate.num_tokens(counts) == 4
    assert generate.num_tokens(answers.slice(0, 0)) == generate.num_tokens(counts.select(["response_id"])) == 0


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
