"""The user's folders, and roots of runs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def _root(value: str) -> str:
    if "://" not in value and not Path(value).expanduser().is_absolute():
        raise ValueError(f"run_root={value!r} is relative; give an absolute path or a URI such as s3://bucket/run")
    if re.search(r"://[^/]*@", value):  # it would be kept in job.yaml and shown in the report
        raise ValueError("run_root holds credentials; give them by the environment (AWS_ACCESS_KEY_ID, ...) instead")
    return value


Root = Annotated[str, AfterValidator(_root)]
"""Absolute path or URI of a folder."""


def place(root: str) -> str:
    """A root as storage takes it: `~` is the user's home."""
    return root if "://" in root else str(Path(root).expanduser())


def data_home() -> Path:
    """The user's data directory for ctrlray (XDG)."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "ctrlray"


def cache_home() -> Path:
    """The user's cache directory for ctrlray (XDG)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctrlray"
