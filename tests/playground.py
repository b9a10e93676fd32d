"""The playground as a user drives it, in a browser of `tests.browser`, whatever server is behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.browser import expect, fresh_page


@contextmanager
def opened(browser: Any, url: str, key: str = "", fragment: str = "", **context: Any) -> Iterator[Any]:
    """The page of a server, signed in where there is a key; in the end nothing was asked of another host."""
    with fresh_page(browser, **context) as page:
        page.goto(f"{url}/{fragment}")
        if key:
            sign_in(page, key)
        yield page
        assert all(u.startswith(url) for u in page.asked)


def sign_in(page: Any, key: str) -> None:
    page.fill("#key", key)
    page.press("#key", "Enter")


def ask(page: Any, text: str = "Hi") -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def ended(page: Any) -> None:
    """Wait until nothing is being answered."""
    expect(page.locator("#send")).to_be_visible()


def view(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def answers(page: Any) -> Any:
    return page.locator("main section:visible .answer")


def texts(page: Any) -> list[str]:
    found: list[str] = answers(page).locator(".text").all_inner_texts()
    return found


def achieved(page: Any) -> list[str]:
    """The scores that answers show, in their order and the dial's."""
    return [text.split()[-1] for text in answers(page).locator(".got").all_inner_texts()]


def slider(page: Any, name: str, place: int = 0) -> Any:
    return page.locator("main section:visible").get_by_role("slider", name=name).nth(place)


def expect_text(locator: Any, text: str) -> None:
    expect(locator).to_contain_text(text)
