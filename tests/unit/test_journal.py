"""Finding the rows that end processes, by hand and over random batches."""

import os
import random

import pytest

from ctrlray.errors import ClusterError
from ctrlray.isolate import plan
from ctrlray.stages import journal as notes
from ctrlray.stages.journal import Journal
from ctrlray.tables import Storage


def test_plan_by_hand():
    everything = list(range(96))
    assert plan(everything, []) == ([everything], [])
    groups, killers = plan(everything, [everything])
    assert [len(g) for g in groups] == [12] * 8 and killers == []
    groups, killers = plan(everything, [everything, list(range(24, 36))])
    assert [g for g in groups if 24 <= g[0] < 36] == [[i] for i in range(24, 36)] and killers == []
    assert [len(g) for g in groups] == [12] * 7 + [1] * 12 and groups[0][0] == 0  # what nobody suspects comes first
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
    for _ in range(3):
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


@pytest.fixture
def mortal(monkeypatch):
    """Processes end by an exception here."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)


def test_a_row_that_was_once_alone_when_its_node_went_away_is_tried_again(tmp_path):
    journal, ids = Journal(Storage(str(tmp_path))), ["a", "b", "c"]
    ends_at = [[0, 1, 2], [1]]  # each once

    def work(group):
        if group in ends_at:
            ends_at.remove(group)
            raise SystemExit
        return group

    for _ in range(2):
        with pytest.raises(SystemExit):
            journal.run(ids, work)
    assert journal.run(ids, work) == ([[0], [1], [2]], {})


def test_last_words_are_kept_for_the_row_that_was_alone(tmp_path, mortal):
    journal = Journal(Storage(str(tmp_path)))

    def work(group):
        if 1 in group:
            journal.die(ValueError("token -7 is out of range"))
        return group

    for _ in range(3):  # all together, then row 1 alone, twice
        with pytest.raises(SystemExit):
            journal.run(["a", "b"], work)
    assert journal.run(["a", "b"], work) == ([[0]], {1: "ValueError: token -7 is out of range"})
    assert journal.run(["b", "a"], len) == ([2], {})  # row numbers of another batch


def test_last_words_of_an_actor_are_found_whichever_batch_it_is_handed_next(tmp_path, mortal, monkeypatch):
    """Ray may hand a restarted actor another batch than the one that it ended on; another actor's words are not its own."""
    out = Storage(str(tmp_path))
    for actor, words in (("a", "mine"), ("b", "the other's")):
        monkeypatch.setattr(notes, "_actor", lambda actor=actor: actor)
        journal = Journal(out)
        assert journal.start(max_restarts=0)
        with pytest.raises(SystemExit):
            journal.run([actor], lambda group, j=journal, w=words: j.die(ValueError(w)))
    for actor, words in (("a", "ValueError: mine"), ("b", "ValueError: the other's"), ("c", "before it took up work")):
        monkeypatch.setattr(notes, "_actor", lambda actor=actor: actor)
        while (journal := Journal(out)).start(max_restarts=0):
            pass
        with pytest.raises(ClusterError, match=f"the last one with: .*{words}"):
            journal.run(["next"], len)


def test_what_ended_a_process_long_ago_is_not_why_the_last_one_ended(tmp_path, mortal, monkeypatch):
    """A row that ended it is set aside and others are finished; then it ends before it takes anything up."""
    monkeypatch.setattr(notes, "_now", lambda: next(clock))
    clock = (f"2026-01-01T{i // 60:02}:{i % 60:02}:00+00:00" for i in range(1000))
    out, deaths = Storage(str(tmp_path)), 0
    while True:
        journal = Journal(out)
        assert journal.start(max_restarts=3)
        try:
            journal.run(["a", "b"], lambda group, j=journal: j.die(ValueError("odd row")) if 1 in group else None)
            break
        except SystemExit:
            deaths += 1
    assert deaths == 3
    while (journal := Journal(out)).start(max_restarts=3):
        pass
    with pytest.raises(ClusterError, match=r"ended 4 times in a row .*before it took up work"):
        journal.run(["next"], len)


def test_notes_name_the_oldest_work_first_and_the_row_it_began_with(tmp_path, mortal, monkeypatch):
    journal = Journal(Storage(str(tmp_path)))
    for ids, now in ((["late", "x"], "09:05"), (["early", "y"], "09:00")):
        monkeypatch.setattr(notes, "_now", lambda now=now: now)
        with pytest.raises(SystemExit):
            journal.run(ids, lambda group: journal.die(KeyError("q")))
    found = journal.in_flight()
    assert [(n["first"], n["since"], n["rows"], n["error"]) for n in found] == [
        ("early", "09:00", [0, 1], "KeyError: 'q'"),
        ("late", "09:05", [0, 1], "KeyError: 'q'"),
    ]
    with pytest.raises(SystemExit):
        journal.run(["late", "x"], lambda group: journal.die(KeyError("q")) if group == [1] else None)
    assert "x" in [n["first"] for n in journal.in_flight()]


def test_a_note_that_is_erased_while_others_are_read_is_no_error(tmp_path, mortal):
    class Fleeting(Storage):
        def names(self, *parts, suffix=""):
            return ["000000-000001.json", *super().names(*parts, suffix=suffix)]

    journal = Journal(Fleeting(str(tmp_path)))
    with pytest.raises(SystemExit):
        journal.run(["a", "b"], lambda group: journal.die(KeyError("q")))
    assert [n["first"] for n in journal.in_flight()] == ["a"]


def test_a_group_is_held_until_another_takes_it_or_a_new_run_begins(tmp_path, mortal, monkeypatch):
    out, held = Storage(str(tmp_path / "notes")), []
    late, successor = Journal(out), Journal(out)

    def taken(group):
        held.append(late.holds())
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            successor.run(["a", "b"], lambda group: held.append(successor.holds()))
        held.append(late.holds())

    late.run(["a", "b"], taken)
    assert held == [True, True, True, False]  # the successor's two groups are its own

    def restarted(group):
        successor.clear()
        return late.holds()

    assert late.run(["c"], restarted)[0] == [False]  # and there is no note left to erase
