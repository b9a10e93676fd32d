"""The extension that DeepSpeed compiles at first use on a node of processors."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

import psutil


def clear_locks() -> list[Path]:
    """Remove the files by which killed processes still keep all others from the extension; returns them.

    torch creates a file before it compiles or loads an extension, holds it open, and removes it afterwards; whoever finds one
    waits for its end. One that no process holds open has been left behind.
    """
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()).resolve()
    if not any(root.glob("**/lock")):
        return []
    with (root / "ctrlray.clearing").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)  # else of two that clear, one might remove what a third has just made
        left = [path for path in root.glob("**/lock") if str(path) not in _open_files()]
        for path in left:
            path.unlink(missing_ok=True)
    return left


def _open_files() -> set[str]:
    found: set[str] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found |= {file.path for file in process.open_files()}
    return found
