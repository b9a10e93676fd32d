"""The snippets of docs/serving.md, run as they stand there but for the names of the server at hand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
FOUND = re.findall(r"<!-- snippet: (\S+) -->\n```(\w+)\n(.*?)```", PAGE, re.DOTALL)
SNIPPETS = {name: (kind, text) for name, kind, text in FOUND}


def run_snippet(name: str, url: str, key: str, names: Mapping[str, str]) -> str:
    """What a snippet prints; `names` gives what stands in the server's place of the page's names. Skips without its client."""
    kind, text = SNIPPETS[name]
    if "langchain" in name:
        pytest.importorskip("langchain_openai", reason="needs the package langchain-openai")
    if kind == "bash" and shutil.which("curl") is None:
        pytest.skip("needs curl")
    for theirs, ours in names.items():
        text = text.replace(theirs, ours)
    command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euc", text]
    environment = os.environ | {"CTRLRAY_URL": f"{url}/v1", "CTRLRAY_API_KEY": key, "LANGSMITH_TRACING": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
