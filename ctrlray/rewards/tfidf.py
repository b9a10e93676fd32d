"""A reward without a neural network: linear heads on TF-IDF n-grams of the answer. numpy and scipy only; the fit is elsewhere.

It reads the answer and not the question, so it compares answers to one prompt better than answers to different ones.
N-grams are kept as 32-bit hashes: none of the words of the labelled dialogues are in a file of these heads.

Shape key: A attributes, V n-grams of the vocabulary, N answers.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from ctrlray.errors import ConfigError
from ctrlray.rewards.base import Floats
from ctrlray.schema import Message

FORMAT = 1
NOTE = "ctrlray.tfidf"
PACKAGED = "tfidf-hh.safetensors"
STEPS = 127
"""Largest weight of a head, in the steps that weights are stored in."""
_TOKEN = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
_ARRAYS = ("hashes", "counts", "weights", "scale", "bias")


def packaged_heads() -> Path:
    """The heads that ship with ctrlray, made for held-out judges: helpfulness and harmlessness."""
    return Path(str(resources.files("ctrlray") / "assets" / "heads" / PACKAGED))


def grams(text: str, words: Sequence[int], chars: Sequence[int]) -> Iterator[str]:
    """N-grams of words and punctuation marks, and of the characters of each of them, case aside.

    "Go on." with words (1, 2) and chars (3,) gives `w go`, `w on`, `w .`, `w go on`, `w on .`, `c <go`, `c go>`, `c <on`,
    `c on>`, `c <.>`: `<` and `>` mark a word's ends, and a word that is shorter than the n-gram gives itself.
    """
    tokens = _TOKEN.findall(text.lower().replace("\u2019", "'"))
    for n in words:
        yield from ("w " + " ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    for n in chars:
        for marked in (f"<{t}>" for t in tokens):
            yield from ("c " + marked[i : i + n] for i in range(max(1, len(marked) - n + 1)))


def hashed(text: str, words: Sequence[int], chars: Sequence[int]) -> Counter[int]:
    """How often each n-gram stands in a text, by the CRC-32 of its UTF-8."""
    return Counter(zlib.crc32(g.encode("utf-8", "surrogatepass")) for g in grams(text, words, chars))


@dataclass(frozen=True)
class Vocabulary:
    """The n-grams that count, and in how many answers each of them was found."""

    words: tuple[int, ...]
    chars: tuple[int, ...]
    hashes: npt.NDArray[np.uint32]  # [V], rising
    counts: npt.NDArray[np.uint32]  # [V]
    num_answers: int

    @classmethod
    def of(cls, texts: Sequence[str], words: Sequence[int], chars: Sequence[int], min_count: int) -> Vocabulary:
        """Every n-gram that at least `min_count` of the answers have."""
        found: Counter[int] = Counter()
        for text in texts:
            found.update(hashed(text, words, chars).keys())
        kept = sorted(h for h, n in found.items() if n >= min_count)
        return cls(
            tuple(words), tuple(chars), np.array(kept, np.uint32), np.array([found[h] for h in kept], np.uint32), len(texts)
        )

    @cached_property
    def _columns(self) -> dict[int, int]:
        return {int(h): i for i, h in enumerate(self.hashes)}

    @cached_property
    def _idf(self) -> npt.NDArray[np.float64]:
        """[V], ln((1 + answers) / (1 + answers that have it)) + 1 (Salton and Buckley 1988, smoothed as in scikit-learn)."""
        return np.asarray(np.log((1 + self.num_answers) / (1 + self.counts.astype(np.float64))) + 1)

    def vectors(self, texts: Sequence[str]) -> Any:
        """Sparse rows [N, V] of (1 + ln count) x idf, each of length 1; zeros for a text with no known n-gram."""
        starts, columns, values = [0], [], []
        for text in texts:
            known = sorted((self._columns[h], n) for h, n in hashed(text, self.words, self.chars).items() if h in self._columns)
            at = np.array([c for c, _ in known], np.int64)
            row = (1 + np.log([n for _, n in known])) * self._idf[at] if known else np.zeros(0)
            columns.append(at)
            values.append(row / (np.sqrt(np.sum(row**2)) or 1.0))
            starts.append(starts[-1] + len(at))
        flat = [np.concatenate(parts) if parts else np.zeros(0) for parts in (values, columns)]
        return sparse.csr_matrix((flat[0], flat[1].astype(np.int64), starts), shape=(len(texts), len(self.hashes)))


@dataclass(frozen=True)
class TfidfHeads:
    """`score = vectors @ (weights * scale).T + bias`; weights are whole steps of a scale, small to ship and sure to repeat."""

    attributes: tuple[str, ...]
    vocabulary: Vocabulary
    weights: npt.NDArray[np.int8]  # [A, V]
    scale: Floats  # [A]
    bias: Floats  # [A]

    @classmethod
    def of(cls, attributes: Sequence[str], vocabulary: Vocabulary, weights: npt.NDArray[np.float64], centre: Any) -> TfidfHeads:
        """Heads of fitted weights [A, V], rounded to whole steps; scores have mean 0 over the answers `centre` [N, V]."""
        scale = (np.maximum(np.abs(weights).max(axis=1), 1e-12) / STEPS).astype(np.float32)
        steps = np.rint(weights / scale[:, None]).clip(-STEPS, STEPS).astype(np.int8)
        raw = cls(tuple(attributes), vocabulary, steps, scale, np.zeros(len(scale), np.float32))
        return replace(raw, bias=-raw.score(centre).astype(np.float64).mean(axis=0).astype(np.float32))

    def score(self, features: Any) -> Floats:
        """Scores [N, A], float32, in log-odds of preference, of rows [N, V] that `vocabulary.vectors` made."""
        weights = self.weights.astype(np.float64) * self.scale[:, None]
        return np.asarray(features @ weights.T + self.bias, np.float32)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose metadata holds everything but the arrays."""
        from safetensors.numpy import save

        v = self.vocabulary
        found = (v.hashes, v.counts, self.weights, self.scale, self.bias)
        meta = {"attributes": self.attributes, "words": v.words, "chars": v.chars, "num_answers": v.num_answers}
        # One JSON value: a header with several keys is written in an order that changes from process to process.
        note = json.dumps({"format": FORMAT, **meta}, sort_keys=True)
        arrays = {name: np.ascontiguousarray(array) for name, array in zip(_ARRAYS, found, strict=True)}
        Path(path).write_bytes(save(arrays, metadata={NOTE: note}))

    @classmethod
    def load(cls, path: str | Path) -> TfidfHeads:
        """Read what `save` wrote; ConfigError when the file is not one of this format."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                meta = json.loads((file.metadata() or {})[NOTE])
                hashes, counts, weights, scale, bias = (file.get_tensor(k) for k in _ARRAYS)
            if meta["format"] != FORMAT:
                raise ConfigError(f"{path} has another format; make the heads again with this version")
            vocabulary = Vocabulary(tuple(meta["words"]), tuple(meta["chars"]), hashes, counts, int(meta["num_answers"]))
            return cls(tuple(meta["attributes"]), vocabulary, weights, scale, bias)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is not a file of tfidf heads ({error}); `ctrlray reward train` makes one") from error


def is_tfidf(path: str | Path) -> bool:
    """Whether a heads file is one of these, by its header; False where there is none."""
    file = Path(path)
    if not file.is_file():
        return False
    with file.open("rb") as data:  # the format: length of a JSON header, the header, the tensors
        size = int.from_bytes(data.read(8), "little")
        return f'"{NOTE}"'.encode() in data.read(min(size, 1 << 20))


class TfidfScorer:
    """A Scorer; see `ctrlray.rewards.base`."""

    def __init__(self, path: str | Path | None = None) -> None:
        self._heads = TfidfHeads.load(path or packaged_heads())

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the heads."""
        return self._heads.attributes

    def __call__(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> dict[str, Floats]:
        """Scores in log-odds of preference, float32 [len(responses)] per attribute."""
        scores = self._heads.score(self._heads.vocabulary.vectors(responses))
        return {a: scores[:, i] for i, a in enumerate(self.attributes)}
