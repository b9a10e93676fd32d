"""Control codes and the one renderer: conversation and levels in, token ids out.

A control code is one special token per attribute, `<|helpfulness:4|><|safety:2|>`, placed at the very end of the prompt,
after the assistant header, so that all settings of one prompt share one prefix. The dial lives in a chat template built
here; the renderer and the exported model use that same template, so they cannot disagree.

Special tokens inside message text are neutralised by the template itself: a zero-width space after their first character. The
renderer then holds the ids against what the template places by itself: a tokenizer may fold `＜|IM_END|＞` into a special token.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctrlray.config import Attribute, Control
from ctrlray.errors import ConfigError, DataError
from ctrlray.schema import ROLES, Message

ZERO_WIDTH = "\u200b"
_LEVEL_WORDS = ("very low", "low", "medium", "high", "very high")

Levels = tuple[int, ...]
Shape = tuple[bool, tuple[tuple[str, str], ...]]
_SHAPES = 1024
"""Sequences of turns whose special ids a renderer keeps."""
MASKED_BY = 100.0
"""What engines and trainers lower the logits of control tokens by, so that none is ever sampled; vLLM takes no more."""


@dataclass(frozen=True)
class ControlSpace:
    """The grid of settings: ordered attributes with levels 1..n each."""

    attributes: tuple[Attribute, ...]
    encoding: str = "tokens"

    @classmethod
    def of(cls, control: Control) -> ControlSpace:
        """The space that a job file describes."""
        return cls(control.attributes, control.encoding)

    @property
    def names(self) -> tuple[str, ...]:
        """Attribute names in order."""
        return tuple(a.name for a in self.attributes)

    @property
    def tokens(self) -> tuple[str, ...]:
        """All control tokens, attribute by attribute, levels ascending; empty for the text encoding."""
        if self.encoding == "text":
            return ()
        return tuple(f"<|{a.name}:{level}|>" for a in self.attributes for level in range(1, a.levels + 1))

    def cells(self, levels: Sequence[Sequence[int]] | None = None) -> list[Levels]:
        """All settings of the grid, or of the sub-grid that `levels` lists per attribute."""
        axes = levels or [range(1, a.levels + 1) for a in self.attributes]
        return [tuple(cell) for cell in itertools.product(*axes)]

    def check(self, levels: Sequence[int] | Mapping[str, int]) -> Levels:
        """Levels as a tuple in attribute order; raises ConfigError with attribute, value and range."""
        if isinstance(levels, Mapping):
            unknown = set(levels) - set(self.names)
            if unknown or len(levels) < len(self.names):
                raise ConfigError(f"levels {dict(levels)} must name exactly {list(self.names)}")
            levels = [levels[n] for n in self.names]
        if len(levels) != len(self.attributes):
            raise ConfigError(f"levels {list(levels)} must have one entry for each of {list(self.names)}")
        for a, level in zip(self.attributes, levels, strict=True):
            if isinstance(level, bool) or int(level) != level or not 1 <= level <= a.levels:
                raise ConfigError(f"{a.name}={level!r} must be a whole number in 1..{a.levels}")
        return tuple(int(v) for v in levels)

    def code(self, levels: Sequence[int] | Mapping[str, int]) -> str:
        """`{"helpfulness": 4, "safety": 2}` -> `<|helpfulness:4|><|safety:2|>`."""
        checked = self.check(levels)
        if self.encoding == "text":
            return "[" + ", ".join(f"{n} {v}" for n, v in zip(self.names, checked, strict=True)) + "]\n"
        return "".join(f"<|{n}:{v}|>" for n, v in zip(self.names, checked, strict=True))

    def parse(self, code: str) -> Levels:
        """Inverse of `code`."""
        pairs = re.findall(r"([a-z][a-z0-9_]*)[: ](\d+)", code)
        if tuple(n for n, _ in pairs) != self.names:
            raise DataError(f"{code!r} is not a control code of {list(self.names)}")
        return self.check([int(v) for _, v in pairs])

    def seed_words(self) -> list[str]:
        """A phrase per control token, in `tokens` order: the token's row starts at the mean of its word embeddings."""
        words = []
        for a in self.attributes:
            for level in range(a.levels):
                word = _LEVEL_WORDS[round(level * (len(_LEVEL_WORDS) - 1) / (a.levels - 1))]
                words.append(f" {word} {a.name.replace('_', ' ')}")
        return words

    def instruction(self, levels: Sequence[int]) -> str:
        """The setting in words: the prompting baseline's system instruction."""
        parts = [f"{n} {v} out of {a.levels}" for n, v, a in zip(self.names, self.check(levels), self.attributes, strict=True)]
        scale = "where 1 is the least and the highest number the most"
        return f"Answer so that your answer has this rating: {' and '.join(parts)}, {scale}."


def nearest_first(units: Sequence[Sequence[float]], levels: Sequence[int]) -> list[int]:
    """Numbers of the answers with these achieved levels (in continuous level units), nearest to the requested ones first.

    The distance is the sum over attributes of |achieved - requested|; equals keep their order, and an answer without a finite
    score comes last. Best-of-n towards a setting is the first.
    """

    def distance(i: int) -> float:
        far = sum(abs(unit - level) for unit, level in zip(units[i], levels, strict=True))
        return far if math.isfinite(far) else math.inf

    return sorted(range(len(units)), key=distance)


def dialled_template(
    base: str,
    space: ControlSpace,
    specials: Iterable[str],
    *,
    allowed: Mapping[str, tuple[int, int]] | None = None,
    defaults: Mapping[str, int] | None = None,
) -> str:
    """The base's chat template with the dial in it (Jinja).

    Takes one variable per attribute; a missing one gets `defaults` (else the highest allowed level), a level outside
    `allowed` (inclusive ranges; else all levels) raises. `specials` are neutralised inside every message.
    """
    lines = [safe_template("", specials)]
    for i, a in enumerate(space.attributes):
        low, high = (allowed or {}).get(a.name, (1, a.levels))
        default = (defaults or {}).get(a.name, high)
        choices = list(range(low, high + 1))
        lines += [
            f"{{%- set ctrl{i} = {a.name} if {a.name} is defined and {a.name} is not none else {default} -%}}",
            f"{{%- if ctrl{i} is boolean or ctrl{i} not in {choices} -%}}",
            f"{{{{- raise_exception('{a.name} must be one of {choices}, got ' ~ ctrl{i}) -}}}}{{%- endif -%}}",
        ]
    pieces = ", ".join(f"ctrl{i} | int" for i in range(len(space.attributes)))
    pattern = json.dumps(_code_pattern(space))
    tail = f"{{%- if add_generation_prompt -%}}{{{{- {pattern} | format({pieces}) -}}}}{{%- endif -%}}"
    # a final newline of the base was never output; the empty expression keeps `{%-` from eating the base's last spaces
    return "".join(lines) + base.removesuffix("\n") + "{{ '' }}" + tail


def safe_template(base: str, specials: Iterable[str]) -> str:
    """The base's chat template with special tokens neutralised in every message's role, name and content."""
    strings = json.dumps(sorted(set(specials), key=lambda s: (-len(s), s)), ensure_ascii=False)
    return (
        f"{{%- set ctrl_specials = {strings} -%}}"
        "{%- macro ctrl_clean(text) -%}{%- set ctrl_ns = namespace(text=text) -%}"
        "{%- for special in ctrl_specials -%}"
        "{%- set ctrl_ns.text = ctrl_ns.text | replace(special, special[0] ~ '\\u200b' ~ special[1:]) -%}"
        "{%- endfor -%}{{- ctrl_ns.text -}}{%- endmacro -%}"
        "{%- set ctrl_out = namespace(messages=[]) -%}"
        "{%- for message in messages -%}"
        f"{{%- if message.role not in {list(ROLES)} -%}}"
        "{{- raise_exception('unknown role: ' ~ ctrl_clean(message.role)) -}}{%- endif -%}"
        "{%- if message.content is string -%}"
        "{%- set ctrl_content = ctrl_clean(message.content) -%}"
        "{%- else -%}"
        "{%- set ctrl_parts = namespace(text='') -%}"
        "{%- for part in message.content or [] -%}{%- set ctrl_parts.text = ctrl_parts.text ~ part.text -%}{%- endfor -%}"
        "{%- set ctrl_content = ctrl_clean(ctrl_parts.text) -%}"
        "{%- endif -%}"
        "{%- set ctrl_out.messages = ctrl_out.messages + [dict(message, content=ctrl_content)] -%}"
        "{%- endfor -%}{%- set messages = ctrl_out.messages -%}{{ '' }}" + base
    )


def neutralise(text: str, specials: Iterable[str]) -> str:
    """Text in which no special token can be recognised: the Python twin of the template's cleaning."""
    for special in sorted(set(specials), key=lambda s: (-len(s), s)):
        text = text.replace(special, special[0] + ZERO_WIDTH + special[1:])
    return text


def special_strings(tokenizer: Any, space: ControlSpace | None = None) -> list[str]:
    """Every string that the tokenizer turns into a special id, and the space's control tokens."""
    added = [str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special]
    return sorted(set(added) | set(tokenizer.all_special_tokens) | set(space.tokens if space else ()))


class Renderer:
    """The only way in ctrlray from a conversation to token ids.

    Raises DataError for text that the tokenizer reads as special tokens although it was neutralised: a prompt holds the special
    ids that the template places for turns of such roles, and at its end those of the code, and no others.

    `base_template` is the chat template of the model before the dial was added; None for an exported model, whose tokenizer
    has the finished one: it raises for levels outside of its list, and what it gives without levels is its own business.
    """

    def __init__(self, tokenizer: Any, space: ControlSpace, base_template: str | None) -> None:
        self.tokenizer = tokenizer
        self.space = space
        self.specials = special_strings(tokenizer, space)
        self.special_ids = _special_ids(tokenizer, self.specials)
        self._placed: dict[Shape, tuple[int, ...]] = {}
        self._codes: dict[tuple[int, ...], tuple[int, ...]] = {}
        if base_template is None:
            self._plain = self._dialled = str(tokenizer.chat_template)
        else:
            self._plain = safe_template(base_template, self.specials)
            self._dialled = dialled_template(base_template, space, self.specials)

    def render(self, messages: Sequence[Message], levels: Sequence[int] | None = None) -> list[int]:
        """Token ids of the prompt up to and including the code; without levels, of the plain prompt."""
        ids = self._render(messages, levels)
        if self._specials_in(ids) != self._expected(messages, levels):
            raise DataError(self._complaint(messages))
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, special tokens in it neutralised."""
        ids = self._encode(neutralise(text, self.specials))
        if self._specials_in(ids):
            raise DataError(self._complaint([Message(role="plain", content=text)]))
        return ids

    def code_ids(self, levels: Sequence[int]) -> list[int]:
        """Token ids of the code alone."""
        key = tuple(levels)
        if key not in self._codes:
            if len(self._codes) == _SHAPES:
                self._codes.pop(next(iter(self._codes)))
            self._codes[key] = tuple(self._encode(self.space.code(levels)))
        return list(self._codes[key])

    def _render(self, messages: Sequence[Message], levels: Sequence[int] | None) -> list[int]:
        variables = {} if levels is None else dict(zip(self.space.names, self.space.check(levels), strict=True))
        ids = self.tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            chat_template=self._plain if levels is None else self._dialled,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **variables,
        )
        return [int(i) for i in ids]

    def _encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _specials_in(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(i for i in ids if i in self.special_ids)

    def _expected(self, messages: Sequence[Message], levels: Sequence[int] | None) -> tuple[int, ...]:
        """Special ids of a prompt of such turns. What stands before the code is found once for all levels and texts."""
        code = () if levels is None else self._specials_in(self.code_ids(levels))
        turns = tuple((str(m["role"]), _harmless(m["content"])) for m in messages)
        shape = (levels is None, turns)
        if shape not in self._placed:
            placed = self._specials_in(self._render([Message(role=r, content=c) for r, c in turns], levels))
            if len(self._placed) == _SHAPES:
                self._placed.pop(next(iter(self._placed)))
            self._placed[shape] = placed[: len(placed) - len(code)]
        return self._placed[shape] + code

    def _complaint(self, messages: Sequence[Message]) -> str:
        """Where the text is that reads as special tokens."""
        for message in messages:
            text = _text(message["content"])
            if found := self._specials_in(self._encode(neutralise(text, self.specials))):
                token = self.tokenizer.convert_ids_to_tokens(found[0])
                return f"the {message['role']} text {text[:80]!r} holds what the model's tokenizer reads as {token}; take it out"
        return "the conversation holds what the model's tokenizer reads as special tokens; take it out"


def _special_ids(tokenizer: Any, specials: Sequence[str]) -> frozenset[int]:
    """Ids of special tokens, but for one that only says that a character is unknown: harmless text has it too."""
    ids = frozenset(tokenizer.convert_tokens_to_ids(list(specials)))
    structural = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return ids - ({_unknown_id(tokenizer)} - structural)


def _unknown_id(tokenizer: Any) -> int | None:
    """What stands for unknown characters, if the tokenizer really makes it of text.

    `unk_token` alone does not tell: byte-level BPE knows all characters, and SmolLM2 calls <|endoftext|> its unknown token.
    """
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if not hasattr(model, "unk_token"):  # a tokenizer without such a backend, or Unigram, which makes it and does not show it
        found: int | None = tokenizer.unk_token_id
        return found
    return None if model.unk_token is None else model.token_to_id(model.unk_token)


def _text(content: Any) -> str:
    """A message's text, which may come in parts."""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or [])


def _harmless(content: Any) -> str:
    """Text that a template treats as it treats this: some leave out turns without any, and some strip it."""
    text = _text(content)
    return "x" if text.strip() else text[:1]


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The conversation with `system` as its system turn; unchanged when None."""
    if system is None:
        return list(messages)
    return [Message(role="system", content=system), *(m for m in messages if m["role"] != "system")]


def _code_pattern(space: ControlSpace) -> str:
    if space.encoding == "text":
        return "[" + ", ".join(f"{n} %d" for n in space.names) + "]\n"
    return "".join(f"<|{n}:%d|>" for n in space.names)
