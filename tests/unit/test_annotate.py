"""A study from a run to raters and back: what raters may see, what becomes of their files, what agrees with what."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from markupsafe import escape

from ctrlray import schema
from ctrlray.annotate import answers, results, sheet, study
from ctrlray.annotate.key import check_key, make_key
from ctrlray.annotate.pairs import Answer, Pair
from ctrlray.cli import main
from ctrlray.errors import ConfigError, DataError
from ctrlray.pages import asset, policy_hash
from ctrlray.stages.grid import text_id
from ctrlray.tables import Storage, from_rows
from tests.studies import NAMES, NASTY, add_examples, run_with_grid, run_with_judge


@pytest.fixture
def exported(tmp_path):
    """The run, where its study lies, its key, and what export said."""
    run, out = run_with_grid(tmp_path / "run"), tmp_path / "study"
    said = study.export(run, study.Request(num_items=10, definitions={"safety": "Does <b>no</b> harm."}), Storage(str(out)))
    return run, out, json.loads((out / "key.json").read_text()), said


def sheet_rows(out):
    return list(csv.DictReader(io.StringIO((out / "for_raters" / "study.csv").read_text("utf-8-sig"))))


def higher(item, name):
    """The side that was asked for more of an attribute; a tie where both were asked for the same."""
    axis = NAMES.index(name)
    a, b = item["a"]["levels"][axis], item["b"]["levels"][axis]
    return "A" if a > b else "B" if b > a else "tie"


def fill(out, path, choose, **more):
    """The csv sheet as a rater returns it; `choose(item_id, attribute)` is what is written into a cell."""
    rows = sheet_rows(out)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {n: choose(row["item_id"], n) for n in NAMES} | more)
    return path


def bring_in(out, *files, where="found"):
    call = CliRunner().invoke(main, ["annotate", "import", str(out / "key.json"), *map(str, files), "--out", str(out / where)])
    return call, out / where


class Page(HTMLParser):
    """Tags and texts of a page as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.inside, self.texts = [], set(), None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.inside = dict(attrs).get("class") if tag == "div" else None

    def handle_data(self, data):
        if self.inside == "text":
            self.texts.append(data)
            self.inside = None


def test_raters_see_nothing_of_methods_levels_scores_or_rows(exported):
    run, out, key, _ = exported
    files = sorted(f.name for f in (out / "for_raters").iterdir())
    assert files == ["study.csv", "study.html"]
    secret = {"exmate", "requested", "reward", "level", run.storage.uri, run.job.name}
    secret |= {side["row_id"] for i in key["items"] for side in (i["a"], i["b"])} | {i["prompt_id"] for i in key["items"]}
    for name in files:
        text = (out / "for_raters" / name).read_text("utf-8-sig")
        rest = text.split("<body", 1)[-1] if name.endswith("html") else text
        for row in sheet_rows(out):  # prompts may well say "level"
            rest = rest.replace(row["prompt"], "").replace(str(escape(row["prompt"].split(": ", 1)[1])), "")
        assert [s for s in sorted(secret) if s in rest] == []


def test_what_raters_see_does_not_depend_on_what_was_asked_for():
    """The same two texts under other levels, scores and methods give the same page but for the study's name."""

    def made(levels, score, group):
        scores = {"reward": {"x": score}}
        pair = Pair("q1", *(Answer(f"r{i}", "p", group, (x,), f"text {i}", scores) for i, x in enumerate(levels)))
        key = make_key("grid", "/run", 0, [("x", "More.")], [pair])
        item = sheet.Item("q1", [{"role": "user", "content": "why"}], pair.a.text, pair.b.text)
        page = sheet.page(sheet.Sheet(key["study"], [("x", "More.")], [item]))
        return key["study"], page.replace(key["study"], "STUDY")

    (one, first), (other, second) = made((1, 3), 0.5, "exmate"), made((3, 1), 9.0, "clm")
    assert first == second and one != other


def test_texts_cannot_leave_their_place(exported):
    _, out, _, _ = exported
    text = (out / "for_raters" / "study.html").read_text()
    page = Page(text)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not [a for a in page.attributes if a.startswith("on") or a in ("style", "src", "href", "action", "srcset", "data")]
    assert sum(NASTY in t for t in page.texts) == 20  # both answers of every pair, whole
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1])
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        assert f"{rule} {policy_hash(re.search(f'<{tag}>(.*?)</{tag}>', text, re.S)[1])}" in policy
    assert "Does &lt;b&gt;no&lt;/b&gt; harm." in text and "The answer that shows more helpfulness." in text
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|innerHTML", "".join(map(asset, (sheet.SCRIPT, sheet.STYLE))))


def test_a_sheet_cell_is_no_formula():
    item = sheet.Item("q1", [{"role": "user", "content": "x"}], "=HYPERLINK(1)", "-1 or\n2")
    row = list(csv.reader(io.StringIO(sheet.sheet_csv(sheet.Sheet("s", [("x", "X.")], [item])))))[1]
    assert row == ["s", "", "q1", "user: x", "'=HYPERLINK(1)", "'-1 or\n2", ""]


def test_lone_surrogates_do_not_stop_a_study():
    made = sheet.Sheet("s", [("x", "X.")], [sheet.Item("q1", [{"role": "user", "content": "\ud800"}], "a", "b")])
    assert sheet.page(made).encode() and sheet.sheet_csv(made).encode()


def test_key_and_sheet_name_the_same_answers(exported):
    run, out, key, said = exported
    grid = run.out("evaluate").read_table("grid", schema.grid(NAMES)).to_pylist()
    texts = {r["grid_id"]: r["text"] for r in grid}
    rows = {r["item_id"]: r for r in sheet_rows(out)}
    assert [i["item_id"] for i in key["items"]] == list(rows)
    for item in key["items"]:
        assert [texts[item[s]["row_id"]] for s in "ab"] == [rows[item["item_id"]][f"answer_{s}"] for s in "ab"]
        assert item["a"]["scores"] == {"reward": {n: 2.0 * x for n, x in zip(NAMES, item["a"]["levels"], strict=True)}}
    assert said[0] == f"study {key['study']}: 10 pairs of 4 prompts, out of 16"


def test_round_trip_of_a_rater_who_follows_the_levels(exported, tmp_path):
    _, out, key, _ = exported
    items = {i["item_id"]: i for i in key["items"]}
    ann = fill(out, tmp_path / "ann.csv", lambda i, n: higher(items[i], n))
    call, found = bring_in(out, ann)
    assert call.exit_code == 0, call.output
    made = json.loads((found / "agreement.json").read_text())
    assert made["ratings"] == {"given": 20, "used": 20, "skipped": 0, "quarantined": {}, "missing": 0}
    for name, values in made["attributes"].items():
        assert values["agreement"].keys() == {"all"} and values["agreement"]["all"].keys() == {"requested", "reward"}
        asked = sum(higher(i, name) != "tie" for i in items.values())
        for against in values["agreement"]["all"].values():
            assert against["num_decided"] == asked and against["num_ties"] == 0
            assert against["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}
            assert against["kappa"]["value"] == against["order_accuracy"]["value"] == against["alpha"]["value"] == 1.0
        assert values["alpha_nominal"]["value"] is None  # one rater agrees with nobody
    assert f"| all | reward | 5 | 0 |{' 1.00 [1.00, 1.00] |' * 4}\n" in call.output
    assert (found / "agreement.md").read_text() == call.output


def test_two_raters_who_oppose_each_other(exported, tmp_path):
    _, out, key, _ = exported
    items, opposite = {i["item_id"]: i for i in key["items"]}, {"A": "B", "B": "A", "tie": "tie"}
    ann = fill(out, tmp_path / "ann.csv", lambda i, n: higher(items[i], n))
    bob = fill(out, tmp_path / "b.csv", lambda i, n: opposite[higher(items[i], n)], rater="bob")
    _, found = bring_in(out, ann, bob)
    made = json.loads((found / "agreement.json").read_text())
    assert made["raters"].keys() == {"ann", "bob"}  # the file's name where the sheet has none
    assert [made["raters"][r]["requested"]["safety"]["accuracy"] for r in ("ann", "bob")] == [1.0, 0.0]
    values = made["attributes"]["safety"]
    assert values["agreement"]["all"]["requested"]["accuracy"]["value"] == 0.5
    assert values["agreement"]["all"]["requested"]["kappa"]["value"] == pytest.approx(0.0)
    # per rating: 10 ties of both, 5 right, 5 wrong, and A and B wanted 3 and 2 times: margins 11, 20, 9 of 40
    # squared differences: 15.5^2, 14.5^2 to a tie, 30^2 across
    expected = 2 * (11 * 20 * 15.5**2 + 20 * 9 * 14.5**2 + 11 * 9 * 30**2)
    assert values["agreement"]["all"]["requested"]["alpha"]["value"] == pytest.approx(1 - 39 * 2 * 5 * 30**2 / expected)
    # half of the pairs ties of both, half opposed: o = [[0, 0, 5], [0, 10, 0], [5, 0, 0]], n = 20
    # alpha = 1 - 19 x 10 / (2 (5 x 10 + 5 x 5 + 10 x 5)); ordinal differences: B-tie and tie-A 7.5^2, B-A 15^2
    assert values["alpha_nominal"]["value"] == pytest.approx(1 - 19 * 10 / 250)
    ordinal = 1 - 19 * 10 * 15**2 / (2 * (50 * 7.5**2 + 25 * 15**2 + 50 * 7.5**2))
    assert values["alpha_ordinal"]["value"] == pytest.approx(ordinal)


def test_every_rating_is_used_or_set_aside_with_its_reason(exported, tmp_path):
    _, out, key, _ = exported
    names = [i["item_id"] for i in key["items"]]
    lines = [
        "study;rater;item_id;helpfulness;safety",  # as a spreadsheet with semicolons saves it
        f"{key['study']};ann;{names[0]};a; TIE ",
        f"{key['study']};ann;{names[1]};maybe;skip",
        f"{key['study']};ann;qunknown;A;",
        f"elsewhere;ann;{names[2]};A;B",
        f";ann;{names[0]};A;B",
    ]
    (tmp_path / "one.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    more = {"study": key["study"], "rater": "", "answers": {names[3]: {"safety": "B", "beauty": "A"}, names[4]: {"safety": None}}}
    (tmp_path / "cid.json").write_text(json.dumps(more))
    call, found = bring_in(out, tmp_path / "one.csv", tmp_path / "cid.json")
    assert call.exit_code == 0, call.output
    made = json.loads((found / "agreement.json").read_text())
    counts = made["ratings"]
    why = {"bad_value": 2, "conflict": 2, "duplicate": 1, "other_study": 2, "unknown_attribute": 1, "unknown_item": 1}
    assert counts["quarantined"] == why
    assert counts["given"] == 12 == counts["used"] + counts["skipped"] + sum(why.values())
    used = [tuple(r.values()) for r in csv.DictReader((found / "ratings.csv").open())]
    assert used == [
        ("ann", names[0], "helpfulness", "A"),
        ("ann", names[1], "safety", "skip"),
        ("cid", names[3], "safety", "B"),
    ]
    rows = list(csv.DictReader((found / "quarantine.csv").open()))
    assert {r["value"] for r in rows if r["reason"] == "conflict"} == {"TIE", "B"}
    # ann: 20 less two of the first pair, less skip; maybe counts as missing. cid: 20 less one
    assert counts["missing"] == len([r for r in rows if r["reason"] == "missing"]) == 17 + 19
    assert made["raters"]["ann"] | {"requested": 0} == {
        "used": 1,
        "ties": 0,
        "side_a": 1,
        "skipped": 1,
        "missing": 17,
        "requested": 0,
    }
    assert "quarantined: 2 bad_value, 2 conflict, 1 duplicate, 2 other_study" in call.output


def test_the_pool_gives_pairs_of_training_rows_with_their_scores(tmp_path):
    run = run_with_grid(tmp_path / "run")
    add_examples(run)
    made = CliRunner().invoke(main, ["annotate", "export", run.storage.uri, "--out", str(tmp_path / "s"), "--source", "pool"])
    assert made.exit_code == 0 and "60 pairs of 12 prompts, out of 72" in made.output, made.output
    key = json.loads((tmp_path / "s" / "key.json").read_text())
    assert {i["group"] for i in key["items"]} == {"pool"}
    items = {i["item_id"]: i for i in key["items"]}
    ann = fill(tmp_path / "s", tmp_path / "ann.csv", lambda i, n: higher(items[i], n))
    _, found = bring_in(tmp_path / "s", ann)
    values = json.loads((found / "agreement.json").read_text())["attributes"]["helpfulness"]["agreement"]["all"]
    assert values["requested"]["accuracy"]["value"] == 1.0 and values["reward"]["accuracy"]["value"] == 0.0


def test_judges_are_one_more_reference(tmp_path):
    run, out = run_with_judge(tmp_path / "run"), tmp_path / "study"
    study.export(run, study.Request(num_items=8), Storage(str(out)))
    items = {i["item_id"]: i for i in json.loads((out / "key.json").read_text())["items"]}
    _, found = bring_in(out, fill(out, tmp_path / "ann.csv", lambda i, n: higher(items[i], n)))
    against = json.loads((found / "agreement.json").read_text())["attributes"]["safety"]["agreement"]["all"]
    assert {who: v["accuracy"]["value"] for who, v in against.items()} == {"requested": 1.0, "reward": 1.0, "judge": 0.0}


def test_judges_that_scored_training_rows_are_a_reference_there_too(tmp_path):
    run, out = run_with_judge(tmp_path / "run"), tmp_path / "study"
    add_examples(run)
    rows = run.out("distill").read_table("examples", schema.examples(NAMES)).to_pylist()
    half = [r for r in rows if r["level_safety"] == 1 or r["level_helpfulness"] == 2]  # the judges lack one cell of four
    known = [{"response_id": text_id(r["prompt_id"], r["response"].strip())} | {f"score_{n}": 0.5 for n in NAMES} for r in half]
    run.out("evaluate").sub("judge").write_table(from_rows(known, schema.scores(NAMES)), "scores")
    study.export(run, study.Request(source="pool", num_items=72), Storage(str(out)))
    items = {i["item_id"]: i for i in json.loads((out / "key.json").read_text())["items"]}
    assert sum("judge" in i[s]["scores"] for i in items.values() for s in "ab") == 2 * 72 * 3 // 4
    _, found = bring_in(out, fill(out, tmp_path / "ann.csv", lambda i, n: "A"))
    judge = json.loads((found / "agreement.json").read_text())["attributes"]["safety"]["agreement"]["all"]["judge"]
    assert judge["num_decided"] == 0 and judge["accuracy"]["value"] is None  # its scores are all equal


def test_a_set_of_the_evaluation_has_prompts_of_its_own(tmp_path):
    run, out = run_with_judge(tmp_path / "run"), tmp_path / "study"
    study.export(run, study.Request(prompts="odd", num_items=9), Storage(str(out)))
    assert [r["prompt"] for r in sheet_rows(out)] == ["user: An odd question?"] * 4
    with pytest.raises(ConfigError, match=r"--prompts odder: no set of the evaluation, which has \['odd'\]"):
        study.export(run, study.Request(prompts="odder"), Storage(str(out)))


def test_methods_are_shown_side_by_side_and_told_apart_afterwards(tmp_path):
    run = run_with_grid(tmp_path / "run", methods=("clm", "exmate"))
    words = ["annotate", "export", run.storage.uri, "--out", str(tmp_path), "--items", "16"]
    assert CliRunner().invoke(main, [*words, "--method", "clm", "--method", "exmate"]).exit_code == 0
    key = json.loads((tmp_path / "key.json").read_text())
    items = {i["item_id"]: i for i in key["items"]}
    wrong = {"A": "B", "B": "A", "tie": "tie"}
    choose = lambda i, n: higher(items[i], n) if items[i]["group"] == "exmate" else wrong[higher(items[i], n)]  # noqa: E731
    _, found = bring_in(tmp_path, fill(tmp_path, tmp_path / "ann.csv", choose))
    by = json.loads((found / "agreement.json").read_text())["attributes"]["safety"]["agreement"]
    assert [by[g]["requested"]["accuracy"]["value"] for g in ("all", "clm", "exmate")] == [0.5, 0.0, 1.0]


def test_a_held_out_judge_is_one_more_reference_and_may_lack_scores():
    def side(levels, judge):
        return {"row_id": "r", "levels": levels, "scores": {"judge": {"x": judge}}}

    items = [
        {"item_id": f"q{i}", "prompt_id": f"p{i}", "group": "m", "a": side([2], j), "b": side([1], 0.5)}
        for i, j in enumerate((1.0, 0.0, None))
    ]
    key = {"study": "s", "source": "grid", "attributes": {"x": "X."}, "items": items}
    used = [answers.Rating("ann", f"q{i}", "x", "A") for i in range(3)]
    made = results.results(key, answers.Checked(3, used, [], [], []), 100, 0)["attributes"]["x"]["agreement"]["all"]
    assert made["requested"]["num_decided"] == 3 and made["requested"]["accuracy"]["value"] == 1.0
    assert made["judge"]["num_decided"] == 2 and made["judge"]["accuracy"]["value"] == 0.5


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--method", "ppo"], 2, "--method ppo: the grid has ['exmate', 'start']"),
        (["--define", "beauty=Nice."], 2, "--define beauty: no attribute"),
        (["--define", "safety"], 2, 'write it as NAME="what it means"'),
        (["--method", "start"], 3, "no two answers to one prompt can be compared; left out: {'pairs of one text': 16}"),
        (["--source", "pool"], 2, "no finished distillation"),
    ],
)
def test_export_says_what_is_wrong(tmp_path, words, code, said):
    run = run_with_grid(tmp_path / "run")
    call = CliRunner().invoke(main, ["annotate", "export", run.storage.uri, "--out", str(tmp_path / "s"), *words])
    assert (call.exit_code, said in call.output) == (code, True), call.output


def test_export_needs_an_evaluation_and_takes_a_job_file(tmp_path):
    run = run_with_grid(tmp_path / "run")
    job = run.storage.path("job.yaml")
    assert CliRunner().invoke(main, ["annotate", "export", job, "--out", str(tmp_path / "s"), "--items", "3"]).exit_code == 0
    run.out("evaluate").remove("result.json")
    call = CliRunner().invoke(main, ["annotate", "export", job, "--out", str(tmp_path / "s")])
    assert call.exit_code == 2 and "no finished evaluation" in call.output


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "id,helpfulness\nq,A\n", "no column item_id among ['id', 'helpfulness']"),
        ("a.json", "[]", "not a json file of ratings"),
        ("a.json", '{"answers": {"q1": "A"}}', "not a json file of ratings"),
        ("a.csv", b"\xff\xfe\x00", "cannot read the ratings"),
    ],
)
def test_a_file_that_holds_no_ratings_is_named(exported, tmp_path, name, content, said):
    _, out, _, _ = exported
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    call, _ = bring_in(out, tmp_path / name)
    assert call.exit_code == 3 and said in call.output and name in call.output


def test_without_a_single_rating_that_counts_nothing_is_computed_and_the_reasons_are_kept(exported, tmp_path):
    _, out, _, _ = exported
    call, found = bring_in(out, fill(out, tmp_path / "ann.csv", lambda i, n: "?"))
    assert call.exit_code == 3 and "'bad_value': 20" in call.output
    assert len((found / "quarantine.csv").read_text().splitlines()) == 1 + 20 + 20


def test_only_a_key_is_a_key(tmp_path):
    (tmp_path / "key.json").write_text("{}")
    call, _ = bring_in(tmp_path, tmp_path / "key.json")
    assert call.exit_code == 3 and "not the key of a study" in call.output
    with pytest.raises(DataError, match="key version 7"):
        check_key({"study": "s", "version": 7, "attributes": {}, "items": []}, "k")
    with pytest.raises(ConfigError):
        study.definitions(["safety=  "])
