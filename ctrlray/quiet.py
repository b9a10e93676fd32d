"""Keeps the log lines of Ray and its libraries out of the terminal; they stay in Ray's session folder."""

from __future__ import annotations

import logging
import os
import warnings

_NOISY = ("ray", "ray.data", "ray.train", "ray.serve", "transformers", "deepspeed", "DeepSpeed")


def quiet_ray() -> None:
    """Show errors only, and no progress bars but our own."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
