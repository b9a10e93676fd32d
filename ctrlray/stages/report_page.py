"""Makes a page of figures and tables that needs nothing but a browser, and opens no connection.

The page's content policy runs no script but the two that are hashed here. Template, style and script lie in `ctrlray/assets`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ctrlray.pages import asset, environment, policy_hash
from ctrlray.stages.report_numbers import duration, number

SCRIPT = "report.js"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "


def make_page(template: str, **values: Any) -> str:
    """The page as text that UTF-8 can always hold: `values` in a template of the package."""
    plotly_js, page_js = Markup(get_plotlyjs()), Markup(asset(SCRIPT))
    policy = POLICY + " ".join(map(policy_hash, (plotly_js, page_js)))
    scripts = {"policy": policy, "plotly_js": plotly_js, "page_js": page_js}
    page = _environment().get_template(template).render(**values, **scripts)
    return page.encode("utf-8", "replace").decode("utf-8")


@cache
def _environment() -> Environment:
    return environment(number=number, duration=duration)
