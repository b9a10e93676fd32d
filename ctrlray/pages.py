"""What all HTML pages share: templates that escape everything, scripts and styles of the package, and a content policy."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment(**filters: Callable[..., str]) -> Environment:
    """Templates of the package's assets, with a page's own filters."""
    # autoescape is unconditional: the default rule goes by file ending and would miss `.j2`
    made = Environment(
        loader=PackageLoader("ctrlray", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(filters)
    return made


def asset(name: str) -> str:
    """A script or style of the package."""
    return (resources.files("ctrlray") / "assets" / name).read_text(encoding="utf-8")


def policy_hash(content: str) -> str:
    """How a content policy names a script or style that stands in the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
