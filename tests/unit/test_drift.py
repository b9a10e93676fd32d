"""How far answers went from the base, worked by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from ctrlray import schema
from ctrlray.engine.engine import _logp_at_end
from ctrlray.metrics.drift import kl_base, kl_by_method
from ctrlray.tables import from_rows


def test_kl_to_the_base_by_hand():
    """Prompt a twice as likely in each answer (ln 2), b half as likely as the base has it: (ln 2 + ln 2 - ln 2) / 3."""
    logp = [math.log(0.5), math.log(0.2), math.log(0.1)]
    base = [math.log(0.25), math.log(0.1), math.log(0.2)]
    found = kl_base(logp, base, ["a", "a", "b"], 500, 0)
    assert found.value == pytest.approx(math.log(2) / 3)
    # draws of two prompts: twice a gives ln 2, twice b -ln 2
    assert (found.low, found.high) == pytest.approx((-math.log(2), math.log(2)))


def test_each_method_by_itself():
    def row(method, logp, base):
        return {"grid_id": "g", "prompt_id": "p", "method": method, "logp": logp, "base_logp": base}

    table = from_rows([row("exmate", -1.0, -4.0), row("clm", -2.0, -2.5), row("exmate", -3.0, -4.0)], schema.drift())
    found = kl_by_method(table, 50, 0)
    assert {m: v["value"] for m, v in found.items()} == {"clm": 0.5, "exmate": 2.0}


def test_a_table_without_rows_has_no_kl():
    assert kl_by_method(schema.drift().empty_table(), 50, 0) == {}


def test_the_last_tokens_of_a_prompt_are_the_answer():
    """vLLM gives a mapping for each prompt token, none for the first; others than the token's own may stand in it."""
    steps = [None, *({t: SimpleNamespace(logprob=-t / 8), 99: SimpleNamespace(logprob=0.0)} for t in (1, 2, 3))]
    assert _logp_at_end(steps, [2, 3]) == -5 / 8
    assert _logp_at_end(steps, []) == 0.0
