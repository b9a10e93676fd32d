"""The report in a real browser: what it saves, what its filter shows, on a phone and on paper."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET

import pytest

from ctrlray.stages.report import render
from tests.browser import PHONE, expect, fresh_page
from tests.reports import report_data

URL = "http://report.test/report.html"


@pytest.fixture(scope="module")
def html():
    return render(report_data())


@pytest.fixture
def page(browser, html):
    with fresh_page(browser, accept_downloads=True) as opened:
        yield shown(opened, html)
        assert all(u == URL or u.startswith("blob:") for u in opened.asked)  # it needs no network


def shown(page, html):
    page.context.route(URL, lambda r: r.fulfill(body=html, content_type="text/html"))
    page.goto(URL)
    expect(page.locator("figure .main-svg").first).to_be_visible()
    return page


def saved(page, button):
    with page.expect_download() as waiting:
        button.click()
    return waiting.value.suggested_filename, waiting.value.path().read_text()


def test_every_figure_can_be_saved_as_a_drawing_and_as_numbers(page):
    figure = page.locator("figure", has=page.locator("button", has_text="CSV")).first
    name, drawing = saved(page, figure.get_by_role("button", name="as SVG"))
    assert name.endswith(".svg") and ET.fromstring(drawing).tag == "{http://www.w3.org/2000/svg}svg"
    assert page.locator("figure").count() == page.get_by_role("button", name="as SVG").count()
    name, text = saved(page, figure.get_by_role("button", name="as CSV"))
    rows = list(csv.reader(io.StringIO(text)))
    assert name.endswith(".csv") and len(rows) > 2 and len({len(r) for r in rows}) == 1


def test_a_tables_csv_holds_what_the_table_shows(page):
    table = page.locator(".scroll", has_text="Methods on the same held-out prompts")
    _, text = saved(page, table.get_by_role("button", name="as CSV"))
    rows = list(csv.reader(io.StringIO(text)))
    shown = table.locator("tbody tr > :first-child").all_inner_texts()
    assert rows[0][0] == "Method" and [r[0] for r in rows[1:]] == [text.split()[-1] for text in shown]  # a mark stands before


def test_the_filter_shows_what_was_asked_for(page):
    form, answers = page.locator("#filter"), page.locator("section.prompt article:visible")
    page.locator("section.prompt details").evaluate_all("all => all.forEach(d => d.open = true)")
    # two prompts, nine settings, two methods, of which `start` answers once for all settings
    every = answers.count()
    form.get_by_label("Method").select_option("exmate")
    expect(form.locator("output")).to_have_text("18 answers")
    form.get_by_label("helpfulness").select_option("3")
    expect(form.locator("output")).to_have_text("6 answers")
    form.get_by_label("harmlessness").select_option("1")
    expect(answers).to_have_count(2)
    form.get_by_label("Contains").fill("NEIGHBOUR")
    expect(answers).to_have_count(1)
    form.get_by_label("Contains").fill("no answer says this")
    expect(answers).to_have_count(0)
    form.get_by_label("Contains").fill("")
    for label in ("Method", "helpfulness", "harmlessness"):
        form.get_by_label(label).select_option("")
    expect(answers).to_have_count(every)


def test_a_phone_scrolls_tables_and_not_the_page(browser, html):
    with fresh_page(browser, viewport=PHONE) as page:
        shown(page, html)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert all(page.locator("figure .plot").evaluate_all(f"all => all.map(e => e.clientWidth <= {PHONE['width']})"))


def test_paper_has_everything_unfolded_and_no_buttons(page):
    folded = page.locator("details:not([open])")
    before = folded.count()
    assert before
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert folded.count() < before and page.locator("button.save:visible").count() == 0
    assert not page.locator("#filter").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert folded.count() == before
