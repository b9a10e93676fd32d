"""Run by test_autoscaling in a process of its own: generation with scoring behind it on spot nodes that come and go.

The cluster starts with none of them. Each engine notes when it is up and when it begins and ends a batch. It answers one, by
which Ray Data learns how many engines the work needs, and then waits for all that the pool may have; after a quarter of the
rows a node is taken away whose engine holds a batch; the last batch waits for the pool to shrink to its minimum. Ray Data keeps
asking for its nodes until the stage is over, so they go after that. What was seen is printed as one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import ray

from ctrlray import config, schema
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.ledger import Silent
from ctrlray.quiet import quiet_ray
from ctrlray.stages import generate, score
from ctrlray.stages.journal import IN_FLIGHT, Journal
from ctrlray.tables import Storage, from_rows
from tests.ray.fake_nodes import alive, fake_nodes, running, take_away, wait_until
from tests.unit.test_generate import Bytes

PROMPTS, BATCH, ENGINES, PATIENCE_S = 160, 2, 3, 300
LONG = "word " * 15_000
"""Answers so long that a block of two lies in the object store of its engine's node, not in the driver."""
NOTES = "notes"
NOTES_AT = "CTRLRAY_TEST_NOTES"
"""Environment variable with their folder, for the reward."""


class Engine:
    """Answers in half a second a batch."""

    weights_version = 0

    def __init__(self, notes: Path) -> None:
        self._notes, self._asked = notes, 0
        self.note("up", [])

    def note(self, what, prompts):
        said = {"what": what, "pid": os.getpid(), "at": time.time(), "rows": [bytes(p).decode() for p in prompts]}
        with (self._notes / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(said) + "\n")

    def generate(self, prompts, sampling, max_tokens):
        self.note("begin", prompts)
        if self._asked:  # Ray Data asks for no more nodes before it has seen a block of this pool
            wait_until((self._notes / "all_up").exists, PATIENCE_S)
        self._asked += 1
        wait_until(lambda: not (self._notes / "hold").exists(), PATIENCE_S)
        if any(b"last" in bytes(p) for p in prompts):
            wait_until((self._notes / "shrunk").exists, PATIENCE_S)
        time.sleep(0.5)
        self.note("end", prompts)
        return [[Completion(LONG, [1, 2], -1.0, "stop", [])] for _ in prompts]

    def decode(self, ids):
        return bytes(ids).decode()


class Generate(generate.GenerateBatch):
    def __init__(self, spec, sampling, out, where, max_restarts):
        self._engine = Engine(Path(out.path(NOTES)))
        self._sampling, self._out, self._where = sampling, out, where
        self._journal = Journal(out.sub(IN_FLIGHT))
        self._journal.start(max_restarts)


def length(conversations, responses):
    """Slower than three engines once they are up, so that answered blocks wait where they were made.

    Before that it is faster: Ray Data asks for no engine whose answers would only wait.
    """
    if Path(os.environ[NOTES_AT], "all_up").exists():
        time.sleep(0.3)
    return [float(len(r)) for r in responses]


def job(root):
    raw = {
        "name": "t",
        "run_root": str(root),
        "control": {"attributes": [{"name": "length", "levels": 2}]},
        "rewards": [{"type": "function", "target": "tests.ray.autoscaling:length", "attributes": ["length"]}],
        "generate": {
            "samples": 1,
            "batch_size": BATCH,
            "pool": {"nodes": "spot", "cpus": 1.0, "gpus": 1.0, "min_size": 1, "max_size": ENGINES},
        },
        "score": {"pool": {"cpus": 0.2}},
    }
    return config.parse(config.Job, raw, where="t")


def notes(folder):
    lines = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda n: n["at"])


def answered(out):
    return {i for b in out.batches("responses", schema.RESPONSES, ["prompt_id"]) for i in b["prompt_id"].to_pylist()}


class Story(threading.Thread):
    """What happens to the cluster while the stage runs."""

    def __init__(self, out):
        super().__init__(daemon=True)
        self._out, self._folder = out, Path(out.path(NOTES))
        self.seen = {"nodes_at_first": alive("spot")}

    def run(self):
        up = lambda: len({n["pid"] for n in notes(self._folder) if n["what"] == "up"})  # noqa: E731
        self.seen["all_up"] = wait_until(lambda: up() == ENGINES, PATIENCE_S)
        self.seen["nodes_at_most"] = alive("spot")
        (self._folder / "all_up").touch()
        wait_until(lambda: len(answered(self._out)) > PROMPTS // 4, PATIENCE_S)
        self._take_one_away()
        rest = lambda: PROMPTS - len(answered(self._out))  # noqa: E731
        wait_until(lambda: rest() <= BATCH, PATIENCE_S)
        engines = lambda: len(running({n["pid"] for n in notes(self._folder)}))  # noqa: E731
        self.seen["shrunk"] = wait_until(lambda: engines() == 1, PATIENCE_S)
        self.seen["left_when_shrunk"] = rest()
        (self._folder / "shrunk").touch()

    def _take_one_away(self):
        """The node of an engine that holds a batch."""
        (self._folder / "hold").touch()
        held = time.time()
        holders = lambda: [n["pid"] for n in notes(self._folder) if n["what"] == "begin" and n["at"] > held]  # noqa: E731
        wait_until(holders, PATIENCE_S)
        victim = holders()[0]
        take_away(victim)
        self.seen |= {"victim": victim, "finished_before": sorted(answered(self._out)), "taken_at": time.time()}
        (self._folder / "hold").unlink()


def main(folder):
    quiet_ray()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the nodes are ended too
    made = job(folder)
    gen, sc = Storage(str(folder / "g")), Storage(str(folder / "s"))
    names = [f"question {i}" for i in range(PROMPTS - 1)] + ["last"]
    prompts = [{"prompt_id": n, "messages": [{"role": "user", "content": n}], "source": "s", "split": "train"} for n in names]
    (folder / "g" / NOTES).mkdir(parents=True)
    os.environ[NOTES_AT] = str(folder / "g" / NOTES)  # nodes inherit it, and their workers
    node = {"resources": {"CPU": 1, "GPU": 1, "spot": 1, "object_store_memory": 150 * 2**20}, "node_config": {}}
    with fake_nodes(folder, {"spot": node | {"min_workers": 0, "max_workers": ENGINES}}):
        story = Story(gen)
        story.start()
        generate.GenerateBatch = Generate
        chats = {p["prompt_id"]: p["messages"] for p in prompts}
        result = generate.run(
            from_rows(prompts, schema.PROMPTS),
            made.generate,
            EngineSpec("m", "float32", 1024, made.generate.engine),
            Bytes(),
            "f",
            gen,
            Silent(),
            generate.patience("generate", PATIENCE_S, generate.journals(gen)),
            then=lambda stream: score.score_stream(stream, made, made.teachers, chats, sc),
        ).check("generate")
        story.join()
        emptied = wait_until(lambda: alive("spot") == 0, PATIENCE_S)
    seen = {"rows_in": result.rows_in, "rows_out": result.rows_out, "emptied": emptied, "notes": notes(folder / "g" / NOTES)}
    print("SEEN " + json.dumps(story.seen | seen), flush=True)
    assert not ray.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
