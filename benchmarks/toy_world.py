"""A toy world in which perfect control is known: 24 words, and two attributes that are frequencies of two classes of words.

An answer has 18 words: 0 to 9 red ones, 0 to 9 blue ones, the rest grey, in any order. The prompt, `w3 w0 w6`, says which red,
which blue and which grey word is its favourite; so answers must heed the prompt as well as the code. In the pool both counts
are uniform, and with probability `entanglement` the blue count is a copy of the red one: the attributes then correlate
*positively*, by exactly that number, yet each combination still occurs in answers that nothing forbids.

It lives beside the benchmark rather than in tests/, so that imports point one way: tests use benchmarks. Shape key: N rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ctrlray import config, schema
from ctrlray.control import ControlSpace
from ctrlray.schema import Message

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PAD, END, USER, ASSISTANT = range(4)
PROMPT_WORDS = range(4, 12)
CLASSES = {"red": range(12, 16), "blue": range(16, 20), "grey": range(20, 24)}
NUM_WORDS = 24
ATTRIBUTES = ("red", "blue")
MOST = 9
"""Most words of one coloured class in the pool's answers."""
LENGTH = 2 * MOST
FAVOURITE = 0.7
"""Probability that a word of a class is the one that the prompt favours; its other words share the rest."""


@dataclass(frozen=True)
class ToyWorld:
    """Prompts, answers and rewards of one seed."""

    seed: int
    entanglement: float = 0.0
    """Pearson correlation of the pool's two attributes, 0 to 0.9."""
    levels: int = 5
    """Levels of each attribute; they divide the ten counts evenly."""
    num_prompts: int = 256
    num_eval: int = 32
    """Further prompts, held out for evaluation."""
    samples: int = 8
    """The pool's answers per prompt."""

    @property
    def control(self) -> config.Control:
        """The job file's view of the two dials."""
        return config.Control(attributes=tuple(config.Attribute(name=a, levels=self.levels) for a in ATTRIBUTES))

    @property
    def space(self) -> ControlSpace:
        """The grid of settings."""
        return ControlSpace.of(self.control)

    def prompts(self) -> tuple[list[list[Message]], list[list[Message]]]:
        """Conversations for training and, all different, for evaluation."""
        size = len(PROMPT_WORDS)
        chosen = random.Random(f"prompts:{self.seed}").sample(range(size**3), self.num_prompts + self.num_eval)
        texts = [f"w{i // size**2} w{i // size % size} w{i % size}" for i in chosen]
        messages = [[Message(role="user", content=t)] for t in texts]
        return messages[: self.num_prompts], messages[self.num_prompts :]

    def render(self, messages: Sequence[Message], levels: Sequence[int] | None = None) -> list[int]:
        """Token ids of a prompt up to and including the code; without levels, of the plain prompt."""
        words = [PROMPT_WORDS[i] for i in _numbers_of(messages)]
        names = self.space.code(levels) if levels is not None else ""
        code = [NUM_WORDS + i for i, token in enumerate(self.space.tokens) if token in names]
        return [USER, *words, ASSISTANT, *code]

    def pool_counts(self, num_rows: int, rng: np.random.Generator) -> Ints:
        """counts_N2 of red and blue words. Cov(red, blue) = e Var(red) and both are uniform, so their correlation is e."""
        red_N, other_N = rng.integers(0, MOST + 1, (2, num_rows))
        blue_N = np.where(rng.random(num_rows) < self.entanglement, red_N, other_N)
        return np.column_stack([red_N, blue_N])

    def perfect_counts(self, levels: Sequence[int], rng: np.random.Generator) -> Ints:
        """Counts of an answer under perfect control: as in the pool, given that both levels are the requested ones."""
        width = (MOST + 1) // self.levels
        return np.array([rng.integers((level - 1) * width, level * width) for level in levels])

    def answer(self, messages: Sequence[Message], counts: Sequence[int], rng: np.random.Generator) -> list[int]:
        """Token ids of one answer with these counts of red and blue words, its end included."""
        red, blue = (int(c) for c in counts)
        kinds = rng.permutation(["red"] * red + ["blue"] * blue + ["grey"] * (LENGTH - red - blue))
        favourites = favourite_words(messages)
        return [_word(CLASSES[k], favourites[k], rng) for k in kinds] + [END]

    def pool(self) -> pa.Table:
        """Scored answers to the training prompts, as the score stage leaves them."""
        rng = np.random.default_rng((self.seed, 1))
        prompts = [messages for messages in self.prompts()[0] for _ in range(self.samples)]
        counts_N2 = self.pool_counts(len(prompts), rng)
        answers = [self.answer(m, c, rng) for m, c in zip(prompts, counts_N2, strict=True)]
        ids = [schema.prompt_id(m) for m in prompts]
        columns = {
            "response_id": [schema.response_id(p, "toy", i % self.samples, f"toy{self.seed}") for i, p in enumerate(ids)],
            "prompt_id": ids,
            "messages": pa.array(prompts, schema.MESSAGES),
            "text": [text_of(a) for a in answers],
            "token_ids": pa.array(answers, schema.TOKENS),
            "finish_reason": ["stop"] * len(ids),
        }
        scores_N2 = rewards(answers)
        return pa.table(columns | {f"score_{a}": scores_N2[:, i] for i, a in enumerate(ATTRIBUTES)})


def rewards(answers: Sequence[Sequence[int]]) -> Floats:
    """scores_N2: share of red and of blue words among an answer's words, its end not counted; 0 for an empty answer."""
    words = [[t for t in answer if t != END] for answer in answers]
    shares = [[sum(t in CLASSES[a] for t in w) / max(1, len(w)) for a in ATTRIBUTES] for w in words]
    return np.array(shares, np.float64).reshape(-1, len(ATTRIBUTES))


def text_rewards(prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> dict[str, list[float]]:
    """The same of texts, as a job's function reward."""
    words = [text.split() for text in responses]
    return {a: [sum(w.startswith(a) for w in ws) / max(1, len(ws)) for ws in words] for a in ATTRIBUTES}


def favourite_words(messages: Sequence[Message]) -> dict[str, int]:
    """The prompt's favourite word of each class."""
    return {kind: words[i % len(words)] for (kind, words), i in zip(CLASSES.items(), _numbers_of(messages), strict=True)}


def favourite_share(messages: Sequence[Message], answer: Sequence[int]) -> float:
    """Share of the answer's words that are the prompt's favourites; `FAVOURITE` on average in the world's own answers."""
    words = [t for t in answer if t != END]
    return sum(t in favourite_words(messages).values() for t in words) / max(1, len(words))


def perfect_error(levels: int) -> float:
    """MAE in level units of a model that answers like the pool at the requested levels.

    A count c has units 0.5 + L (c + 0.5) / 10, so with five levels each holds two counts at a quarter on either side.
    """
    counts = np.arange(MOST + 1)
    units, width = 0.5 + levels * (counts + 0.5) / (MOST + 1), (MOST + 1) // levels
    return float(np.abs(units - (counts // width + 1)).mean())


def text_of(answer: Sequence[int]) -> str:
    """Token ids as words, for the tables: `red0 grey3 blue1`."""
    names = {t: f"{kind}{t - words[0]}" for kind, words in CLASSES.items() for t in words}
    return " ".join(names.get(t, f"<{t}>") for t in answer if t != END)


def _word(words: range, favourite: int, rng: np.random.Generator) -> int:
    others = [w for w in words if w != favourite]
    return favourite if rng.random() < FAVOURITE else others[rng.integers(len(others))]


def _numbers_of(messages: Sequence[Message]) -> Iterator[int]:
    return (int(word[1:]) for word in messages[-1]["content"].split())
