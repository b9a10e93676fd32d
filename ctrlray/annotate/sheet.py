"""What raters get, as a page and as a sheet, made of nothing but what they may know.

The page is one HTML file that opens no connection: its policy runs the one script and applies the one style that are
hashed here. Prompts and answers are untrusted text: the template escapes everything, and the script only sets text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ctrlray.pages import asset, environment, policy_hash
from ctrlray.schema import Message

TEMPLATE, SCRIPT, STYLE = "annotate.html.j2", "annotate.js", "annotate.css"
POLICY = "default-src 'none'; script-src {script}; style-src {style}; base-uri 'none'; form-action 'none'"
CHOICES = {"A": "A", "B": "B", "tie": "Tie", "skip": "Skip"}
"""Choices as they are kept, and as they are shown."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Item:
    """One comparison."""

    item_id: str
    prompt: Sequence[Message]
    a: str
    b: str


@dataclass(frozen=True)
class Sheet:
    """A study without its key."""

    study: str
    """Its identity, which answers carry."""
    attributes: Sequence[tuple[str, str]]
    """Names with their definitions."""
    items: Sequence[Item]


def page(sheet: Sheet) -> str:
    """The page as text that UTF-8 can always hold."""
    script, style = asset(SCRIPT), asset(STYLE)
    policy = POLICY.format(script=policy_hash(script), style=policy_hash(style))
    given = {"sheet": sheet, "choices": CHOICES, "policy": policy, "script": Markup(script), "style": Markup(style)}
    text = environment().get_template(TEMPLATE).render(given)
    return text.encode("utf-8", "replace").decode("utf-8")


def sheet_csv(sheet: Sheet) -> str:
    """One row per item with an empty column per attribute; a text that a spreadsheet would run gets an apostrophe before it."""
    names = [name for name, _ in sheet.attributes]
    rows = [["study", "rater", "item_id", "prompt", "answer_a", "answer_b", *names]]
    for item in sheet.items:
        prompt = "\n\n".join(f"{m['role']}: {m['content']}" for m in item.prompt)
        rows.append([sheet.study, "", item.item_id, *map(_plain, (prompt, item.a, item.b)), *("" for _ in names)])
    return csv_text(rows)


def csv_text(rows: Iterable[Sequence[str]]) -> str:
    """Rows as a csv file that UTF-8 can always hold."""
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode("utf-8", "replace").decode("utf-8")


def _plain(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text
