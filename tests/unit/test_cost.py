"""What a run cost and what it would cost elsewhere, against numbers worked by hand."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from ctrlray import config, pipeline, runs
from ctrlray.cli import main
from ctrlray.cost import Held, cost, held, lines, project
from ctrlray.errors import ConfigError

CPU = {"generate": Held("CPU", 2.0), "score": Held("CPU", 0.25), "train": Held("CPU", 2.0), "evaluate": Held("CPU", 2.0)}
GPU = {"generate": Held("GPU", 4.0), "score": Held("CPU", 3.0), "train": Held("GPU", 8.0), "evaluate": Held("GPU", 4.0)}


def result(rows, seconds, tokens=None, **facts):
    return {"rows_in": rows, "rows_out": rows, "seconds": seconds, "tokens": tokens, "facts": facts}


def ledger(**more):
    return {
        "prompts": result(100, 2.0),
        "generate": result(800, 100.0, 24000, start_s=20.0),
        "score": result(800, 0.5, streamed_behind="generate"),
        "train": result(400, 400.0, 80000, workers=1, exmate={"steps": 60, "seconds": 350.0, "path": "segments"}),
        "evaluate": result(600, 110.0, 24200, start_s=10.0),
        **more,
    }


def by_stage(costs):
    return {r["stage"]: r for r in costs["stages"]}


def test_a_run_on_one_machine_by_hand():
    found = cost(ledger(), CPU)
    rows = by_stage(found)
    assert rows["generate"]["device_seconds"] == 200.0 and rows["generate"]["tokens_per_s"] == 24000 / 80
    assert rows["score"]["device_seconds"] == 0.0 and rows["score"]["streamed_behind"] == "generate"  # those very cores
    assert rows["train"]["start_s"] == 50.0  # 400 s, of which 350 in steps
    assert (rows["prompts"]["start_s"], rows["prompts"]["device_seconds"], rows["prompts"]["tokens_per_s"]) == (None, 2.0, None)
    assert found["total"] == {
        "rows": 800,
        "tokens": 24000 + 80000 + 24200,
        "seconds": 612.5,
        "start_s": 80.0,
        "gpu_seconds": 0.0,
        "cpu_seconds": 2.0 + 200.0 + 800.0 + 220.0,
    }
    assert found["overhead_share"] == round(80 / 612.5, 4) and found["projection"] is None


def test_gpus_and_cpus_are_counted_apart_and_streamed_scoring_holds_its_own():
    total = cost(ledger(), GPU)["total"]
    assert total["gpu_seconds"] == 4 * 100 + 8 * 400 + 4 * 110
    assert total["cpu_seconds"] == 2 + 3 * 100  # rewards on CPUs are up as long as generation runs


def test_an_evaluation_holds_its_engines_until_they_end_and_rewards_are_no_larger_with_the_model():
    """110 s: 10 of start, 50 of answers, 50 of rewards, judges and statistics."""
    run = ledger(evaluate=result(600, 110.0, 24000, start_s=10.0, engines_s=60.0))
    on_gpus = GPU | {"score": Held("GPU", 3.0)}
    assert by_stage(cost(run, GPU))["evaluate"]["device_seconds"] == 4 * 60  # rewards on CPUs
    assert by_stage(cost(run, on_gpus))["evaluate"]["device_seconds"] == 4 * 60 + 3 * 50
    assert by_stage(cost(run, CPU))["evaluate"]["device_seconds"] == 2 * 110
    assert by_stage(cost(run, CPU))["evaluate"]["tokens_per_s"] == 24000 / 50
    wanted = by_stage(project(cost(run, CPU), run_parameters=1e8, parameters=1e9))["evaluate"]
    assert wanted["seconds"] == 50 * 10 + 50 + 10 and wanted["tokens_per_s"] == 24000 / 500


def test_ppo_holds_engines_beside_its_workers():
    ppo = result(400, 400.0, 1, exmate={"steps": 1, "seconds": 100.0}, ppo={"steps": 4, "seconds": 250.0})
    assert by_stage(cost(ledger(train=ppo), GPU))["train"]["device_seconds"] == 8 * 400 + 4 * 250
    assert by_stage(cost(ledger(train=ppo), CPU))["train"]["device_seconds"] == 2 * 400


def test_ppo_takes_its_steps_whatever_the_rows():
    ppo = {"steps": 4, "seconds": 250.0, "tokens": 600}
    train = result(400, 400.0, 1000, exmate={"steps": 1, "seconds": 100.0}, ppo=ppo)
    costs = cost(ledger(train=train), CPU)
    wanted = by_stage(project(costs, run_parameters=1e8, parameters=3e8, rows=8000, speedup=2.0))["train"]
    assert wanted["seconds"] == (100 * 3 * 10 + 250 * 3) / 2 + 50 and wanted["tokens"] == 400 * 10 + 600
    same = by_stage(project(costs, run_parameters=1e8))["train"]
    assert (same["seconds"], same["tokens"]) == (400.0, 1000)
    on_gpus = by_stage(project(cost(ledger(train=train), GPU), run_parameters=1e8, rows=8000))["train"]
    assert on_gpus["seconds"] == 1000 + 250 + 50 and on_gpus["device_seconds"] == 8 * 1300 + 4 * 250
    resumed = by_stage(project(cost(ledger(train=train | {"seconds": 5.0}), CPU), run_parameters=1e8, rows=8000))["train"]
    assert resumed["seconds"] == 5.0


def test_a_start_is_never_longer_than_its_stage():
    resumed = {"generate": result(8, 10.0, 100, start_s=30.0), "train": result(8, 5.0, 9, clm={"seconds": 7.0})}
    found = cost(resumed, CPU)
    assert [r["start_s"] for r in found["stages"]] == [10.0, 0.0] and found["overhead_share"] == round(10 / 15, 4)
    assert by_stage(found)["generate"]["tokens_per_s"] is None


def test_projection_by_hand():
    costs = cost(ledger(), CPU)
    wanted = project(costs, run_parameters=1e8, parameters=1e9, rows=8000, speedup=50.0)
    rows = by_stage(wanted)
    assert rows["generate"]["seconds"] == 80 * 10 * 10 / 50 + 20 and rows["generate"]["rows"] == 8000
    assert rows["train"]["seconds"] == 350 * 10 * 10 / 50 + 50 and rows["train"]["tokens"] == 800_000
    assert rows["evaluate"]["seconds"] == 100 * 10 / 50 + 10 and rows["evaluate"]["rows"] == 600  # its grid stays
    assert rows["prompts"]["seconds"] == 2 * 10  # in the driver: more rows, no faster devices
    assert rows["score"]["seconds"] == 0.5 * 10 / 50  # the reward model stays
    assert rows["generate"]["device_seconds"] == 2 * rows["generate"]["seconds"]
    assert wanted["total"]["seconds"] == pytest.approx(sum(r["seconds"] for r in rows.values()), abs=0.1)
    assert wanted["assumptions"] and costs["total"]["rows"] == 800  # what was measured is left as it was


def test_rewards_of_a_stream_are_held_as_long_as_its_host_will_be():
    wanted = by_stage(project(cost(ledger(), GPU), 1e8, parameters=2e8))
    assert wanted["generate"]["seconds"] == 180.0 and wanted["score"]["device_seconds"] == 3 * 180


def test_projecting_to_the_run_itself_changes_nothing():
    costs = cost(ledger(), GPU)
    same = project(costs, run_parameters=135e6)
    assert same["stages"] == costs["stages"] and same["total"] == costs["total"]


@pytest.mark.parametrize(
    ("arguments", "said"), [({"parameters": 0.0}, "params=0"), ({"rows": -1}, "rows=-1"), ({"speedup": 0.0}, "speedup=0")]
)
def test_a_projection_to_nothing_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        project(cost(ledger(), CPU), 1e8, **arguments)


def test_a_run_without_answers_has_nothing_to_project_from():
    with pytest.raises(ConfigError, match="no sampled answers"):
        project(cost({"prompts": result(9, 1.0)}, CPU), 1e8, rows=5)


def test_devices_of_a_job():
    on_cpu = held(config.load_job("smoke"), cores=16)
    assert on_cpu["generate"] == on_cpu["evaluate"] == on_cpu["train"] == Held("CPU", 16.0)
    assert on_cpu["score"] == Held("CPU", 0.25)
    sets = ["generate.pool={min_size: 1, max_size: 3, gpus: 1}", "generate.engine.tensor_parallel=2", "train.workers=4"]
    on_gpu = held(config.load_job("smoke", [*sets, "train.gpus_per_worker=1", "score.pool={max_size: 2, gpus: 0.5}"]), cores=16)
    assert on_gpu["generate"] == Held("GPU", 6.0) and on_gpu["train"] == Held("GPU", 4.0) and on_gpu["score"] == Held("GPU", 1.0)
    many = held(config.load_job("smoke", ["generate.pool={max_size: 3, cpus: 8}", "train.workers=40"]), cores=16)
    assert many["generate"] == Held("CPU", 24.0) and many["train"] == Held("CPU", 40.0)


def test_lines_say_what_is_measured_and_what_is_assumed():
    costs = cost(ledger(), CPU)
    text = "\n".join(lines(costs))
    assert "with generate" in text and "start-up 13.1% at least" in text and "assuming" not in text
    more = lines(costs | {"projection": project(costs, 1e8, 7e9, 100_000, 400)})
    assert "projected to 7,000,000,000 parameters (the run's: 100,000,000), 100,000 answers, devices 400 times as fast:" in more
    assert more[more.index("assuming:") + 1].startswith("  compute-bound")


def test_verb(tmp_path):
    job = config.load_job("smoke", [f"run_root={tmp_path / 'run'}"])
    run = pipeline.run(job, ["prompts"])
    made = run.result("prompts")
    run.out("generate").write_json(result(800, 100.0, 24000, start_s=20.0), "result.json")
    words = ["runs", "cost", job.root, "--rows", "1600", "--run-params", "1e8", "--json", str(tmp_path / "c")]
    call = CliRunner().invoke(main, words)
    assert call.exit_code == 0 and "1,600 answers" in call.output, call.output
    kept = json.loads((tmp_path / "c").read_text())
    assert by_stage(kept)["prompts"]["rows"] == made["rows_in"] and kept["total"]["tokens"] == 24000
    assert by_stage(kept["projection"])["generate"]["seconds"] == 180.0
    plain = CliRunner().invoke(main, ["runs", "cost", job.root])
    assert plain.exit_code == 0 and "projected" not in plain.output


def test_verb_asks_for_the_size_of_a_model_that_is_elsewhere(tmp_path):
    job = config.load_job("smoke", [f"run_root={tmp_path}", "model.name=org/elsewhere"])
    pipeline.run(job, ["prompts"])
    asked = CliRunner().invoke(main, ["runs", "cost", job.root, "--params", "7e9"])
    assert asked.exit_code == 2 and "org/elsewhere is not on this machine" in asked.output and "--run-params" in asked.output


def test_verb_without_a_finished_stage(tmp_path):
    job = config.load_job("smoke", [f"run_root={tmp_path}"])
    run = pipeline.run(job, ["prompts"])
    run.out("prompts").remove("result.json")
    with pytest.raises(ConfigError, match="no stage has finished"):
        runs.cost(run.storage, None, None, 1.0, None)
