"""`ctrlray bench`: where it finds benchmarks, what it leaves out and why, what it makes of results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as runner
from benchmarks import performance, pipeline, registry, scale, scoring
from benchmarks.common import figure
from benchmarks.simulation import BUSY, Simulation
from ctrlray import bench, config
from ctrlray.clock import note_start
from ctrlray.errors import ConfigError
from ctrlray.tables import Storage

ROOT = Path(__file__).parent.parent.parent


def test_a_clone_is_found_beside_the_package_or_where_one_stands(tmp_path, monkeypatch):
    assert bench.clone() == ROOT
    monkeypatch.chdir(ROOT)
    assert bench.clone(tmp_path) == ROOT
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="clone the repository"):
        bench.clone(tmp_path)


def test_the_list_names_each_with_its_peer_and_starts_nothing():
    said = subprocess.run([sys.executable, "-m", "ctrlray", "bench", "--list"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("machine: ") and "cores" in said
    for name in ("generation", "scoring", "training", "ppo", "pipeline"):
        assert any(line.startswith(f"{name} ") for line in said.splitlines()), name


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no benchmark 'nix'; there are generation, "):
        registry.chosen(["nix"])


def test_what_a_machine_lacks_is_said(monkeypatch):
    absent = registry.Benchmark("training", "Training", "TRL", 1, package="no-such-package")
    assert "no-such-package is not installed" in registry.lacks(absent)
    monkeypatch.setattr(registry.os, "cpu_count", lambda: 1)
    assert registry.lacks(registry.Benchmark("pipeline", "", "", 1)).startswith("1 cores")


def test_every_registered_script_that_exists_takes_its_arguments():
    for benchmark in registry.chosen([]):
        source = (registry.FOLDER / f"{benchmark.module or benchmark.name}.py").read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in benchmark.arguments), benchmark.name
        assert f'store("{benchmark.name}"' in source, "results are not where the page looks for them"


def test_a_failed_benchmark_makes_the_exit_code_and_no_page(monkeypatch, capsys):
    monkeypatch.setattr(performance, "write", lambda: pytest.fail("nothing was measured"))
    broken = registry.Benchmark("broken", "Broken", "", 1, module="no_such_script")
    monkeypatch.setattr(runner, "lacks", lambda benchmark: "")
    assert runner.run([broken]) == 1
    assert "failed: broken" in capsys.readouterr().err


def test_what_does_not_fit_is_left_out_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(runner, "lacks", lambda benchmark: "no NVIDIA GPU")
    assert runner.run([registry.ALL[0]]) == 0
    assert "left out, no NVIDIA GPU" in capsys.readouterr().out


def test_the_page_shows_target_measured_spread_and_verdict():
    facts = {"cpu": "Chip", "cores": "2", "memory": "4 GiB", "bfloat16": "native"}
    judged = [figure("ratio", ">= 1", 1.25, True, [1.0, 1.5]), figure("share", "<= 0.1", 0.2, False)]
    figures = [*judged, figure("rate", "recorded", 7, None)]
    page = performance.page({"scoring": {"commit": "abc", "machine": facts, "versions": {"ray": "2"}, "figures": figures}})
    assert "| Scoring | ratio | >= 1 | 1.25 [1, 1.5] | met |" in page
    assert "| Scoring | share | <= 0.1 | 0.2 | **not met** |" in page
    assert "| rate | recorded | 7 |  |" in page and "| Scoring | rate |" not in page


def test_the_share_outside_counts_everything_that_is_not_useful():
    parts = {"sampling": 60.0, "optimizer steps": 20.0, "export": 15.0, "imports, start and end of Ray": 5.0}
    run = {"wall": 100.0, "parts": dict.fromkeys(pipeline.USEFUL, 0.0) | parts}
    (share, wall, *rest) = pipeline.figures([run])
    assert share["measured"] == pytest.approx(0.2) and share["met"] is False and wall["measured"] == 100
    assert [f["name"] for f in rest if "outside" in f["name"]] == [
        "seconds, outside: export",
        "seconds, outside: imports, start and end of Ray",
    ]


def test_the_first_block_began_one_block_before_it_ended():
    assert pipeline.first_block([10.0, 14.0, 18.0]) == 6.0


def test_scores_that_differ_do_not_count_as_the_same_work():
    same = {"rate": 10.0, "scores": {"a": [0.0, 1.0, 2.0]}}
    other = {"rate": 5.0, "scores": {"a": [0.5, 1.5, 2.5]}}
    ratio, apart, *_ = scoring.figures({"ctrlray": [same], "loop": [other]})
    assert ratio["measured"] == 2 and ratio["met"] and not apart["met"]
    assert scoring.figures({"ctrlray": [same], "loop": [same]})[1]["met"]


def test_a_clock_does_not_count_the_first_block():
    clock = scoring.Clock()
    clock.blocks = [(5.0, 64), (7.0, 64), (9.0, 32)]
    assert clock.rate == 24.0


def test_efficiency_counts_work_between_all_up_and_the_first_out_of_work():
    """From 5 to 30: 24 of 25 seconds of the first engine, which waits from 20 to 21, and all 25 of the second."""
    first, second = [[0, 10], [10, 10], [21, 9]], [[5, 5], [10, 10], [20, 15]]
    assert scale.efficiency([first, second]) == pytest.approx(49 / 50)
    assert scale.efficiency([second]) == pytest.approx(1.0)


FEW = {"blocks": 100, "rss_mib": 300.0, "store_mib": 1.0}
MANY = {"blocks": 1101, "rss_mib": 310.0, "store_mib": 2.0, "stream_cpu_s": 11.0}


def limits(shares):
    """Engines take 10 s for a block, so that 1,000 of them bring 100 blocks/s; an actor takes 20."""
    return scale.limits({10: FEW, 1000: MANY}, shares, scale.BATCH * scale.TOKENS / 10, 20.0)


def test_a_simulated_engine_waits_for_all_and_notes_each_batch_with_its_seconds(tmp_path):
    note_start(Storage(str(tmp_path)), 1.0)
    spec = Simulation("m", "float32", 64, config.EngineSettings(), tokens_per_s=2400.0, answer_bytes=12, folder=str(tmp_path))
    engine = spec.build()
    for _ in range(2):
        answers = engine.generate([[1]] * 3, config.Sampling(), [24] * 3)
    (file,) = (tmp_path / BUSY).iterdir()
    (_, first), (_, second) = (json.loads(line) for line in file.read_text().splitlines())
    assert second == pytest.approx(3 * 24 / 2400) and 0 < first <= second
    assert [(a.text, len(a.token_ids)) for (a,) in answers] == [("word word wo", 24)] * 3


def test_limits_name_what_a_thousand_engines_need():
    bring, scorer, driver, memory, store, gcs, _ = limits({1: 0.01, 11: 0.02})
    assert "100 blocks/s" in bring
    assert scorer.startswith("First, at 200 engines, a pool of one scorer") and "need 5 actors in score.pool" in scorer
    assert driver.startswith("Then, at 991 engines, the driver's CPU")
    assert "10.0 ms per block at 1,000 prompts, so 1.00 cores" in driver  # 11 s of CPU between 1,101 blocks
    assert "10.2 KiB per block beside a base of 300 MiB" in memory and "1048 bytes per block" in store
    assert "1,069 actors" in gcs


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({1: 0.01, 11: 0.02}, ["at 991 engines", "2.0% of a core with 11 engines and 0.10% for each", "1.01 cores", " 97 ("]),
        ({10: 0.1}, ["First, at 100 engines", "1.00% for each further one, so 10.00 cores", "Blocks of 960"]),
        ({1: 0.1, 11: 0.1}, ["at 1,000 engines", "0.00% for each further one, so 0.10 cores", "so 1.00 cores."]),
    ],
)
def test_the_driver_is_full_by_engines_or_by_blocks_whichever_comes_first(shares, said):
    (driver,) = (note for note in limits(shares) if "the driver's CPU" in note)
    assert all(words in driver for words in said), driver


def test_growth_of_the_store_counts_beside_the_answers(monkeypatch):
    """A mebibyte more in the store for 900 more prompts of a thousand bytes each."""
    runs = scale.Runs(None)
    monkeypatch.setattr(runs, "run", lambda number: (FEW if number == 100 else MANY) | {"first_row_s": 9.0})
    figures = {f["name"]: (f["measured"], f["met"]) for f in scale.memory(runs, [1000, 100])[0]}
    assert figures["driver memory, 1,000 prompts / 100"] == (1.033, True)
    name = "object store, from 100 prompts to 1,000: growth, of the answers' bytes"
    assert figures[name] == (pytest.approx(2**20 / 900_000, abs=1e-4), False)


def test_finished_runs_are_kept_and_not_run_again(tmp_path, monkeypatch):
    kept, asked = tmp_path / "kept.json", []

    def run(prompts, what):
        asked.append((prompts, *what))
        return {"rows": prompts, "others_cpu_percent": 3.0}

    monkeypatch.setattr(scale, "_run", run)
    first = scale.Runs(kept).run(10, rate=float("inf"))
    again = scale.Runs(kept)
    assert again.run(10, rate=float("inf")) == first and again.others == 3.0
    again.run(11)
    assert [a[0] for a in asked] == [10, 11] and list(tmp_path.iterdir()) == [kept]


def test_notes_of_a_benchmark_stand_on_the_page():
    facts = {"cpu": "c", "cores": "2", "memory": "24 GiB", "bfloat16": "native"}
    result = {"figures": [figure("f", "recorded", 1.0, None)], "machine": facts, "versions": {}, "commit": "abc"}
    assert "- breaks first" in performance.page({"scale": result | {"notes": ["breaks first"]}})
    assert "- breaks first" not in performance.page({"scale": result})
