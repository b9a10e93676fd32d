"""Finding the rows that end processes, by hand and over random batches."""

import random

import pytest

from ctrlray.isolate import plan
from ctrlray.stages.journal import Journal
from ctrlray.tables import Storage


def test_plan_by_hand():
    everything = list(range(96))
    assert plan(everything, []) == ([everything], [])
    groups, killers = plan(everything, [everything])
    assert [len(g) for g in groups] == [12] * 8 and killers == []
    groups, killers = plan(everything, [everything, list(range(24, 36))])
    assert [g for g in groups if 24 <= g[0] < 36] == [[i] for i in range(24, 36)] and killers == []
    groups, killers = plan(everything[24:], [everything, list(range(24, 36)), [30]])
    assert killers == [] and [30] in groups  # alone once: perhaps its node was taken away
    groups, killers = plan(everything[24:], [everything, list(range(24, 36)), [30], [30]])
    assert killers == [30] and sorted(r for g in groups for r in g) == [r for r in range(24, 96) if r != 30]
    assert plan([], []) == ([], []) and plan([0], [[0], [0]]) == ([], [0])


@pytest.mark.parametrize("seed", range(5))
def test_exactly_the_guilty_rows_are_left_out(tmp_path, seed):
    """Each "process" is a call that an exception ends; the next one finds the notes."""
    rng = random.Random(seed)
    size = rng.randint(1, 100)
    ids = [f"r{i}" for i in range(size)]
    guilty = set(rng.sample(range(size), min(rng.randint(0, 3), size)))
    journal, kept, deaths = Journal(Storage(str(tmp_path))), [], 0

    def work(group):
        if guilty & set(group):
            raise SystemExit
        kept.extend(ids[i] for i in group)

    while True:
        try:
            _, killers = journal.run(ids, work, lambda: kept)
            break
        except SystemExit:
            deaths += 1
    assert set(killers) == guilty and sorted(kept) == sorted(set(ids) - {ids[g] for g in guilty})
    assert deaths <= 1 + 4 * len(guilty)


def test_clear_forgets(tmp_path):
    journal = Journal(Storage(str(tmp_path / "notes")))
    journal.clear()
    with pytest.raises(ZeroDivisionError):
        journal.run(["a"], lambda group: 1 / 0)
    assert journal.run(["a"], len) == ([1], {})  # an error is no death
    for _ in range(2):
        with pytest.raises(SystemExit):
            journal.run(["a"], lambda group: (_ for _ in ()).throw(SystemExit))
    results, killers = journal.run(["a"], len)
    assert results == [] and "without a word" in killers[0]
    journal.clear()
    assert journal.run(["a"], len) == ([1], {})
