"""The raters' page in a real browser: rating, resuming, files in and out, and texts that try to run."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from ctrlray.annotate import answers, study
from ctrlray.cli import main
from ctrlray.tables import Storage
from tests.browser import CONTRAST, PHONE, expect, fresh_page
from tests.studies import NAMES, run_with_grid

URL = "http://study.test/study.html"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study of six pairs."""
    root = tmp_path_factory.mktemp("page")
    study.export(run_with_grid(root / "run"), study.Request(num_items=6), Storage(str(root / "study")))
    return root / "study"


@pytest.fixture
def page(browser, folder):
    """The study's page.

    It has a web address, since two loads of a `file:` do not always get the same storage from Chromium.
    """
    with fresh_page(browser, accept_downloads=True) as opened:
        opened.context.route(URL, lambda r: r.fulfill(path=folder / "for_raters" / "study.html"))
        opened.goto(URL)
        yield opened
        assert all(u == URL or u.startswith(("file:", "blob:")) for u in opened.asked)


def start(page, name):
    page.fill("#rater", name)
    page.press("#rater", "Enter")


def rate(page, choice, attribute):
    page.locator("article:visible fieldset", has_text=attribute).get_by_role("radio", name=choice, exact=True).check()


def saved(page, button, path):
    with page.expect_download() as waiting:
        page.click(button)
    waiting.value.save_as(path)
    return waiting.value.suggested_filename


def test_two_pairs_rated_survive_a_reload_and_come_back_as_files(page, folder, tmp_path):
    page.goto((folder / "for_raters" / "study.html").as_uri())  # as raters get it
    assert not page.locator("article").first.is_visible()  # nothing to rate before there is a name
    start(page, "Ann O'Neil")
    shown = [page.locator("article:visible").get_attribute("id")]
    rate(page, "A", "helpfulness")
    rate(page, "Tie", "safety")
    page.click("#next")
    shown.append(page.locator("article:visible").get_attribute("id"))
    rate(page, "B", "helpfulness")
    rate(page, "Skip", "safety")
    page.reload()
    assert page.inner_text("#status") == "Ann O'Neil: 2 of 6 pairs done"
    assert page.locator("article:visible h2").inner_text() == "Pair 3 of 6"  # the first open one
    page.click("#previous")
    assert page.locator("article:visible input:checked").evaluate_all("all => all.map(i => i.value)") == ["B", "skip"]
    name = saved(page, "#csv", tmp_path / "ann.csv")
    saved(page, "#json", tmp_path / "ann.json")
    assert name.startswith("ratings-") and name.endswith("-Ann_O_Neil.csv")
    from_csv, from_json = (answers.read(tmp_path / f"ann.{e}") for e in ("csv", "json"))
    assert [g[1:] for g in from_csv] == [g[1:] for g in from_json]
    assert [(g.item_id, g.attribute, g.value) for g in from_csv] == [
        (shown[0], "helpfulness", "A"),
        (shown[0], "safety", "tie"),
        (shown[1], "helpfulness", "B"),
        (shown[1], "safety", "skip"),
    ]
    found = CliRunner().invoke(main, ["annotate", "import", f"{folder}/key.json", f"{tmp_path}/ann.csv", "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert json.loads((tmp_path / "agreement.json").read_text())["ratings"]["used"] == 3


def test_keys_alone_are_enough(page):
    page.locator("#rater").focus()
    page.keyboard.type("as")  # a name of keys chooses nothing
    page.keyboard.press("Enter")
    for key in "atnbs":
        page.keyboard.press(key)
    assert page.inner_text("#status") == "as: 2 of 6 pairs done"
    page.keyboard.press("p")
    assert page.locator("article:visible h2").inner_text() == "Pair 1 of 6"
    assert page.evaluate("document.activeElement.textContent") == "Pair 1 of 6"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")  # radios follow the arrows by themselves
    assert page.locator("article:visible input:checked").first.get_attribute("value") == "B"
    page.uncheck("#use-keys")
    page.keyboard.press("n")
    assert page.locator("article:visible h2").inner_text() == "Pair 1 of 6"


def test_raters_of_one_browser_do_not_see_each_other(page):
    start(page, "ann")
    rate(page, "A", "helpfulness")
    page.click("#change")
    start(page, "bob")
    assert page.locator("article:visible input:checked").count() == 0
    page.click("#change")
    assert page.locator("#known option").evaluate_all("all => all.map(o => o.value)") == ["ann", "bob"]
    start(page, "ann")
    assert page.locator("article:visible input:checked").count() == 1
    page.on("dialog", lambda d: d.accept())
    page.click("#clear")
    page.reload()
    assert page.locator("input:checked:not(#use-keys)").count() == 0


def test_a_load_that_finds_an_empty_storage_loses_nothing(page):
    start(page, "ann")
    rate(page, "A", "helpfulness")
    page.evaluate("localStorage.clear()")
    page.reload()
    assert page.locator("article:visible input:checked").evaluate_all("all => all.map(i => i.value)") == ["A"]
    other = page.context.new_page()  # a new tab has nothing but the storage, which has it again
    other.goto(page.url)
    assert other.locator("article:visible input:checked").count() == 1
    page.on("dialog", lambda d: d.accept())
    page.click("#clear")
    page.reload()
    assert page.locator("article:visible input:checked").count() == 0


@pytest.mark.slow
def test_two_windows_of_one_rater_show_the_same(page):
    other = page.context.new_page()
    other.goto(page.url)
    for window in (page, other):
        start(window, "ann")
    for number, (mine, theirs) in enumerate(((other, page), (page, other)), 1):  # the second keeps what the first chose
        rate(mine, "B", "helpfulness")
        rate(mine, "Tie", "safety")
        expect(theirs.locator("#status")).to_have_text(f"ann: {number} of 6 pairs done")
        page.click("#next")


def test_a_file_of_ones_own_is_taken_up_and_others_are_refused(page, tmp_path):
    start(page, "ann")
    rate(page, "A", "helpfulness")
    saved(page, "#json", tmp_path / "ann.json")
    kept = json.loads((tmp_path / "ann.json").read_text())
    (item,) = kept["answers"]
    kept["answers"][item] = {"helpfulness": "B", "safety": "tie", "beauty": "A"}
    kept["answers"]["qelsewhere"] = {"safety": "A"}
    (tmp_path / "more.json").write_text(json.dumps(kept))
    page.set_input_files("#file", tmp_path / "more.json")
    expect(page.locator("#done")).to_have_js_property("value", 1)
    saved(page, "#json", tmp_path / "now.json")  # what was chosen here stays
    assert json.loads((tmp_path / "now.json").read_text())["answers"] == {item: {"helpfulness": "A", "safety": "tie"}}
    for name, content in (("other.json", json.dumps(kept | {"study": "x"})), ("broken.json", "{")):
        (tmp_path / name).write_text(content)
        page.set_input_files("#file", tmp_path / name)
        expect(page.locator("#notice")).to_have_text(f"{name} is no json file of this study.")


def test_it_says_so_when_the_browser_keeps_nothing(page):
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('denied'); }; }")
    start(page, "ann")
    rate(page, "A", "helpfulness")
    assert "Download your file before you close it" in page.inner_text("#notice")
    assert page.locator("article:visible input:checked").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(PHONE)
    start(page, "ann")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    tops = page.locator("article:visible .answers section").evaluate_all("all => all.map(s => s.getBoundingClientRect().top)")
    assert tops[1] > tops[0]  # one below the other
    sizes = page.locator("article:visible .choices label, nav button").evaluate_all("all => all.map(e => e.offsetHeight)")
    assert min(sizes) >= 44
    assert page.evaluate(CONTRAST) >= 4.5


def test_labels_and_headings_are_there_for_screen_readers(page):
    start(page, "ann")
    asked = page.locator("article:visible legend").all_inner_texts()
    assert asked == [f"Which answer has more {n}?" for n in NAMES]
    for name in ("A", "B", "Tie", "Skip"):
        assert page.locator("article:visible").get_by_role("radio", name=name, exact=True).count() == len(NAMES)
    assert page.locator("article:visible").get_by_role("heading", name="Answer A", exact=True).count() == 1
    assert page.locator("#status").get_attribute("role") == "status"
