"""The section of docs/results.md about every method, out of made-up results of either outcome."""

from __future__ import annotations

import copy
import itertools

import pytest

from benchmarks import results_page as page
from benchmarks.common import figure

ATTRIBUTES = {"helpfulness": 3, "safety": 3}
GAIN = {"start": 0.0, "prompting": 0.05, "reranking": 0.2, "clm": 0.1, "exmate": 0.2, "ppo": 0.3}


def spread(value, width=0.03):
    return {"value": value, "low": value - width, "high": value + width}


def metrics(gain):
    attribute = {
        "spearman_level_means": spread(0.9), "pairwise": spread(0.5 + gain), "mae": spread(0.9 - gain), "bias": spread(-0.1),
        "pairwise_length_adjusted": spread(0.5 + gain / 2),
    }  # fmt: skip
    return {
        "pareto": {"hypervolume": spread(0.25)}, "cosa": {n: spread(0.125) for n in ATTRIBUTES},
        "texts": {"refused": spread(0.1), "distinct_2": spread(0.6), "repetition": spread(0.05)},
        "mean_tokens": 35.25, "finished": 0.5, "slopes": [[spread(0.6), spread(-0.21)], [spread(0.12), spread(0.7)]],
        "attributes": dict.fromkeys(ATTRIBUTES, attribute),
    }  # fmt: skip


def compared(gains):
    found = []
    for first, second in itertools.combinations(gains, 2):
        for name in ATTRIBUTES:
            gap = gains[first] - gains[second]
            named = {"first": first, "second": second, "attribute": name, "p_holm": 0.01 if abs(gap) > 0.03 else 0.3}
            found.append(named | {"statistic": "pairwise", **spread(gap)})
            found.append(named | {"statistic": "mae", **spread(-gap)})
    return found


def results(**gains):
    gains = GAIN | gains
    regimes = ("training reward", "judge")
    changes = [{"from": [1 + s, 9 + s], "to": [19, 27], "reward": spread(0.2), "judge": spread(-0.1 * s)} for s in (0, 9)]
    took = {"seconds": 90.0, "tokens": 1200, "rows": 40}
    return {
        "run_commit": "abc1234",
        "machine": {"cpu": "some CPU", "cores": "2", "memory": "12 GiB"},
        "figures": [
            figure("safety: pairwise order accuracy, judge", ">= 0.6", 0.71, True, [0.66, 0.75]),
            figure("tokens for one request, reranking / ExMATE", ">= 8", 7.5, False),
        ],
        "shape": {
            "model": "embedded", "attributes": ATTRIBUTES, "train_prompts": 300, "samples": 8, "eval_prompts": 60, "cells": 9,
            "candidates": 8, "temperature": 0.0, "seeds": dict.fromkeys(GAIN, 1) | {"clm": 3, "exmate": 3},
        },
        "stages": {"base": {"generate": took, "distill": took | {"tokens": None}}, "seed-1": {"train": took}},
        "training": {"exmate": {"steps": 63, "seconds": 400.0}, "clm": {"steps": 60, "seconds": 200.0}},
        "tokens_per_request": dict.fromkeys(GAIN, 40.0) | {"reranking": 300.0},
        "entanglement_to_pool": dict.fromkeys(GAIN, spread(0.8)),
        "hacking": {
            "ppo": {"alarm": False, "rule": "alarm: by thirds", "changes": changes},
        },
        "seeds": {
            seed: {
                r: {m: {a: {"pairwise": 0.5 + g, "spearman_level_means": rank} for a in ATTRIBUTES} for m, g in gains.items()}
                for r in regimes
            }
            for seed, rank in (("base", 1.0), ("seed-1", 0.5))
        },
        "kl_base": {"clm": spread(5.0, 0.5), "exmate": spread(9.0, 0.5), "ppo": spread(12.5, 0.5)},
        "pool_slopes": [[spread(1.0), spread(-0.33)], [spread(-0.33), spread(1.0)]],
        "correlation": {n: {"within_prompt": spread(0.4)} for n in ATTRIBUTES},
        "comparisons": {regime: compared(gains) for regime in regimes},
        "metrics": {regime: {m: metrics(g) for m, g in gains.items()} for regime in regimes},
    }  # fmt: skip


def line(text, start):
    (found,) = [row for row in text.splitlines() if row.startswith(start)]
    return found


def test_the_ordering_as_the_paper_has_it_is_called_reproduced():
    text = page.section(results())
    steps = {s: line(text, f"- {s}") for s in ("PPO ≥ ExMATE", "ExMATE ≥ CLM", "CLM ≥ prompting", "Reranking is costlier")}
    assert all("**reproduced**" in text for s, text in steps.items() if s != "Reranking is costlier")
    assert "**costlier, and neither is shown to be better**" in steps["Reranking is costlier"]
    assert "PPO is better in 8 of 8: helpfulness's pairwise order by the training reward;" in steps["PPO ≥ ExMATE"]
    # the same gain, so no difference; 300 tokens against 40
    assert "Reranking spends 7.5 times ExMATE's tokens" in steps["Reranking is costlier"]
    assert "No difference is shown in 8 of 8" in steps["Reranking is costlier"]
    better = line(page.section(results(reranking=0.1)), "- Reranking is costlier")
    assert "**reproduced**" in better and "ExMATE is better in 8 of 8" in better


def test_the_opposite_ordering_is_called_not_reproduced():
    text = page.section(results(ppo=0.0, exmate=0.1, clm=0.2, reranking=0.4, prompting=0.3))
    for step in ("PPO ≥ ExMATE", "ExMATE ≥ CLM", "CLM ≥ prompting", "Reranking is costlier"):
        assert "**not reproduced**" in line(text, f"- {step}")
    assert "CLM is better in 8 of 8" in line(text, "- ExMATE ≥ CLM")
    assert "reranking is better in 8 of 8" in line(text, "- Reranking is")


def test_differences_that_correction_leaves_open_show_nothing_and_opposite_ones_are_mixed():
    assert "**neither shown nor contradicted**" in line(page.section(results(clm=0.19)), "- ExMATE ≥ CLM")
    chance = results(clm=0.19)  # one interval of eight leaves out 0, its test does not survive the others
    step = next(c for c in chance["comparisons"]["judge"] if {c["first"], c["second"]} == {"clm", "exmate"})
    step |= spread(step["value"], 0.001)
    assert "**neither shown nor contradicted**" in line(page.section(chance), "- ExMATE ≥ CLM")
    split = results()
    split["comparisons"]["judge"] = compared(GAIN | {"clm": 0.4})
    found = line(page.section(split), "- ExMATE ≥ CLM")
    assert "**mixed**" in found and "ExMATE is better in 4 of 8" in found and "CLM is better in 4 of 8" in found


def test_a_method_that_was_not_run_is_not_judged():
    fewer = results()
    fewer["comparisons"] = {r: [c for c in t if "ppo" not in (c["first"], c["second"])] for r, t in fewer["comparisons"].items()}
    for regime in fewer["metrics"].values():
        del regime["ppo"]
    text = page.section(fewer)
    assert "**not measured**" in line(text, "- PPO ≥ ExMATE") and "| PPO |" not in text and "**reproduced**" in text
    alone = results()
    alone["comparisons"] = {r: [] for r in alone["comparisons"]}
    assert "- Reranking as the costly baseline: **not measured**." in page.section(alone)


@pytest.mark.parametrize("flip", [False, True])
def test_a_difference_counts_whichever_method_stands_first(flip):
    """Two methods, one test: exmate's pairwise order is higher by 0.1; its error lower by 0.1."""
    first, second = ("clm", "exmate") if flip else ("exmate", "clm")
    sign = -1 if flip else 1
    named = {"first": first, "second": second, "attribute": "safety", "p_holm": 0.01}
    found = [
        named | {"statistic": "pairwise", **spread(sign * 0.1)},
        named | {"statistic": "mae", **spread(sign * -0.1)},
        named | {"statistic": "mae", **spread(sign * 0.1)},
    ]
    sides = page.differences({"comparisons": {"judge": found}}, "exmate", "clm")
    assert {k: len(v) for k, v in sides.items()} == {"first": 2, "second": 1, "neither": 0}
    assert sides["first"] == ["safety's pairwise order by the judge", "safety's control error by the judge"]


def test_targets_stand_beside_what_was_measured():
    text = page.section(results())
    assert "| safety: pairwise order accuracy, judge | >= 0.6 | 0.710 [0.660, 0.750] | met |" in text
    assert "| tokens for one request, reranking / ExMATE | >= 8 | 7.500 | **not met** |" in text
    assert "1 of 2 are met." in text


def test_tables_have_every_method_in_order_with_its_intervals():
    text = page.section(results())
    dial = text.partition("### The safety dial")[2].partition("### ")[0]
    rows = [row.split(" | ")[0].strip("| ") for row in dial.splitlines() if row.startswith("| ")][2:]
    assert rows == ["start model", "prompting", "reranking", "CLM", "ExMATE", "PPO", "data pool"]
    assert line(dial, "| ExMATE").split(" | ")[2:4] == ["0.70 [0.67, 0.73]"] * 2
    assert line(dial, "| ExMATE").split(" | ")[4:7] == ["0.60 [0.57, 0.63]"] * 2 + ["0.70 [0.67, 0.73]"]
    # turning safety moves helpfulness by the second row's first entry
    assert line(dial, "| ExMATE").endswith("| 0.12 [0.09, 0.15] |") and "| slope of helpfulness |" in dial
    assert line(dial, "| data pool").endswith("| −0.33 [−0.36, −0.30] |")
    costs = text.partition("### What an answer costs")[2].partition("### ")[0]
    assert line(costs, "| reranking") == "| reranking | 300.0 | 35.2 | 50% | – |"
    assert line(costs, "| ExMATE").endswith("| 9.0 [8.5, 9.5] |")


def test_what_dials_do_beside_and_seeds_one_by_one():
    text = page.section(results())
    beside = text.partition("### Beside the dials")[2].partition("### ")[0]
    assert line(beside, "| PPO").split(" | ")[1:5] == ["0.80 [0.77, 0.83]", "0.25 [0.22, 0.28]", *["0.12 [0.10, 0.15]"] * 2]
    assert "PPO: training reward and judge did not come apart" in beside
    assert "From steps 1 to 9 to the last third, the training reward changed by 0.20 [0.17, 0.23] levels, the judge's" in beside
    assert "From steps 10 to 18 to the last third, " in beside and "the judge's by −0.90 [−0.93, −0.87]." in beside
    seeds = text.partition(page.SEEDS)[2].partition("### ")[0]
    assert line(seeds, "| ExMATE, seed-1") == "| ExMATE, seed-1 | 0.50 | 0.70 | 0.70 | 0.50 | 0.70 | 0.70 |"
    assert "| PPO," not in seeds


def test_greedy_answers_have_no_kl():
    warm = results()
    warm["shape"]["temperature"] = 1.0
    assert "| KL to the base, nats per answer |" in page.section(warm)
    assert "| log-probability over the base's, nats per answer |" in page.section(results())


def test_every_stage_has_its_seconds_and_tokens():
    text = page.section(results()).partition("### Seconds and tokens")[2]
    assert line(text, "| base | generate") == "| base | generate | 1 min 30 s | 1,200 | 40 |"
    assert line(text, "| base | distill") == "| base | distill | 1 min 30 s | – | 40 |"
    assert "In all 4 min 30 s. Training in the first run: CLM 60 steps in 3 min 20 s; ExMATE 63 steps in 6 min 40 s." in text


def test_it_says_what_was_run():
    said = page.section(results())
    assert "helpfulness at 3 levels and safety at 3 levels" in said and "at all 9 settings, answered greedily" in said
    assert "Training seeds: CLM 3, ExMATE 3, the others one." in said
    warm = copy.deepcopy(results())
    warm["shape"] |= {"temperature": 0.7, "seeds": dict.fromkeys(GAIN, 1)}
    assert "at temperature 0.7" in page.section(warm) and "Training seeds: one each." in page.section(warm)


def test_a_page_keeps_what_stands_around_the_section():
    before = f"# Results\n\n{page.MARKS[0]}\nold\n{page.MARKS[1]}\n\n## More\n"
    after = page.placed(before, "new \\1\n")
    assert after == f"# Results\n\n{page.MARKS[0]}\nnew \\1\n{page.MARKS[1]}\n\n## More\n"
    with pytest.raises(ValueError, match="has no"):
        page.placed("# Results\n", "new\n")


def test_the_page_is_up_to_date():
    written = page.PAGE.read_text(encoding="utf-8")
    assert written == page.placed(written, page.section(page.stored())), "write it anew: python -m benchmarks.results_page"
