"""Bodies that are broken by hand, for an ingress with fake engines and for a server with a real one."""

from __future__ import annotations

import copy
import json
from typing import Any

CHAT, COMPLETIONS, SCORES = "/v1/chat/completions", "/v1/completions", "/v1/control/scores"
MESSAGES = [{"role": "user", "content": "Hi"}]
ODD = (
    None, True, False, 0, -1, 0.5, 1e308, -1e308, 2**31, 2**63, -(2**63), 10**30, "", "x", "\x00", "\ud800", "𝒳" * 40,
    "<|safety:1|>", [], {}, [[]], [None], {"": None}, {"type": "text"}, {"safety": 1}, ["x"] * 20, "9" * 5000,
    float("nan"), float("inf"),
)  # fmt: skip
FIELDS = ("extra", "", "\ud800", "chat_template", "seed", "n", "control")


def seeds(model: str, start: str, dial: dict[str, float], answer: str) -> tuple[dict[str, Any], ...]:
    """Bodies that are good, for a dialled model with `dial` and for the model that it started from."""

    def ask(**fields: Any) -> dict[str, Any]:
        return {"model": model, "messages": MESSAGES} | fields

    return (
        ask(),
        ask(control=dial, stream=True, n=2, stream_options={"include_usage": True}),
        ask(model=start, control_strategy="rerank", candidates=3, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1),
        ask(logprobs=True, top_logprobs=2, stop=["a", "b"], max_tokens=5, presence_penalty=1.0, frequency_penalty=-1.0, user="u"),
        ask(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}),
        ask(messages=[{"role": "developer", "content": [{"type": "text", "text": "x"}]}, {"role": "tool", "tool_call_id": "c"}]),
        {"model": model, "prompt": ["Once", "Twice"], "max_tokens": 4, "logprobs": 1, "stop": "x"},
        {"model": model, "messages": MESSAGES, "answer": answer},
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Where something stands in a body."""
    yield path
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*path, name))
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from places(item, (*path, i))


def broken(dice: Any, good: tuple[dict[str, Any], ...]) -> tuple[str, bytes]:
    """Path and body: one of the good ones with things replaced, dropped or added, or its bytes changed."""
    body = copy.deepcopy(dice.choice(good))
    path = COMPLETIONS if "prompt" in body else SCORES if "answer" in body else CHAT
    for _ in range(dice.randint(0, 2)):
        *above, last = dice.choice([p for p in places(body) if p] or [("model",)])
        node = body
        for step in above:
            node = node[step]
        how = dice.random()
        if how < 0.6:
            node[last] = copy.deepcopy(dice.choice(ODD))
        elif how < 0.8:
            node.pop(last, None) if isinstance(node, dict) else node.pop(last)
        elif isinstance(node, dict):
            node[dice.choice(FIELDS)] = copy.deepcopy(dice.choice(ODD))
    content = json.dumps(body).encode()
    if dice.random() < 0.3:
        raw = bytearray(content)
        for _ in range(dice.randint(1, 4)):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        content = bytes(raw[: dice.randint(0, len(raw))] if dice.random() < 0.2 else raw)
    return path, content
