"""The playground in a real browser, against an ingress with fake engines: dials, streams, errors, links, keys, screen sizes."""

from __future__ import annotations

import asyncio
import re
import threading
import urllib.request
from contextlib import ExitStack

import pytest

from ctrlray.serve.dial import Dial, Range
from ctrlray.serve.policy import Bounds
from ctrlray.serve.refusal import Refusal
from tests.browser import CONTRAST, PHONE, expect
from tests.fakes import FakeEngine, FakeJudge
from tests.ingress import CHAT, DIAL, World, prompt_of
from tests.live import DialledEngine, listening
from tests.playground import achieved, answers, ask, ended, expect_text, opened, sign_in, slider, texts, view

WEB = {"attributes": {"safety": Bounds(low=2, high=4)}}
BREVITY, SAFETY, HELPFULNESS = Range("brevity", 4, 1, 4, 3), Range("safety", 3, 1, 3, 2), Range("helpfulness", 2, 1, 2, 2)


def world_of(*ranges, **settings):
    """A world whose models have these attributes."""
    dial = Dial(ranges)
    return World(engine=DialledEngine(dial=dial), dial=dial, judge=FakeJudge(len(ranges)), **settings)


class Cutting:
    """An application that ends a connection without a word: after so many messages of an answer, once `now` is set."""

    def __init__(self, app):
        self.app, self.after, self.now = app, None, threading.Event()

    async def __call__(self, scope, receive, send):
        sent = 0

        async def passed_on(message):
            nonlocal sent
            if scope.get("path") == CHAT and self.after is not None and (sent := sent + 1) > self.after:
                await asyncio.to_thread(self.now.wait)
                raise ConnectionError("cut on purpose")
            await send(message)

        await self.app(scope, receive, passed_on)


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
    expect(answers(page)).to_be_focused()  # the button is gone
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


def test_the_grid_waits_as_long_as_a_full_queue_asks_and_goes_on(visit):
    world = World(engine=DialledEngine(), **WEB)
    full = [Refusal(429, "the queue is full", code="queue_full", retry_after_s=s) for s in (1, 5)]
    world.engine.faults = [None, *full]
    page = visit(world)
    view(page, "Grid")
    asked = []
    page.on("response", lambda r: asked.append(r) if r.url.endswith(CHAT) else None)
    ask(page)
    expect(answers(page).locator(".facts", has_text="the server asks to wait 5 s")).to_have_count(1)
    ended(page)
    assert sorted(t[:2] for t in texts(page)) == sorted(f"{s}{h}" for s in (2, 3, 4) for h in (1, 2, 3))
    expect_text(page.locator("#announce"), "9 of 9 answers are there.")
    assert sorted(r.status for r in asked) == [200] * 9 + [429] * 2
    for refused in (r for r in asked if r.status == 429):
        (again,) = [r.request for r in asked if r.status == 200 and r.request.post_data == refused.request.post_data]
        waited_ms = again.timing["startTime"] - refused.request.timing["startTime"]
        assert waited_ms >= 1000 * int(refused.headers["retry-after"])


def test_a_model_of_one_attribute(visit):
    page = visit(world_of(BREVITY))
    for name, shown in (("Chat", ["3"]), ("Compare", ["3", "3"]), ("Grid", ["1", "2", "3", "4"])):
        view(page, name)
        ask(page)
        ended(page)
        assert [t.split()[0] for t in texts(page)] == shown and achieved(page) == [f"{level}.0" for level in shown]
    assert page.locator("#view-grid select").count() == 0  # nothing to choose axes from
    assert page.locator(".cells th").all_inner_texts() == [f"brevity {level}" for level in (1, 2, 3, 4)]


def test_a_model_of_three_attributes(visit):
    page = visit(world_of(SAFETY, HELPFULNESS, BREVITY), viewport=PHONE)
    slider(page, "brevity").focus()
    page.keyboard.press("End")
    ask(page)
    ended(page)
    assert texts(page)[0].startswith("224") and achieved(page) == ["2.0", "2.0", "4.0"]
    view(page, "Grid")
    assert page.locator("#view-grid input[type=range]").count() == 1  # the attribute that is no axis
    ask(page)
    ended(page)
    assert [t[:3] for t in texts(page)] == [f"{s}{h}4" for h in (1, 2) for s in (1, 2, 3)]
    page.get_by_label("Rows").select_option("brevity")
    slider(page, "helpfulness").focus()
    page.keyboard.press("Home")
    ask(page)
    ended(page)
    assert [t[:3] for t in texts(page)] == [f"{s}1{b}" for b in (1, 2, 3, 4) for s in (1, 2, 3)]
    assert achieved(page)[:3] == ["1.0", "1.0", "1.0"] and achieved(page)[-3:] == ["3.0", "1.0", "4.0"]


def test_the_best_of_several_answers_comes_with_its_scores(visit):
    engine = FakeEngine(["11 dull", "32 near", "xx"])
    page = visit(World(engine=engine, judge=FakeJudge(), **WEB))
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Strategy").select_option("rerank")
    ask(page)
    ended(page)
    assert texts(page) == ["32 near"] and achieved(page) == ["3.0", "2.0"]
    assert engine.orders[0]["n"] == 8 and not any(u.endswith("/scores") for u in page.asked)  # nothing is scored twice
    dots = answers(page).locator(".dot").evaluate_all("all => all.map(d => d.getAttribute('cx'))")
    assert [float(d) for d in dots] == [50, 50]  # level 3 of 5, and 2 of 3
    engine.texts = ["xx"]  # of which no reward makes anything
    page.locator("#more summary").click()
    ask(page)
    ended(page)
    assert achieved(page)[2:] == ["score", "score"]  # "no score"


def test_a_conversation_goes_on_with_another_model(visit):
    world = World(engine=DialledEngine(), judge=FakeJudge(), **WEB)
    page = visit(world)
    ask(page)
    ended(page)
    page.locator("#model").select_option("tiny-start")
    page.get_by_role("button", name="Answer again at this setting").click()
    ended(page)
    assert texts(page) == ["53 good"] and achieved(page) == ["5.0", "3.0"]


def test_a_model_that_was_taken_from_the_key_is_no_longer_offered(visit):
    world = World(engine=DialledEngine(), judge=FakeJudge(), **WEB)
    page = visit(world)
    expect(page.locator("#prompt")).to_be_focused()  # the page knows what the key allows
    web = world.policy.keys[0].model_copy(update={"models": ("tiny-start",)})
    world.policy = world.policy.model_copy(update={"keys": (web, world.policy.keys[1])})
    ask(page)
    expect_text(page.locator("#notice"), "The model tiny is not among those of your key; tiny-start is.")
    expect_text(answers(page).locator(".problem"), "no model 'tiny' for this key")
    page.get_by_role("button", name="Try again").click()
    ended(page)
    assert texts(page) == ["53 good"]
    world.policy = world.policy.model_copy(update={"keys": (web.model_copy(update={"models": ("tiny",)}), world.policy.keys[1])})
    view(page, "Grid")
    ask(page)
    expect_text(page.locator("#notice"), "The model tiny-start is not among those of your key; tiny is.")
    ended(page)
    expect(answers(page).locator(".facts", has_text="not asked")).to_have_count(5)  # of 9, of which 4 are asked at once


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


@pytest.mark.parametrize("after, kept", [(1, ""), (6, "52 <b")])
def test_a_connection_that_is_cut_says_so_and_the_conversation_goes_on(visit, after, kept):
    world = World(engine=DialledEngine())
    cutting = world.app = Cutting(world.app)
    page = visit(world)
    ask(page, "First")
    ended(page)
    cutting.after = after
    ask(page, "Second")
    expect(answers(page).nth(1).locator(".text")).to_have_text(kept)
    cutting.now.set()
    expect_text(answers(page).nth(1).locator(".problem"), "The answer broke off. The connection ended before the answer did.")
    ended(page)
    assert texts(page)[1] == kept
    expect_text(page.locator("#announce"), "broke off")
    cutting.after = None
    ask(page, "Third")
    ended(page)
    sent = prompt_of(world.engine)
    assert "First" in sent and "Second" not in sent and texts(page)[2] == "52 <b>bold</b> words"
    page.get_by_role("button", name="Try again").click()
    ended(page)
    assert texts(page)[1] == "52 <b>bold</b> words" and "Third" not in prompt_of(world.engine)
    assert world.in_flight == 0


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
    ask(page)
    expect(answers(page)).to_have_count(1)
    page.get_by_role("button", name="Change key").click()
    expect(page.locator("#key")).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0
    sign_in(page, "ck-web")
    expect(page.locator("#prompt")).to_be_focused()
    assert answers(page).count() == 0  # nothing of what the one before said


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
    expect(page.locator("#prompt")).to_be_focused()  # the page has been drawn; what is focused before that loses the focus to it
    page.locator("#tab-chat").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-compare"
    moves = (("End", "grid"), ("Home", "chat"), ("ArrowLeft", "grid"), ("ArrowRight", "chat"), ("ArrowRight", "compare"))
    for pressed, there in moves:
        page.keyboard.press(pressed)
        assert page.evaluate("document.activeElement.id") == f"tab-{there}"
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


SPILT = """() => [...document.querySelectorAll(".levels dt, .levels dd, .dial label, .dial output, .scale span")]
  .filter((e) => e.offsetParent && e.getBoundingClientRect().right > e.closest(".answer, .panel").getBoundingClientRect().right)
  .map((e) => e.textContent)"""
"""Names, levels and scores beyond the right edge of their box."""


@pytest.mark.parametrize("width", [PHONE["width"], 1280])
def test_long_names_and_many_levels_stay_inside_of_their_boxes(visit, width):
    world = world_of(*DIAL.ranges, Range("instruction_following", 10, 1, 10, 7))
    page = visit(world, viewport={"width": width, "height": 844})
    for name in ("Chat", "Compare", "Grid"):
        view(page, name)
        ask(page)
        ended(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate(SPILT) == [], name
        assert achieved(page)[-1] == "7.0"


@pytest.mark.parametrize("width", [PHONE["width"], 1280])
def test_the_newest_answer_is_in_view(visit, width):
    page = visit(World(engine=DialledEngine(" words" * 60), context=4000), viewport={"width": width, "height": 844})
    for _ in range(3):
        ask(page)
        ended(page)
    assert 0 < answers(page).last.bounding_box()["y"] < 844 / 2


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
