"""A headless Chromium for tests of pages: how it is started, what no page of ours may do, and what is measured in one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PATIENCE_MS = 60_000  # a busy machine may freeze a browser for a while
PHONE = {"width": 390, "height": 844}


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser; skips where it, or the package that drives it, is missing."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs the package playwright (make browser)")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with driver.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=flags, timeout=2 * PATIENCE_MS)
        yield started
        started.close()


@contextmanager
def fresh_page(browser: Any, **context: Any) -> Iterator[Any]:
    """A page in a profile of its own; in the end it reported nothing, and no text that it showed ran.

    `page.asked` holds the addresses that it asked for.
    """
    profile = browser.new_context(**context)
    profile.set_default_timeout(PATIENCE_MS)
    page = profile.new_page()
    page.problems, page.asked = [], []
    # an answer that is an error is reported too, and is what some tests want
    page.on("console", lambda m: page.problems.append(m.text) if "Failed to load resource" not in m.text else None)
    page.on("pageerror", lambda e: page.problems.append(str(e)))
    page.on("request", lambda r: page.asked.append(r.url))
    try:
        yield page
        assert page.problems == [] and page.evaluate("window.hacked") is None
    finally:
        profile.close()


def expect(found: Any) -> Any:
    """Playwright's assertions, which wait."""
    from playwright.sync_api import expect as expected

    expected.set_options(timeout=PATIENCE_MS)
    return expected(found)


CONTRAST = """() => {
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => sum + w * channel(c[i]), 0);
  const colour = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = colour(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const ratio = (e) => {
    const [x, y] = [light(colour(getComputedStyle(e).color)), light(behind(e))].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const shown = [...document.querySelectorAll("p, h1, h2, h3, li, dt, dd, .text, legend, span, button, summary, kbd")];
  return Math.min(...shown.filter((e) => e.offsetParent && !e.disabled).map(ratio));
}"""
"""The least contrast of any text that is shown, by WCAG 2 (relative luminance)."""
