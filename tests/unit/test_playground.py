"""The playground in a real browser, against an ingress with fake engines: dials, streams, errors, links, keys, screen sizes."""

from __future__ import annotations

import re
import urllib.request
from contextlib import ExitStack

import pytest

from ctrlray.serve.policy import Bounds
from tests.browser import CONTRAST, PHONE, expect
from tests.fakes import FakeJudge
from tests.ingress import World
from tests.live import DialledEngine, listening
from tests.playground import achieved, answers, ask, ended, expect_text, opened, sign_in, slider, texts, view

WEB = {"attributes": {"safety": Bounds(low=2, high=4)}}


@pytest.fixture
def visit(browser):
    """Opens the page of a world."""
    with ExitStack() as stack:

        def go(world, fragment="", key="ck-web", **context):
            url = stack.enter_context(listening(world))
            return stack.enter_context(opened(browser, url, key, fragment, **context))

        yield go


def test_the_dial_reaches_the_engine_and_answers_stay_text(visit):
    world = World(engine=DialledEngine(" <img src=x onerror='window.hacked=1'><b>bold</b>"), **WEB)
    page = visit(world)
    dial = slider(page, "safety")
    assert [dial.get_attribute(n) for n in ("min", "max", "aria-valuetext")] == ["2", "4", "4 of 5"]
    expect_text(page.locator("#view-chat .dial").first, "Your key allows 2 to 4 of 5 levels.")
    dial.focus()
    page.keyboard.press("Home")
    ask(page)
    ended(page)
    assert texts(page) == ["22 <img src=x onerror='window.hacked=1'><b>bold</b>"]
    assert answers(page).locator(".text img, .text b").count() == 0
    assert answers(page).get_attribute("aria-label") == "Dial at safety 2, helpfulness 2"
    expect_text(page.locator("#announce"), "22 <img src=x")
    page.keyboard.press("Escape")
    ask(page, "More")
    ended(page)
    sent = len(world.engine.orders[1]["prompt"][0])
    assert sent > len(world.engine.orders[0]["prompt"][0]) + len(texts(page)[0])  # the conversation goes along


def test_an_answer_is_given_again_at_a_turned_dial(visit):
    page = visit(World(engine=DialledEngine(), **WEB))
    ask(page)
    ended(page)
    again = page.get_by_role("button", name="Answer again at this setting")
    expect(again).to_be_hidden()
    slider(page, "safety").focus()
    page.keyboard.press("ArrowLeft")
    again.click()
    expect_text(answers(page).locator(".text"), "32")
    ended(page)
    assert answers(page).count() == 1


def test_two_settings_answer_the_same_prompt(visit):
    world = World(engine=DialledEngine(), judge=FakeJudge(), **WEB)
    page = visit(world)
    view(page, "Compare")
    slider(page, "safety", 1).focus()
    page.keyboard.press("Home")
    ask(page)
    ended(page)
    assert [t[:2] for t in texts(page)] == ["42", "22"]
    assert achieved(page) == ["4.0", "2.0", "2.0", "2.0"]


def test_the_grid_holds_every_setting_once_and_waits_when_told(visit):
    engine = DialledEngine()
    engine.faults = [None, {"code": 503, "message": "gone"}]
    page = visit(World(engine=engine, concurrent=1, **WEB))
    view(page, "Grid")
    page.get_by_label("Columns").select_option("helpfulness")
    ask(page)
    ended(page)
    assert [t[:2] for t in texts(page)] == [f"{s}{h}" for s in (2, 3, 4) for h in (1, 2, 3)]
    assert page.locator(".cells thead th").all_inner_texts() == [f"helpfulness {h}" for h in (1, 2, 3)]
    expect_text(page.locator("#announce"), "9 of 9 answers are there.")


def test_stop_keeps_what_came_and_frees_the_place(visit):
    world = World(engine=DialledEngine(" word" * 200, pace_s=0.05))
    page = visit(world)
    ask(page)
    expect_text(answers(page).locator(".text"), "52 w")
    page.keyboard.press("Escape")
    expect_text(answers(page).locator(".facts"), "stopped")
    ended(page)
    expect(page.locator("#prompt")).to_be_focused()
    while world.in_flight:
        page.wait_for_timeout(50)


def test_a_dropped_stream_says_so_and_can_be_tried_again(visit):
    engine = DialledEngine()
    engine.breaks_after = 4
    page = visit(World(engine=engine))
    ask(page)
    expect_text(answers(page).locator(".problem"), "The answer broke off. the replica ended")
    assert texts(page) == ["52 <"]
    engine.breaks_after = None
    page.get_by_role("button", name="Try again").click()
    expect_text(answers(page).locator(".text"), "52 <b>bold</b> words")
    expect(answers(page).locator(".problem")).to_be_hidden()


def test_refusals_name_the_bound_the_wait_and_the_next_step(visit):
    world = World(engine=DialledEngine(), requests_per_minute=1)
    page = visit(world)
    ask(page)
    ended(page)
    ask(page)
    said = answers(page).nth(1).locator(".problem")
    expect_text(said, "Too much at once. requests_per_minute=1")
    assert re.search(r"The server asks to wait \d+ s\.", said.inner_text())
    web = world.policy.keys[0].model_copy(update={"requests_per_minute": None, "attributes": {"safety": Bounds(high=3)}})
    world.policy = world.policy.model_copy(update={"keys": (web, world.policy.keys[1])})
    ask(page)
    expect_text(answers(page).nth(2).locator(".problem"), "control.safety=5 is outside of the bounds of your key: 1..3")
    expect(slider(page, "safety")).to_have_attribute("max", "3")  # the new bounds are shown at once


def test_a_server_that_is_gone_is_said_to_be(visit):
    page = visit(World(engine=DialledEngine()))
    page.context.set_offline(True)
    ask(page)
    expect_text(answers(page).locator(".problem"), "The server cannot be reached.")
    page.context.set_offline(False)


def test_keys_are_asked_for_kept_in_the_tab_and_in_no_link(visit):
    page = visit(World(engine=DialledEngine(), **WEB), key="ck-wrong")
    expect_text(page.locator("#notice"), "The server does not know this key.")
    sign_in(page, "ck-web")
    expect(page.locator("#prompt")).to_be_focused()
    page.reload()
    expect(page.locator("#prompt")).to_be_visible()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.fill("#prompt", "ck-what?")
    page.get_by_role("button", name="Copy link").click()
    expect_text(page.locator("#announce"), "Link copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert "ck-web" not in link and "prompt=ck-what" in link and "levels=safety:4,helpfulness:2" in link
    assert page.evaluate("Object.keys(localStorage).length") == 0 and page.context.cookies() == []
    page.get_by_role("button", name="Change key").click()
    expect(page.locator("#key")).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_link_sets_the_page_and_what_the_key_does_not_allow_is_moved(visit):
    fragment = "#view=compare&levels=safety:1,helpfulness:3&other=safety:3,x:9&prompt=Hello+%3Cb%3E&key=ck-evil&model=tiny"
    page = visit(World(engine=DialledEngine(), **WEB), fragment)
    expect_text(page.locator("#notice"), "Moved into your key's bounds: safety 1 is now 2.")
    assert page.input_value("#prompt") == "Hello <b>" and answers(page).count() == 0  # a link asks nothing by itself
    found = page.locator("#view-compare input[type=range]").evaluate_all("all => all.map(s => s.value)")
    assert found == ["2", "3", "3", "2"]
    expect(page).to_have_url(re.compile("levels=safety:2,helpfulness:3(?!.*evil)"))


def test_keys_of_the_keyboard_are_enough(visit):
    page = visit(World(engine=DialledEngine()))
    page.locator("#tab-chat").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-compare"
    for _ in range(3):
        page.keyboard.press("Tab")  # model, link, key
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.attribute") == "safety"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(visit, scheme):
    page = visit(World(engine=DialledEngine(), judge=FakeJudge()), viewport=PHONE, color_scheme=scheme)
    for name in ("Chat", "Compare", "Grid"):
        view(page, name)
        ask(page)
        ended(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
        assert page.evaluate(CONTRAST) >= 4.5, name
    sizes = page.locator("header button:visible, #ask button:visible").evaluate_all("all => all.map(e => e.offsetHeight)")
    assert min(sizes) >= 44


def test_every_part_comes_with_a_policy_that_lets_nothing_in():
    with listening(World()) as url:
        for path in ("", "playground/main.js", "playground/style.css"):
            with urllib.request.urlopen(f"{url}/{path}") as answer:
                policy = answer.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types-for" in policy
                assert b"http://" not in answer.read().replace(b"http://www.w3.org/2000/svg", b"")
    world = World()
    assert world.web.get("/playground/nothing.js").status_code == 404
    assert world.client(None).get("/playground/nothing.js").status_code == 401
