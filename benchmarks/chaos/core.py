"""The child process of a simulated engine: answers requests on stdin, a line each, one after the other at a fixed pace.

It ends with its parent, whose end of the pipe closes. Python's own library only: it starts in a blink.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time


def answer(prompt: list[int], limit: int, weights: str) -> tuple[str, str, tuple[float, ...]]:
    """Text, finish reason and log-probs that follow from the request and the weights alone; one token a letter."""
    seed = hashlib.sha256(json.dumps([prompt, limit, weights]).encode()).digest()
    size = 1 + seed[0] % (limit + 2)  # some are cut off
    letters = [seed[1 + i % 31] for i in range(min(size, limit))]
    text = "".join("abcdefghij"[b % 10] for b in letters)
    finished = size < limit
    return text, "stop" if finished else "length", tuple(map(_logprob, [*letters, *([1] if finished else [])]))


def logp(context: list[int], tokens: list[int], weights: str) -> float:
    """Log-prob of an answer's tokens, given in full, that follows from context, tokens and weights alone."""
    seed = hashlib.sha256(json.dumps([context, tokens, weights]).encode()).digest()
    return sum(_logprob(seed[i % 32]) for i in range(len(tokens)))


def _logprob(byte: int) -> float:
    return -(1 + byte % 7) / 4


def main() -> None:
    """Until stdin closes."""
    for line in sys.stdin:
        request = json.loads(line)
        weights, made = request["weights"], []
        for prompt, asked in zip(request["prompts"], request["asked"], strict=True):
            if isinstance(asked, list):
                made.append(logp(prompt, asked, weights))
            else:
                time.sleep(request["pace_s"])
                made.append(answer(prompt, asked, weights))
        print(json.dumps(made), flush=True)


if __name__ == "__main__":
    main()
