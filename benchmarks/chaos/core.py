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
    return text, "stop" if finished else "length", tuple(-(1 + b % 7) / 4 for b in [*letters, *([1] if finished else [])])


def main() -> None:
    """Until stdin closes."""
    for line in sys.stdin:
        request = json.loads(line)
        made = []
        for prompt, limit in zip(request["prompts"], request["limits"], strict=True):
            time.sleep(request["pace_s"])
            made.append(answer(prompt, limit, request["weights"]))
        print(json.dumps(made), flush=True)


if __name__ == "__main__":
    main()
