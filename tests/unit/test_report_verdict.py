"""What the report says in words: by intervals alone, and in the judge's eyes too."""

from ctrlray.stages.report_verdict import verdict
from tests.reports import NAMES, ci, method_metrics


def test_verdict_goes_by_intervals():
    metrics = {"start": method_metrics(0.0, NAMES[:2], 3), "exmate": method_metrics(0.2, NAMES[:2], 3)}
    # pairwise of exmate: helpfulness 0.60 +- 0.06 excludes 0.5, harmlessness 0.55 +- 0.06 does not
    found = verdict(NAMES[:2], metrics, {"exmate": {**ci(0.08, 0.03), "num_examples": 38}}, {})
    assert "helpfulness follows the dial; harmlessness does not measurably" in found.headline
    assert "reads its control codes" in found.headline
    tones = {(f.method, f.text.split()[0]): f.tone for f in found.findings}
    assert tones["exmate", "helpfulness"] == "good" and tones["exmate", "harmlessness"] == "muted"
    assert tones["exmate", "A"] == "good" and [f.tone for f in found.baselines] == ["muted", "muted"]
    assert any("Only 16 prompts" in c for c in found.caveats)


def test_verdict_admits_failure_and_reversal():
    metrics = {"exmate": method_metrics(-0.4, NAMES[:1], 3)}
    found = verdict(NAMES[:1], metrics, {"exmate": {**ci(0.0, 0.01), "num_examples": 9}}, {})
    assert "shows no dial" in found.headline and "does not measurably read" in found.headline
    assert [f.tone for f in found.findings] == ["bad", "muted"]


def test_verdict_says_when_length_explains_the_dial():
    metrics = {"exmate": method_metrics(0.4, NAMES[:1], 3)}
    metrics["exmate"]["attributes"]["helpfulness"]["length_adjusted"]["pairwise"] = ci(0.51, 0.05)
    assert "With answer length held constant this is no longer shown" in verdict(NAMES[:1], metrics, {}, {}).findings[0].text


def test_verdict_asks_the_judge():
    metrics = {"exmate": method_metrics(0.4, NAMES[:2], 3)}  # 0.70 and 0.60, each +- 0.06
    judge = {"exmate": {"attributes": {"helpfulness": {"pairwise": ci(0.6, 0.05)}, "harmlessness": {"pairwise": ci(0.5, 0.05)}}}}
    found = verdict(NAMES[:2], metrics, {}, judge)
    assert "helpfulness and harmlessness follow the dial (harmlessness not in the judge's eyes)" in found.headline
    assert "The judge agrees (60%, 55.0% to 65.0%)." in found.findings[0].text
    assert "The judge does not see it (50%, 45.0% to 55.0%)." in found.findings[1].text
    judge["exmate"]["attributes"]["helpfulness"]["pairwise"] = ci(0.4, 0.05)
    assert "The judge sees the opposite (40%" in verdict(NAMES[:2], metrics, {}, judge).findings[0].text
    assert "judge" not in verdict(NAMES[:2], metrics, {}, {}).headline


def test_verdict_names_a_code_that_is_read_wrongly():
    (found,) = verdict(NAMES[:1], {}, {"exmate": {**ci(-0.05, 0.01), "num_examples": 9}}, {}).findings
    assert "more likely" in found.text and found.tone == "bad"


def test_verdict_names_what_else_a_dial_moves_and_not_itself():
    texts = [f.text for f in verdict(NAMES[:2], {"exmate": method_metrics(0.4, NAMES[:2], 3)}, {}, {}).findings]
    assert "It also moves harmlessness by" in texts[0] and "It also moves helpfulness by" in texts[1]
    assert "helpfulness by" not in texts[0]
