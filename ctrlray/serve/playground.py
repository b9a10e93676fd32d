"""The playground: one page with its style and scripts, all of the package. It asks nothing of any other host.

The page itself needs no key; what it shows of models comes from the API, with the key that the user gives it.
"""

from __future__ import annotations

from importlib import resources
from types import MappingProxyType

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""No inline script or style, nothing from elsewhere, and no text that becomes markup: answers are a model's."""
HEADERS = MappingProxyType(
    {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
)
PAGE = "index.html"
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def _read() -> dict[str, tuple[bytes, str]]:
    folder = resources.files("ctrlray") / "assets" / "playground"
    return {f.name: (f.read_bytes(), _KINDS[f.name.rpartition(".")[2]]) for f in folder.iterdir()}


FILES = MappingProxyType(_read())
"""Content and media type by name; there are no others."""
PATHS = frozenset(f"/playground/{name}" for name in FILES if name != PAGE)
"""Where the page's parts are; its own place is `/`."""
