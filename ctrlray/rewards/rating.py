"""From a judge's words to its rating. Pure; how the rating is asked for is the judge's business."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_N = r"(?<![^\W_])(?<!\d[.,])[-+−]?(?:\d+(?:[.,]\d+)*|(?<![.,])[.,]\d+)(?![.,]?\d|[^\W_])"
"""A number that stands alone: not the 2 of `2nd` or the 4 of `v4`."""
_READ = re.compile(
    rf"(?P<low>{_N})\s*(?:[-–—]|\.\.\.?|to\b|and\b)\s*(?P<high>{_N})"
    rf"|(?P<part>{_N})[\s*_`]*(?:/|out of\b|of\b)\s*(?P<whole>{_N})"
    rf"|(?:/|\bout of\b)\s*(?P<top>{_N})"
    rf"|(?P<number>{_N})",
    re.IGNORECASE,
)
_NAMED = re.compile(r"(?<![^\W_])(?:rating|score)[\W_]*(?:\b(?:is|of|as|at|be|would|a|an)\b[\W_]*)*$", re.IGNORECASE)
"""What stands between the word and its number, in `Rating: 7`, `**Rating** - 7` and `my score would be a 7`."""
_NEAR = 80
"""Characters before a number in which its word is looked for."""
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2},\d{3}")


class _Value(NamedTuple):
    value: float
    start: int
    end: int


def read_rating(text: str, lowest: float, highest: float, *, cut: bool = False) -> float:
    """The rating in a judge's text; NaN when there is none, when it is off the scale, or when it cannot be told what is meant.

    It is the last number that follows the word `rating` or `score`, else the last number in the last line that holds one.
    `1,5` is 1.5. The scale itself (`1-10`, `1 to 10`, `out of 10`) is passed over, and 7 is read from `7/10` or `7 out of 10`.
    Not told: a fraction of another scale, any other range (`7-8`), `1,000`. Of a text that was `cut` off only a number after
    one of the words counts, and not at the very end, where digits may be missing.
    """
    lines = [_values(line, lowest, highest) for line in text.splitlines()]
    last = len(lines) - 1
    for at in range(last, -1, -1):
        line, values = lines[at]
        for value in reversed(values):
            if _NAMED.search(line[max(0, value.start - _NEAR) : value.start]):
                unfinished = cut and at == last and not line[value.end :].strip(" .,/")
                return math.nan if unfinished else _on_scale(value.value, lowest, highest)
    held = [values for _, values in lines if values]
    return math.nan if cut or not held else _on_scale(held[-1][-1].value, lowest, highest)


def _values(line: str, lowest: float, highest: float) -> tuple[str, list[_Value]]:
    """A line with mentions of the scale blanked out, and what else is a number in it; NaN where it cannot be told which."""
    shown, values = list(line), []
    for match in _READ.finditer(line):
        found = {name: _number(text) for name, text in match.groupdict().items() if text is not None}
        start, end = match.span()
        if (found.get("low"), found.get("high")) == (lowest, highest) or found.get("top") == highest:
            shown[start:end] = " " * (end - start)
        elif found.get("whole") == highest:
            values.append(_Value(found["part"], start, end))
        else:
            values.append(_Value(found.get("number", math.nan), start, end))
    return "".join(shown), values


def _number(text: str) -> float:
    plain = text.replace("−", "-")
    if plain.count(".") + plain.count(",") > 1 or _THOUSANDS.fullmatch(plain):
        return math.nan
    return float(plain.replace(",", "."))


def _on_scale(value: float, lowest: float, highest: float) -> float:
    return value if lowest <= value <= highest else math.nan
