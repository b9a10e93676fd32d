"""The report's alarms: those of the run, those that the page itself can tell, and what each suggests to try next."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ctrlray.stages.report_numbers import number
from ctrlray.stages.report_tables import unaccounted

ADVICE = {
    "settings-do-not-change-the-output": (
        "Train longer, raise train.control_rate or the objective's weight, and look at the code gap: "
        "as long as it is zero, the model does not read its code."
    ),
    "answers-collapse-to-the-extremes": (
        "Use a milder strategy (distill.strategy: balance), a larger distill.outer, or fewer levels; "
        "look at the sample answers for one that repeats itself."
    ),
    "empty-cell": ("Sample more answers (generate.samples), add behaviours that reach this cell, or ask for fewer levels."),
    "cells-unbalanced-after-balance": (
        "Raise generate.samples or lower distill.max_examples, so that every cell has rows enough."
    ),
    "ledger-does-not-balance": (
        "Rows went missing without a reason: do not trust this run's numbers; look at the tables of the stage "
        "that is named, and report it as a bug."
    ),
    "reward-and-judge-part": (
        "Reward hacking: raise the objective's kl.coefficient or train for fewer steps, and read answers of the last ones."
    ),
    "most-answers-truncated": "Raise sampling.max_tokens, or add a behaviour that asks for short complete answers.",
}
"""What to try next, by alarm. Names match in any case, with spaces, dashes or underscores."""


def alarms_of(
    alarms: Sequence[Mapping[str, Any]], ledger: Sequence[Mapping[str, Any]], hacking: Mapping[str, Any]
) -> list[dict[str, str]]:
    """The run's alarms with advice, worst first, with more for stages whose rows do not add up and for reward hacking."""
    found = [dict(a) for a in alarms]
    for method in (m for m, course in hacking.items() if course["alarm"]):
        detail = f"{method}: the training reward rose while the judge's reward of the same answers fell."
        found.append({"name": "reward and judge part", "severity": "warning", "detail": detail})
    for stage in ledger:
        missing = unaccounted(stage)
        if missing:
            how = f"{number(abs(missing))} rows {'are unaccounted for' if missing > 0 else 'appear from nowhere'}"
            detail = f"{stage.get('stage')}: {how}."
            found.append({"name": "ledger does not balance", "severity": "error", "detail": detail})
    order = {"error": 0, "warning": 1, "info": 2}
    shown = [
        {
            "name": str(a.get("name", "unnamed")).replace("_", " "),
            "severity": a["severity"] if a.get("severity") in order else "warning",
            "detail": str(a.get("detail") or ""),
            "advice": str(a.get("advice") or advice(str(a.get("name", "")))),
        }
        for a in found
    ]
    return sorted(shown, key=lambda a: order[a["severity"]])


def advice(name: str) -> str:
    """What to try after an alarm; empty when nothing is known about it."""
    return ADVICE.get(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), "")
