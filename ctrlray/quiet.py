"""Keeps the log lines of Ray and its libraries out of the terminal; they stay in Ray's session folder.

Sets environment variables for this process: all are settings of libraries that read nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

_NOISY = ("ray", "ray.data", "ray.train", "ray.serve", "transformers", "deepspeed", "DeepSpeed", "torch")


def quiet_libraries() -> None:
    """Errors only, and no progress bars but our own; before transformers, DeepSpeed or Ray is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
    warnings.filterwarnings("ignore")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_transformers() -> None:
    """No bars while weights load."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def use_ray_token() -> None:
    """Send the token that this user has for Ray clusters, unless the environment says otherwise; before Ray is imported."""
    here = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if here or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextlib.contextmanager
def silenced_stderr() -> Iterator[None]:
    """Nothing on file descriptor 2: Ray's C++ core greets there, whatever its log level is. Exceptions still pass."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def own_logging() -> Iterator[None]:
    """Errors only while something is imported, then logging as it was: `ray.serve.llm` has all records written as JSON."""
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


def quiet_ray() -> None:
    """No bars of Ray Data, and no warnings of what Ray Data itself sets."""
    quiet_libraries()
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    warnings.filterwarnings("ignore", category=RayDeprecationWarning)

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # `ctrlray.patience` waits as long as the job says, and tells for what
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # an actor's own error reaches the user, not one that wraps it
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
