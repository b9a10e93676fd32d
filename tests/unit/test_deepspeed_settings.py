"""What DeepSpeed is told, and the schedule; no engine is built."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ctrlray import config
from ctrlray.train.engine import deepspeed_settings, learning_rate_factor


def zero(gpu=True, **settings):
    given = config.Train(gpus_per_worker=1 if gpu else 0, **settings)
    return deepspeed_settings(given, gpu=gpu, bf16_masters=False)["zero_optimization"]


def test_gloo_is_not_asked_for_what_it_lacks():
    assert zero(gpu=False, zero_stage=2) == {"stage": 2, "reduce_scatter": False, "overlap_comm": False}
    assert zero(zero_stage=2) == {"stage": 2}


def test_offload_moves_what_was_asked_for():
    host = {"device": "cpu", "pin_memory": True}
    assert zero(zero_stage=1, offload="optimizer") == {"stage": 1, "offload_optimizer": host}
    assert zero(zero_stage=3, offload="all") == {"stage": 3, "offload_optimizer": host, "offload_param": host}


def test_schedule_by_hand():
    """10 steps, the first 2 rising: 1/2, 1, then the cosine over 9 parts from its first, to just above zero."""
    made = [learning_rate_factor(i, 10, 0.2) for i in range(10)]
    assert made[:2] == [0.5, 1.0]
    assert made[5] == pytest.approx(0.5 * (1 + 0.173648), abs=1e-6)  # cos(4 pi / 9)
    assert all(a > b for a, b in pairwise(made[1:])) and 0 < made[-1] < 0.04
