"""Chunks that travel together say the same as chunks that travel alone, by the rules of OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from ctrlray.serve.api import ChatRequest
from ctrlray.serve.stream import joined, merged
from tests.fakes import FakeEngine
from tests.ingress import CHAT, TOKENIZER, World, ask, events

SEPARATORS = "\u2028\u2029\x85"
"""Ends of lines to Python's str.splitlines, and so to httpx."""


def chunk(index, text, count, logprobs=None, end=None):
    """One of vLLM's."""
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": end, "stop_reason": None}
    usage = {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": 3 + count}
    head = {"id": "cmpl-x", "object": "text_completion", "created": 7, "model": "m"}
    return json.dumps(head | {"choices": [choice], "usage": usage})


def usage_of_all(count):
    return json.dumps({"id": "cmpl-x", "choices": [], "usage": {"completion_tokens": count}})


def found(name, logprob, offset):
    return {"tokens": [name], "token_logprobs": [logprob], "top_logprobs": [{name: logprob}], "text_offset": [offset]}


def test_merging_by_hand():
    sent = [
        chunk(0, "He", 1, found("token_id:1", -0.5, 0)),
        chunk(1, "Oh", 1),
        chunk(0, "", 2, found("token_id:2", -1.5, 10)),  # a token that ends no character yet
        chunk(0, "llo", 3, found("token_id:3", -2.5, 20), end="stop"),
        usage_of_all(4),
        chunk(1, "!", 2, end="length"),
    ]
    both = {
        "tokens": ["token_id:1", "token_id:2", "token_id:3"],
        "token_logprobs": [-0.5, -1.5, -2.5],
        "top_logprobs": [{"token_id:1": -0.5}, {"token_id:2": -1.5}, {"token_id:3": -2.5}],
        "text_offset": [0, 10, 20],
    }
    assert merged(sent) == [chunk(0, "Hello", 3, both, end="stop"), sent[1], sent[4], sent[5]]
    assert merged(sent[:1]) == sent[:1] and merged([]) == []


def test_nothing_passes_an_error_or_an_end():
    error = json.dumps({"error": {"message": "broken", "code": 500}})
    sent = [chunk(0, "a", 1), error, chunk(0, "b", 2), chunk(0, "c", 3, end="stop"), chunk(0, "d", 4)]
    assert merged(sent) == [sent[0], error, chunk(0, "bc", 3, end="stop"), sent[4]]


def test_answers_that_are_whole_stay_whole():
    whole = json.dumps({"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}], "usage": {"completion_tokens": 2}})
    assert merged([chunk(0, "x", 1), whole, chunk(0, "y", 2)]) == [chunk(0, "x", 1), whole, chunk(0, "y", 2)]


TEXT = st.text(st.characters(codec="utf-8"), max_size=3) | st.sampled_from(["\n\n", "data: ", SEPARATORS, "🙂", ""])


@st.composite
def streams(draw):
    """Batches of chunks of up to three choices in any mixture, as vLLM sends them; the first chunk travels alone."""
    num_choices = draw(st.integers(1, 3))
    tokens = st.lists(st.tuples(TEXT, st.integers(32, 126), st.floats(-99, 0)), min_size=1, max_size=8)
    left = [draw(tokens) for _ in range(num_choices)]
    counts, offsets, sent = [0] * num_choices, [0] * num_choices, []
    while open_ := [i for i in range(num_choices) if left[i]]:
        i = draw(st.sampled_from(open_))
        text, token, logprob = left[i].pop(0)
        counts[i] += 1
        end = None if left[i] else draw(st.sampled_from(["stop", "length"]))
        sent.append(chunk(i, text, counts[i], found(f"token_id:{token}", logprob, offsets[i]), end))
        offsets[i] += len(f"token_id:{token}")
    sent.append(usage_of_all(sum(counts)))
    if draw(st.booleans()):  # it breaks off, with the engine's error or without
        sent = sent[: draw(st.integers(1, len(sent)))] + draw(st.sampled_from([[], ['{"error": {"message": "x", "code": 500}}']]))
    cuts = sorted({0, 1, len(sent), *draw(st.lists(st.integers(0, len(sent)), max_size=4))})
    return num_choices, [sent[a:b] for a, b in pairwise(cuts)]


class Sending(FakeEngine):
    """Answers with these batches."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    async def answer(self, order):
        for batch in self.batches:
            yield batch


async def reassembled(batches, num_choices):
    """What OpenAI's client makes of the stream that comes of these batches, and the error that ended it."""
    WORLD.engine.batches = batches
    request = ChatRequest.model_validate(
        ask(n=num_choices, logprobs=True, top_logprobs=1, stream=True, stream_options={"include_usage": True})
    )
    work = await WORLD.front.chat(request, WORLD.policy.keys[0], {})
    await work.begin()
    text = "".join([event async for event in work.events()])
    await work.close()
    *lines, end = [line.removeprefix("data: ") for line in text.splitlines() if line]
    parts, state = list(map(json.loads, lines)), ChatCompletionStreamState()
    error = parts.pop()["error"] if "error" in parts[-1] else None
    for part in parts:
        state.handle_chunk(ChatCompletionChunk.model_validate(part))
    assert end == "[DONE]"
    return state.current_completion_snapshot.model_dump(exclude={"id", "created"}), error, work._spent


WORLD = World(engine=Sending([]))


@settings(max_examples=150, deadline=None)
@given(streams())
def test_what_travels_together_is_what_travels_alone(stream):
    num_choices, batches = stream
    alone = asyncio.run(reassembled([[d] for batch in batches for d in batch], num_choices))
    together = asyncio.run(reassembled(list(map(merged, batches)), num_choices))
    assert together == alone
    whole, error, _ = together
    if error is not None:
        return
    sent = [json.loads(d) for batch in batches for d in batch if '"choices": []' not in d]
    for i in range(num_choices):
        own = [d["choices"][0] for d in sent if d["choices"][0]["index"] == i]
        choice = whole["choices"][i]
        assert choice["message"]["content"] == "".join(c["text"] for c in own)
        assert choice["finish_reason"] == own[-1]["finish_reason"]
        ids = [int(c["logprobs"]["tokens"][0].removeprefix("token_id:")) for c in own]
        assert [t["token"] for t in choice["logprobs"]["content"]] == [TOKENIZER.decode([i]) for i in ids]
    assert whole["usage"]["completion_tokens"] == len(sent)


def test_an_error_is_one_that_any_process_can_read():
    class Local(Exception):
        pass

    async def failing():
        yield [chunk(0, "a", 1), chunk(0, "b", 2)]
        raise Local("why")

    async def scenario():
        seen = []
        with pytest.raises(RuntimeError, match=r"Local\('why'\)") as caught:
            async for batch in joined(failing()):
                seen.append(batch)
        return seen, type(caught.value)

    assert asyncio.run(scenario()) == ([[chunk(0, "ab", 2)]], RuntimeError)


def test_no_character_of_an_answer_ends_a_line():
    world = World()
    world.engine.texts = [f"one{SEPARATORS}two\n\nthree \ud800"]
    for path, body in ((CHAT, ask(stream=True)), ("/v1/completions", {"model": "tiny", "prompt": "x", "stream": True})):
        answer = world.admin.post(path, json=body)
        assert all(line.startswith("data: ") for line in answer.iter_lines() if line)
        choices = [c for e in events(answer) for c in e["choices"]]
        assert "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices) == world.engine.texts[0]


@pytest.mark.parametrize("sent", [[], [[chunk(0, "a", 1, end="stop")], [chunk(1, "b", 1)]], [[usage_of_all(0)]]])
def test_a_stream_that_stops_before_its_choices_do_is_not_whole(sent):
    world = World(engine=Sending(sent))
    answer = world.web.post(CHAT, json=ask(stream=True, n=2, stream_options={"include_usage": True}))
    if not sent:
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_error"
        return
    last = events(answer)[-1]
    assert last["error"]["code"] == "engine_error" and "broke off" in last["error"]["message"] and world.in_flight == 0
    assert 'ctrlray_requests_total{key="web",model="tiny",status="503"} 1.0' in world.admin.get("/metrics").text
