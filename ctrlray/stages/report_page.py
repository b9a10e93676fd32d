"""Makes one HTML page that needs nothing but a browser, and opens no connection.

What a page shows is untrusted text in places: the templates escape everything, and the page's content policy runs no
script but the two that are hashed here. Templates, style and script lie in `ctrlray/assets`.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ctrlray.stages.report_numbers import duration, number

SCRIPT = "report.js"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "


def make_page(template: str, **values: Any) -> str:
    """The page as text that UTF-8 can always hold: `values` in a template of the package."""
    plotly_js = Markup(get_plotlyjs())
    page_js = Markup((resources.files("ctrlray") / "assets" / SCRIPT).read_text(encoding="utf-8"))
    policy = POLICY + " ".join(map(_hash, (plotly_js, page_js)))
    scripts = {"policy": policy, "plotly_js": plotly_js, "page_js": page_js}
    page = _environment().get_template(template).render(**values, **scripts)
    return page.encode("utf-8", "replace").decode("utf-8")


@cache
def _environment() -> Environment:
    # autoescape is unconditional: the default rule goes by file ending and would miss `.j2`
    environment = Environment(
        loader=PackageLoader("ctrlray", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, duration=duration)
    return environment


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
