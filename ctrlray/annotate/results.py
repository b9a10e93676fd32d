"""What a study found: agreement of raters with each other, with the levels that were asked for, and with each reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctrlray.annotate.answers import Checked, Rating
from ctrlray.errors import DataError
from ctrlray.metrics import agreement as agree
from ctrlray.metrics.bootstrap import Floats, Ints, draws, interval, numbers

REQUESTED = "requested"
_CODES = {"A": agree.A_BETTER, "tie": agree.TIE, "B": agree.B_BETTER}
_Items = Mapping[str, Mapping[str, Any]]


def results(key: Mapping[str, Any], checked: Checked, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """JSON-ready; intervals are `{"value", "low", "high"}` over resampled prompts, null where undefined.

    Per attribute: `alpha_nominal` and `alpha_ordinal` between raters (B < tie < A; skipped and missing ratings are missing
    values), `ties`, the share of ties, and per group of answers (`all` and each method) and reference: `accuracy` and
    `kappa` where rater and reference both choose a side, `order_accuracy` with a rater's tie counted half, and `alpha`, ordinal,
    with ties of both, the reference as a second observer of every rating. Raises DataError when no rating counts.
    """
    if not checked.used:
        raise DataError(f"no rating counts: {checked.counts()}; look at quarantine.csv")
    items = {i["item_id"]: i for i in key["items"]}
    prompt_ids = [i["prompt_id"] for i in items.values()]
    prompt_I, num_prompts = numbers(prompt_ids, len(prompt_ids), "annotate")
    prompts = dict(zip(items, prompt_I.tolist(), strict=True))
    weights_BP = draws(num_prompts, num_bootstrap, seed)
    found = {}
    for axis, name in enumerate(key["attributes"]):
        ratings = [r for r in checked.used if r.attribute == name]
        skipped = [r for r in checked.skipped if r.attribute == name]
        found[name] = _attribute(axis, name, ratings, items, prompts, weights_BP) | {"skipped": len(skipped)}
    raters = sorted({r.rater for r in (*checked.used, *checked.skipped)})
    return {
        "study": key["study"],
        "source": key["source"],
        "num_items": len(items),
        "num_prompts": num_prompts,
        "ratings": checked.counts(),
        "attributes": found,
        "raters": {who: _rater(who, checked, key, items) for who in raters},
    }


def _attribute(
    axis: int, name: str, ratings: Sequence[Rating], items: _Items, prompts: Mapping[str, int], weights_BP: Floats
) -> dict[str, Any]:
    counts_PKK = _coincidences(ratings, prompts, weights_BP.shape[1])
    pairs_BKK = agree.drawn(weights_BP, counts_PKK)
    methods = sorted({i["group"] for i in items.values()})
    groups = {"all": ratings} | {m: [r for r in ratings if items[r.item_id]["group"] == m] for m in methods if len(methods) > 1}
    return {
        "num_ratings": len(ratings),
        "num_raters": len({r.rater for r in ratings}),
        "ties": sum(r.value == "tie" for r in ratings) / len(ratings) if ratings else None,
        "alpha_nominal": interval(agree.krippendorff_alpha(pairs_BKK, "nominal")).as_json(),
        "alpha_ordinal": interval(agree.krippendorff_alpha(pairs_BKK, "ordinal")).as_json(),
        "agreement": {
            group: {
                who: _agreement(mine, {i: reference(item, who, axis, name) for i, item in items.items()}, prompts, weights_BP)
                for who in _references(items, name)
            }
            for group, mine in groups.items()
        },
    }


def _references(items: _Items, name: str) -> list[str]:
    """Who else says which answer has more of an attribute: the requested levels, then the scorers by name."""
    return [REQUESTED, *sorted({who for i in items.values() for who, by in i["a"]["scores"].items() if name in by})]


def reference(item: Mapping[str, Any], who: str, axis: int, name: str) -> int:
    """The choice of the requested levels, or of a scorer, as a category; missing where a scorer has no score."""
    if who == REQUESTED:
        a, b = item["a"]["levels"][axis], item["b"]["levels"][axis]
    else:
        a, b = (item[side]["scores"].get(who, {}).get(name) for side in "ab")
    if a is None or b is None:
        return agree.MISSING
    return agree.TIE + int(np.sign(a - b))


def _agreement(
    ratings: Sequence[Rating], choices: Mapping[str, int], prompts: Mapping[str, int], weights_BP: Floats
) -> dict[str, Any]:
    """Agreement of single ratings with a reference; the prompts that are resampled hold all raters' ratings of a pair."""
    rated_N = _ints(_CODES[r.value] for r in ratings)
    reference_N = _ints(choices[r.item_id] for r in ratings)
    prompt_N = _ints(prompts[r.item_id] for r in ratings)
    counts_BKK = agree.drawn(weights_BP, agree.confusions(rated_N, reference_N, prompt_N, weights_BP.shape[1]))
    sides_BKK = agree.decided(counts_BKK)
    return {
        "num_decided": int(sides_BKK[0].sum()),
        "num_ties": int(counts_BKK[0, agree.TIE, [agree.B_BETTER, agree.A_BETTER]].sum()),
        "accuracy": interval(agree.accuracy(sides_BKK)).as_json(),
        "kappa": interval(agree.cohen_kappa(sides_BKK)).as_json(),
        "order_accuracy": interval(agree.order_accuracy(counts_BKK)).as_json(),
        "alpha": interval(agree.krippendorff_alpha(agree.both_ways(counts_BKK), "ordinal")).as_json(),
    }


def _coincidences(ratings: Sequence[Rating], prompts: Mapping[str, int], num_prompts: int) -> Floats:
    raters = sorted({r.rater for r in ratings})
    column = {item: i for i, item in enumerate(prompts)}
    ratings_RU = np.full((len(raters), len(column)), agree.MISSING, np.int64)
    for r in ratings:
        ratings_RU[raters.index(r.rater), column[r.item_id]] = _CODES[r.value]
    return agree.coincidences(ratings_RU, _ints(prompts.values()), num_prompts)


def _rater(who: str, checked: Checked, key: Mapping[str, Any], items: _Items) -> dict[str, Any]:
    """One rater's numbers, to find one who did something else: agreement with the requested levels, by attribute."""
    mine = [r for r in checked.used if r.rater == who]
    found: dict[str, Any] = {}
    for axis, name in enumerate(key["attributes"]):
        sides = [(_CODES[r.value], reference(items[r.item_id], REQUESTED, axis, name)) for r in mine if r.attribute == name]
        both = [given == asked for given, asked in sides if agree.TIE not in (given, asked)]
        found[name] = {"num_decided": len(both), "accuracy": sum(both) / len(both) if both else None}
    skipped = sum(r.rater == who for r in checked.skipped)
    missing = sum(rater == who for rater, *_ in checked.missing)
    ties, chose_a = (sum(r.value == v for r in mine) for v in ("tie", "A"))
    return {"used": len(mine), "ties": ties, "side_a": chose_a, "skipped": skipped, "missing": missing, REQUESTED: found}


def _ints(values: Any) -> Ints:
    return np.fromiter(values, np.int64)


def text(found: Mapping[str, Any]) -> str:
    """The results as Markdown tables."""
    counts = found["ratings"]
    quarantined = ", ".join(f"{n} {reason}" for reason, n in counts["quarantined"].items()) or "none"
    lines = [
        f"# Study {found['study']}",
        "",
        f"{found['num_items']} pairs of {found['num_prompts']} prompts ({found['source']}), {len(found['raters'])} raters. "
        f"Ratings: {counts['given']} given, {counts['used']} used, {counts['skipped']} skipped, quarantined: {quarantined}; "
        f"{counts['missing']} missing. Intervals: 95%, over resampled prompts.",
    ]
    for name, values in found["attributes"].items():
        lines += ["", f"## {name}", "", *_attribute_lines(values)]
    lines += ["", "## Raters", "", *_rater_lines(found)]
    return "\n".join(lines) + "\n"


def _attribute_lines(values: Mapping[str, Any]) -> list[str]:
    ties = "-" if values["ties"] is None else f"{values['ties']:.0%}"
    lines = [
        f"{values['num_ratings']} ratings by {values['num_raters']} raters, {ties} ties, {values['skipped']} skipped. "
        f"Krippendorff's alpha between raters: nominal {_shown(values['alpha_nominal'])}, "
        f"ordinal {_shown(values['alpha_ordinal'])}.",
        "",
        "| answers | raters against | decided | ties | accuracy | Cohen's kappa | order accuracy, ties half | ordinal alpha |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group, by_reference in values["agreement"].items():
        for who, v in by_reference.items():
            cells = [_shown(v[k]) for k in ("accuracy", "kappa", "order_accuracy", "alpha")]
            lines.append(f"| {group} | {who} | {v['num_decided']} | {v['num_ties']} | {' | '.join(cells)} |")
    return lines


def _rater_lines(found: Mapping[str, Any]) -> list[str]:
    names = list(found["attributes"])
    head = ["rater", "used", "chose A", "ties", "skipped", "missing", *(f"{n}: accuracy against requested" for n in names)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for who, v in found["raters"].items():
        asked = [f"{r['accuracy']:.2f} of {r['num_decided']}" if r["num_decided"] else "-" for r in v[REQUESTED].values()]
        cells = [who.replace("|", "/"), v["used"], v["side_a"], v["ties"], v["skipped"], v["missing"], *asked]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _shown(value: Mapping[str, float | None]) -> str:
    if value["value"] is None:
        return "-"
    bounds = "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{value['value']:.2f}{bounds}"
