"""A sweep's course: shared stages once, failures contained, finished variants left alone; and its child processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from click.testing import CliRunner

from ctrlray import config, lease
from ctrlray.cli import main
from ctrlray.errors import ConfigError, DataError
from ctrlray.pipeline import STAGES, Run
from ctrlray.sweep import children, command, compare
from ctrlray.sweep import run as sweep
from ctrlray.sweep.plan import SHARED, load
from tests.unit.test_sweep_plan import ABLATION, JOB, write


class Recorded(children.Children):
    """Children that only leave the files of finished stages; `failing` maps a part's name to its error."""

    ran: ClassVar[list[tuple[str, tuple[str, ...]]]] = []
    failing: ClassVar[dict[str, str]] = {}
    sampled: ClassVar[str] = "once"
    at_once: ClassVar[list[int]] = []
    live = 0
    together: ClassVar[int] = 1
    """So many are waited for, for a while."""

    def run(self, name, job, stages):
        run, kind = Run(job), type(self)
        kind.live += 1
        kind.at_once.append(kind.live)
        end = time.monotonic() + 5
        while max(kind.at_once) < kind.together and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)
        self.ran.append((name, tuple(s for s in stages if run.result(s) is None)))
        if name not in self.failing:
            for stage in stages:
                if run.result(stage) is None:
                    run.out(stage).write_bytes(f"{name} {stage} {kind.sampled}".encode(), "table", "part-1.parquet")
                    run.out(stage).write_json({"facts": {}, "rows_out": 1, "seconds": 2.0}, "result.json")
        kind.live -= 1
        return self.failing.get(name)


@pytest.fixture
def record(monkeypatch):
    monkeypatch.setattr(sweep, "Children", Recorded)
    for name, value in (("ran", []), ("failing", {}), ("at_once", []), ("live", 0), ("sampled", "once"), ("together", 1)):
        monkeypatch.setattr(Recorded, name, value)
    return Recorded


@pytest.fixture
def plan(tmp_path):
    return load(write(tmp_path, variants=ABLATION[:4] + ABLATION[5:]))  # five share their answers, `colder` has its own


def run(plan):
    said = []
    return sweep.run(plan, said.append), said


OWN = STAGES[len(SHARED) :]


def test_answers_are_made_once_per_key_and_every_variant_does_the_rest(plan, record):
    outcomes, said = run(plan)
    names = ["base", "weight", "response", "levels", "text", "colder"]
    assert list(outcomes) == names and not any(o.error for o in outcomes.values())
    # the second pool finds the prompts of the first: their key is the same
    assert record.ran == [("shared", SHARED), ("shared", ("generate", "score")), *((n, OWN) for n in names)]
    assert set(record.at_once) == {1}
    tables = {n: plan.runs[n].out("score").read_bytes("table", "part-1.parquet") for n in names}
    assert set(tables.values()) == {b"shared score once"}
    assert "sweep s: 6 variants, 0 finished before" in said[0]
    assert any(line.startswith("colder: finished after") and "6 of 6" in line for line in said)


def test_a_variant_that_fails_stops_no_other_and_is_tried_again(plan, record, tmp_path):
    record.failing["response"] = "no GPU"
    outcomes, said = run(plan)
    assert {n: o.error for n, o in outcomes.items() if o.error} == {"response": "no GPU"}
    assert any(line.startswith("response: failed after") for line in said)
    record.failing.clear()
    record.ran.clear()
    outcomes, said = run(load(tmp_path / "sweep.yaml"))
    assert record.ran == [("response", OWN)]  # nothing is done twice
    assert "5 finished before" in said[0] and not any(o.error for o in outcomes.values())


def test_answers_that_fail_fail_their_variants_only(plan, record):
    record.failing["shared"] = "vLLM is gone"
    outcomes, _ = run(plan)
    assert {o.error for o in outcomes.values()} == {"shared tables: vLLM is gone"}
    record.failing.clear()
    outcomes, _ = run(plan)
    assert not any(o.error for o in outcomes.values())


def test_answers_that_no_unfinished_variant_needs_are_not_made(plan, record):
    record.failing["colder"] = "killed"
    run(plan)
    plan.storage.sub("shared").delete()
    record.failing.clear()
    record.ran.clear()
    run(plan)
    assert record.ran == [("shared", SHARED), ("colder", OWN)]  # for `colder` alone


@pytest.mark.parametrize("whose", ["shared", "variant"])
def test_tables_that_changed_stop_the_sweep(plan, record, whose):
    record.failing["text"] = "killed"
    run(plan)
    own = plan.runs["text"]
    if whose == "shared":
        own.out("score").delete()  # to be taken over again
    touched = Run(plan.pools[0].job) if whose == "shared" else own
    touched.out("score").write_bytes(b"touched", "table", "part-1.parquet")
    record.ran.clear()
    with pytest.raises(DataError, match="is not what was sealed"):
        run(plan)
    assert record.ran == [] and not plan.storage.exists(lease.FILE)


@pytest.mark.parametrize("sampled", ["once", "anew"])
def test_a_variant_added_later_is_not_compared_on_other_answers(plan, record, tmp_path, sampled):
    run(plan)
    plan.storage.sub("shared").delete()
    record.ran.clear()
    record.sampled = sampled
    more = load(write(tmp_path, variants=[*ABLATION, {"name": "late", "set": {"train.epochs": 9}}]))
    if sampled == "anew":
        with pytest.raises(DataError, match=r"variants/base/\w+/.*is not what was sealed.*Delete \S+/variants/base and"):
            run(more)
        assert record.ran == [("shared", SHARED)]
    else:  # the same bytes are the same answers
        assert not any(o.error for o in run(more)[0].values()) and ("late", OWN) in record.ran


def test_as_many_variants_at_once_as_there_is_room_for(plan, record, monkeypatch):
    monkeypatch.setattr(sweep, "_room", lambda plan, todo: (3, None))
    record.together = 3
    outcomes, _ = run(plan)
    assert max(record.at_once) == 3 and not any(o.error for o in outcomes.values())


def test_two_sweeps_in_one_root_are_refused(plan, record):
    with lease.Lease(plan.storage), pytest.raises(ConfigError, match="another run is writing to"):
        run(plan)


def test_a_root_that_a_killed_sweep_s_child_is_leaving_is_waited_for(plan, record):
    held = lease.Lease(plan.runs["base"].storage)
    held.__enter__()
    timer = threading.Timer(0.5, held.__exit__, (None, None, None))
    began = time.monotonic()
    timer.start()
    assert sweep._part("base", plan.jobs["base"], (), plan.runs["base"].storage, Recorded(print)) is None
    assert time.monotonic() - began >= 0.5 and record.ran == [("base", ())]


@pytest.mark.parametrize(("failing", "code"), [({}, 0), ({"response": "no GPU\nadd a node"}, 1)])
def test_the_verb_writes_the_comparison_and_its_exit_code_tells_of_failures(plan, record, tmp_path, monkeypatch, failing, code):
    record.failing.update(failing)
    value = {"value": 0.6, "low": 0.5, "high": 0.7}
    measured = {"brevity": {"levels": 3} | {key: value | {"difference": value} for key in compare.STATISTICS}}
    shown = {"method": "exmate", "examples": 1, "seconds": 2.0, "code_gap": value, "mean_tokens": 9.0}

    def variant(plan, name, outcome):
        known = {"variant": name, "changes": plan.changes(name), "root": "r", "error": outcome.error}
        if outcome.error:
            return known | {"state": "failed", "attributes": {}}
        return known | shown | {"state": "finished", "attributes": measured}

    monkeypatch.setattr(compare, "_variant", variant)
    monkeypatch.setattr(compare, "_add_differences", lambda run, base, found: None)
    made = CliRunner().invoke(main, ["sweep", str(tmp_path / "sweep.yaml")])
    assert made.exit_code == code, made.output
    assert plan.storage.names(suffix=".csv") == [command.CSV] and plan.storage.exists(command.PAGE)
    rows = plan.storage.read_bytes(command.CSV).decode().splitlines()
    assert ('response,failed,,,,,,,,,,,"no GPU' in rows) == bool(failing)
    assert "weight,finished,brevity,ends,0.6,0.5,0.7,0.6,0.5,0.7,,," in rows
    assert [v["state"] for v in plan.storage.read_json(command.JSON)["variants"]].count("failed") == len(failing)
    table = made.output.split("variant   ")[1]
    assert ("response                 failed: no GPU add a node" in table) == bool(failing) and "0.600 [0.500, 0.700]" in table


@pytest.mark.slow
def test_a_child_runs_stages_and_says_what_went_wrong(tmp_path):
    job = config.parse(config.Job, JOB | {"run_root": str(tmp_path / "run"), "prompts": {"train": 4, "eval": 2}}, where="t")
    said = []
    with children.Children(said.append) as made:
        assert made.run("mine", job, ("prompts",)) is None
        assert made.run("mine", job, ("distill",)) == (
            "distill needs the output of score; run `ctrlray score` or `ctrlray pipeline` first"
        )
    assert Run(job).result("prompts")["rows_out"] == 6
    assert any(line.startswith("mine ") and "rows" in line for line in said)


def test_an_error_is_all_of_its_lines_or_the_last_line_and_the_code():
    assert children._reason(["starting", "error: a", "  b"], 3) == "a\n  b"
    assert children._reason(["error: old", "error: a"], 3) == "a"
    assert children._reason(["starting", ""], -9) == "ended with signal 9: starting"
    assert children._reason([], 7) == "ended with exit code 7: it printed nothing"


@pytest.mark.parametrize(
    ("line", "of_ray"),
    [
        ("(raylet) [2026-11-25 13:36:26 I] Set ray log level", True),
        ("\x1b[36m(RayTrainWorker pid=29732)\x1b[0m Setting up", True),
        ("(TrainController pid=29376, ip=192.0.2.2) Started", True),
        ("train          5s  1/6 rows", False),
        ("error: (odd) text", False),
    ],
)
def test_log_lines_of_ray_are_not_a_child_s_words(line, of_ray):
    assert bool(children._OF_RAY.match(line)) == of_ray


def test_a_child_ends_with_its_parent():
    code = (
        "import time; from ctrlray.sweep.children import end_with_parent\n"
        "end_with_parent(lambda: print('cleared', flush=True)); print('up', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "up\n"
        time.sleep(0.5)
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(timeout=20) == 1 and child.stdout.read() == "cleared\n"
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
def test_a_sweep_that_stops_ends_its_children(tmp_path):
    job = config.parse(config.Job, JOB | {"run_root": str(tmp_path / "run")}, where="t")
    ended = []
    with children.Children(print) as made:
        made._environment = made._environment | {"PYTHONPATH": str(tmp_path)}
        (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(3)\n")  # it is busy when the sweep stops
        thread = threading.Thread(target=lambda: ended.append(made.run("mine", job, ("prompts",))))
        thread.start()
        while not made._live:
            time.sleep(0.01)
    thread.join(timeout=60)
    assert len(ended) == 1 and ended[0] is not None and not made._live
    assert made.run("mine", job, ("prompts",)) == "the sweep was stopped"


def test_the_ablation_sweep_is_one_pool(tmp_path):
    file = Path(__file__).parent.parent.parent / "jobs" / "ablation" / "sweep.yaml"
    plan = load(file, [f"run_root={tmp_path}"])
    assert len(plan.pools) == 1 and len(plan.jobs) == 11
    assert {c.split(":")[0] for n in plan.jobs for c in plan.changes(n)} == {
        "distill.strategy",
        "distill.counterfactual",
        "train.objectives.0.weight",
        "control.attributes.0.levels",
        "control.attributes.1.levels",
        "control.encoding",
    }
    assert yaml.safe_load(file.read_text())["job"] == "quickstart"
