"""Stages that finish nothing end with an error that says what they wait for; on real actors."""

from __future__ import annotations

import pyarrow as pa
import pytest
import ray

from ctrlray import config
from ctrlray.engine import pool as pools
from ctrlray.engine.engine import EngineSpec
from ctrlray.errors import ClusterError
from ctrlray.ledger import Silent
from ctrlray.patience import Patience
from ctrlray.stages import score
from ctrlray.tables import Storage
from ctrlray.train import launch
from tests.fakes import StuckHost

pytestmark = pytest.mark.slow  # they wait for time to pass
JOB = {
    "name": "t",
    "control": {"attributes": [{"name": "brevity", "levels": 2}]},
    "rewards": [{"type": "function", "target": "tests.fakes:stuck_reward", "attributes": ["brevity"]}],
    "score": {"batch_size": 2},
    "cluster": {"stall_timeout_s": 60},
}
SPEC = EngineSpec("nowhere", "float32", 64, config.EngineSettings())


def rows(texts):
    ids = [f"r{i}" for i in range(len(texts))]
    return pa.table({"response_id": ids, "prompt_id": ["p"] * len(ids), "text": texts, "finish_reason": ["stop"] * len(ids)})


def scored(job, texts, out):
    score.run(rows(texts), {"p": [{"role": "user", "content": "q"}]}, config.parse(config.Job, job, where="t"), out, Silent())


def test_a_reward_that_never_answers(local_ray, tmp_path):
    out = Storage(str(tmp_path))
    with pytest.raises(ClusterError) as caught:
        scored(JOB, ["a", "b", "stuck", "c"], out)
    text = str(caught.value)
    assert text.startswith("score: nothing finished for 60 s; it waits for 2 rows in flight, the oldest since ")
    assert "first of them r2" in text and "run the same command again" in text
    kept = out.read_table("scores", score.schema.scores(["brevity"]))
    assert set(kept["response_id"].to_pylist()) <= {"r0", "r1"}


def test_actors_that_find_no_room(local_ray, tmp_path):
    greedy = JOB | {"score": {"pool": {"cpus": 2}}, "cluster": {"stall_timeout_s": 5}}

    @ray.remote(num_cpus=1)
    class Holder:
        def ready(self):
            return 1

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    with pytest.raises(ClusterError, match=r"it waits for an actor to start or to take up work \([0-9.]+ of 2 CPUs are free"):
        scored(greedy, ["a"], Storage(str(tmp_path)))
    ray.kill(holder)


def test_an_engine_that_never_answers_and_one_that_never_starts(local_ray, monkeypatch):
    monkeypatch.setattr(pools, "EngineHost", StuckHost)
    said = "stuck: no engine finished a batch within 3 s; 4 prompts are in flight on 1 engines"
    with pools.EnginePool(SPEC, config.Pool(cpus=0.1), "stuck", 120) as pool:
        pool._engines._timeout_s = 3  # the start may take its time
        with pytest.raises(ClusterError, match=said):
            pool.generate([[1]] * 4, config.Sampling(), batch_size=8)
    with pytest.raises(ClusterError, match="big: 1 of 1 engines did not start within 3 s; each reserves 64 CPUs"):
        pools.EnginePool(SPEC, config.Pool(cpus=64), "big", 3).__enter__()


def test_training_that_takes_no_step(local_ray, tmp_path):
    import time

    place = Storage(str(tmp_path))
    job = config.Train(workers=3)
    patience = Patience("train", 2.0, lambda: launch.waits_for(place, job))
    with pytest.raises(ClusterError, match="train: nothing finished for 2 s; it waits for 3 workers with 1 CPUs and 0 GPUs each"):
        launch.watched(lambda: time.sleep(60), launch.Watch("exmate", place, Silent()), patience)
    place.write_json({"step": 4, "steps": 9, "recent": []}, "progress.json")
    with pytest.raises(ClusterError, match="it waits for step 5 of 9"):
        launch.watched(lambda: time.sleep(60), launch.Watch("exmate", place, Silent()), patience)
