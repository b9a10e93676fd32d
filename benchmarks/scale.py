"""Scale by simulation: what Ray Data, actors, tables and the driver cost around engines that only sleep.

Generation with scoring behind it, through the stage's own code, on one machine. The engines are simulated: each sleeps for a
batch as long as one with the rate measured in `results/generation.json` needs for 96 answers of 25 tokens, which the notes name;
an engine of a 7B model on a GPU takes ten seconds for as many answers of 256 tokens at 2,500 tokens/s. Efficiency is the share
of the time, from when all engines are up to when the first runs out of work, in which engines work: rows/s over what as many
single engines give that never wait. In the memory runs two engines take a quarter of a second for 512 answers of a thousand
characters, which one scorer keeps up with. Prompts are a few words each, and their tokens are bytes.

    python -m benchmarks.scale [--engines 1 8 32 64] [--prompts 10000 100000 1000000] [--keep FILE]

Of other numbers than these nothing is stored.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.common import RESULTS, cpu, figure, store
from benchmarks.simulation import BUSY, Bytes, Simulation
from ctrlray import config, schema
from ctrlray.ledger import Silent
from ctrlray.pipeline import commit
from ctrlray.placement import writers
from ctrlray.quiet import quiet_ray
from ctrlray.tables import Storage, from_rows

ROOT = Path(__file__).parent.parent
ENGINES, PROMPTS = (1, 8, 32, 64), (10_000, 100_000, 1_000_000)
BATCH, TOKENS, BATCHES = 96, 25, 7
"""Answers of a batch and tokens of an answer; batches of an engine where its efficiency is measured."""
FAST_BATCH, FAST_ENGINES, FAST_BYTES, FAST_S = 512, 2, 1_000, 0.25
"""Of the memory runs: 8 blocks/s, of the 10 to 20 that Ray Data gives one scorer at most. Else what waits would be measured."""
CEILING_BLOCKS = 200
"""Of the run that finds that most, which are as large as those of a thousand engines."""
LOOKS_PER_S, ACTOR_TASKS = 10, 2
"""How often Ray Data looks for finished tasks, and how many it gives an actor at once."""
STORE_BYTES = 400 * 2**20
LEAST_EFFICIENCY, MOST_GROWTH, MOST_KEPT, LARGE = 0.95, 1.2, 0.01, 1_000
ANSWER_BYTES, SLOW_BLOCKS, SLOW_BATCH = 80_000, 300, 32
"""Of the run with a slow scorer: its blocks together are nearly twice the object store."""
SAMPLE_S, LEAST_SAMPLES = 0.5, 5
RAY_ACTORS, RAY_NODES = 10_000, 250
"""What Ray's own release tests reach and more (release/benchmarks/README.md in its repository)."""
MIB = 2**20


class Watch(Silent):
    """A stage's progress with its times, and the peaks of the driver's memory and the object store's while it runs."""

    def __init__(self) -> None:
        import ray
        from ray._common.network_utils import build_address
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

        node = ray.nodes()[0]
        # one channel for all samples: those of ray._private.internal_api.node_stats, one each, would grow the driver
        self._node = NodeManagerServiceStub(init_grpc_channel(build_address(node["NodeManagerAddress"], node["NodeManagerPort"])))
        self.blocks = self.samples = self.store_peak = self.spilled = self.rss_peak = 0
        self.first: tuple[float, float] | None = None
        self.last = (0.0, 0.0)
        """When the first block came through and when the last, each with the CPU seconds of this process by then."""
        self.began, self._over = time.time(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._sample()

    def advance(self, rows: int, tokens: int = 0) -> None:
        """Note when blocks come through."""
        if rows:
            self.last = (time.time(), time.process_time())
            self.first = self.first or self.last
            self.blocks += 1

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        from grpc import RpcError
        from ray.core.generated.node_manager_pb2 import GetNodeStatsRequest

        self.rss_peak = max(self.rss_peak, psutil.Process().memory_info().rss)
        try:
            stats = self._node.GetNodeStats(GetNodeStatsRequest(include_memory_info=False), timeout=5).store_stats
        except RpcError:  # a worker that ends while it is asked; the next sample sees the store again
            return
        self.samples += 1
        self.store_peak = max(self.store_peak, stats.object_store_bytes_used)
        self.spilled = max(self.spilled, stats.spilled_bytes_total)


def measured_rate() -> float:
    """Tokens/s of one engine, as the benchmark of generation stored it."""
    figures = json.loads((RESULTS / "generation.json").read_text())["figures"]
    return float(next(f["measured"] for f in figures if f["name"] == "ctrlray tokens/s"))


def job(folder: str, engines: int, batch: int, reward: str) -> config.Job:
    raw = {
        "name": "scale",
        "run_root": folder,
        "control": {"attributes": [{"name": "length", "levels": 2}]},
        "rewards": [{"type": "function", "target": f"benchmarks.simulation:{reward}", "attributes": ["length"]}],
        "generate": {
            "samples": 1,
            "batch_size": batch,
            "sampling": {"max_tokens": TOKENS},
            "pool": {"min_size": engines, "max_size": engines, "cpus": 0.01},
        },
        "score": {"pool": {"cpus": 0.5}},
        "cluster": {"stall_timeout_s": 600},
    }
    return config.parse(config.Job, raw, where="scale")


def write_prompts(out: Storage, number: int) -> None:
    """A table of prompts of a few words, a part at a time."""
    for first in range(0, number, schema.PROMPTS_PER_PART):
        rows = [
            {"prompt_id": f"{i:016x}", "messages": [{"role": "user", "content": f"Say {i}."}], "source": "s", "split": "train"}
            for i in range(first, min(first + schema.PROMPTS_PER_PART, number))
        ]
        out.write_table(from_rows(rows, schema.PROMPTS), "prompts", schema.part_of(f"{first:016x}"))


def child(folder: str, engines: int, batch: int, answer_bytes: int, reward: str, tokens_per_s: float) -> None:
    """One run in this process: the stage's accounts, times and peaks as a line of JSON."""
    quiet_ray()
    import ray

    from ctrlray.stages import generate, score
    from ctrlray.stages.requests import PromptParts

    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(
        address="local",
        num_cpus=2,  # Ray starts as many idle workers; engines take a small part of one each
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=environment,
    )
    made, out, scores = job(folder, engines, batch, reward), Storage(f"{folder}/g"), Storage(f"{folder}/s")
    spec = Simulation(
        model="simulated",
        dtype="float32",
        max_context=1024,
        settings=made.generate.engine,
        tokens_per_s=tokens_per_s,
        answer_tokens=TOKENS,
        answer_bytes=answer_bytes,
        engines=engines,
        folder=out.uri,
    )
    table = PromptParts(Storage(f"{folder}/p"), "train")
    notes = generate.journals(out) + score.journals(made.teachers, scores)
    with Watch() as watch:
        result = generate.run(
            table,
            made.generate,
            spec,
            Bytes(),  # type: ignore[arg-type]
            "simulated",
            out,
            watch,
            generate.patience("generate", made.cluster.stall_timeout_s, notes),
            then=lambda stream: score.score_stream(stream, made, made.teachers, table, scores),
        ).check("generate")
        accounts = score.run(out, table, made, scores, Silent()).check("score")
        assert accounts.rows_out == result.rows_out and accounts.facts, "scoring was to stream behind generation"
        found = {"rows": result.rows_out, "wall_s": time.time() - watch.began}
    assert watch.first is not None and watch.blocks > 1
    assert watch.samples >= LEAST_SAMPLES, f"the object store was seen {watch.samples} times only: make the machine quieter"
    found |= {"rss_mib": watch.rss_peak / MIB, "store_mib": watch.store_peak / MIB, "spilled_mib": watch.spilled / MIB}
    found |= {"blocks": watch.blocks, "samples": watch.samples, "first_row_s": watch.first[0] - watch.began}
    found |= {"stream_s": watch.last[0] - watch.first[0], "stream_cpu_s": watch.last[1] - watch.first[1]}
    print("RESULT " + json.dumps(found), flush=True)


class Runs:
    """Runs, each in a process of its own with a Ray of its own; finished ones are kept in a file, where one is given."""

    def __init__(self, kept: Path | None) -> None:
        self._kept, self.others = kept, 0.0
        self._at = f"{commit()} on {cpu()}"  # asked once: a commit in the midst of it makes no other run
        self._found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept and kept.is_file() else {}

    def run(
        self,
        prompts: int,
        engines: int = FAST_ENGINES,
        batch: int = FAST_BATCH,
        answer_bytes: int = FAST_BYTES,
        reward: str = "length",
        rate: float = FAST_BATCH * TOKENS / FAST_S,
    ) -> dict[str, Any]:
        """One run, or what it gave before."""
        asked = [engines, batch, answer_bytes, reward, rate]
        key = f"{prompts} prompts: {asked} at {self._at}"
        if key not in self._found:
            self._found[key] = _run(prompts, asked)
            if self._kept:
                beside = self._kept.with_name(f"{self._kept.name}.tmp")
                beside.write_text(json.dumps(self._found, indent=1))
                os.replace(beside, self._kept)
        self.others = max(self.others, self._found[key]["others_cpu_percent"])
        print(key, {k: round(v, 3) for k, v in self._found[key].items()}, flush=True)
        return self._found[key]


def _run(prompts: int, asked: Sequence[Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Storage(f"{folder}/p"), prompts)
        others = psutil.cpu_percent(interval=5)
        command = [sys.executable, "-m", "benchmarks.scale", "--child", folder, *map(str, asked)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
        found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
        assert found["rows"] == prompts
        found["others_cpu_percent"] = others
        worked = [[json.loads(x) for x in p.read_text().splitlines()] for p in Path(folder, "g", BUSY).iterdir()]
        if worked:  # one that ended would have left a file of its own beside its successor's
            assert len(worked) == asked[0], f"{len(worked)} engines worked where {asked[0]} were asked for"
            found["efficiency"] = efficiency(worked)
    return found


def efficiency(worked: Sequence[Sequence[Sequence[float]]]) -> float:
    """Share of engine time spent in batches, while every engine is up and has work; each batch as its begin and its seconds."""
    begin = max(engine[0][0] for engine in worked)
    end = min(engine[-1][0] + engine[-1][1] for engine in worked)
    busy = sum(max(min(at + s, end) - max(at, begin), 0.0) for engine in worked for at, s in engine)
    return busy / (len(worked) * (end - begin))


def throughput(runs: Runs, engines: Sequence[int], rate: float) -> tuple[list[dict[str, Any]], dict[int, float]]:
    """Figures of one to many engines, each with the same work, and the driver's share of a core by their number."""
    made: list[dict[str, Any]] = []
    shares: dict[int, float] = {}
    for number in engines:
        found = runs.run(number * BATCHES * BATCH, number, BATCH, 4 * TOKENS, rate=rate)
        target = f">= {LEAST_EFFICIENCY}" if number == 32 else "recorded"
        share = round(found["efficiency"], 4)
        made.append(figure(f"throughput of {number} simulated engines, of linear", target, share, None))
        if number == 32:
            made[-1]["met"] = share >= LEAST_EFFICIENCY
        shares[number] = found["stream_cpu_s"] / found["stream_s"]
        rows_s = round(share * number * rate / TOKENS, 1)
        made += [
            figure(f"rows/s of {number} simulated engines, by their rate and that share", "recorded", rows_s, None),
            figure(f"driver's share of a core at {number} simulated engines", "recorded", round(shares[number], 4), None),
        ]
    return made, shares


def memory(runs: Runs, prompts: Sequence[int]) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """Figures of few to many prompts, and what each run gave."""
    by_size = {number: runs.run(number) for number in sorted(prompts)}
    made = []
    for number, found in by_size.items():
        made += [
            figure(f"driver memory at {number:,} prompts, MiB", "recorded", round(found["rss_mib"], 1), None),
            figure(f"object store at its fullest at {number:,} prompts, MiB", "recorded", round(found["store_mib"], 2), None),
            figure(f"seconds to the first scored block at {number:,} prompts", "recorded", round(found["first_row_s"], 1), None),
        ]
    least, most = min(by_size), max(by_size)
    ratio = round(by_size[most]["rss_mib"] / by_size[least]["rss_mib"], 3)
    title = f"driver memory, {most:,} prompts / {least:,}"
    made.append(figure(title, f"<= {MOST_GROWTH}", ratio, ratio <= MOST_GROWTH))
    # the store is near empty at both sizes, and a ratio of that would be of chance: growth counts beside what passes through
    kept = round(grown(by_size, "store_mib") * MIB / ((most - least) * FAST_BYTES), 4)
    title = f"object store, from {least:,} prompts to {most:,}: growth, of the answers' bytes"
    made.append(figure(title, f"<= {MOST_KEPT}", kept, kept <= MOST_KEPT))
    return made, by_size


def grown(runs: Mapping[int, Mapping[str, Any]], what: str) -> float:
    """By how much a figure is larger at the most prompts than at the fewest."""
    return float(runs[max(runs)][what]) - float(runs[min(runs)][what])


def backpressure(runs: Runs) -> list[dict[str, Any]]:
    """Figures of engines that are many times as fast as the scorer."""
    found = runs.run(SLOW_BLOCKS * SLOW_BATCH, FAST_ENGINES, SLOW_BATCH, ANSWER_BYTES, "slow_length", rate=math.inf)
    made = SLOW_BLOCKS * SLOW_BATCH * ANSWER_BYTES
    share = round(found["store_mib"] * MIB / made, 3)
    return [
        figure(f"slow scorer: MiB spilled out of an object store of {STORE_BYTES // MIB}", "0", found["spilled_mib"], None)
        | {"met": found["spilled_mib"] == 0},
        figure(f"slow scorer: object store at its fullest, of {made // MIB} MiB of answers", "recorded", share, None),
    ]


def ceiling(runs: Runs) -> tuple[dict[str, Any], float]:
    """How many blocks a second one actor of each kind passes on when no engine takes any time: a figure, and the number."""
    found = runs.run(CEILING_BLOCKS * BATCH, FAST_ENGINES, BATCH, 4 * TOKENS, rate=math.inf)
    per_s = (found["blocks"] - 1) / found["stream_s"]
    return figure("blocks/s through one scorer, engines that answer at once", "recorded", round(per_s, 1), None), per_s


def limits(runs: Mapping[int, Mapping[str, Any]], shares: Mapping[int, float], rate: float, per_actor: float) -> list[str]:
    """What breaks first and at what size, for a thousand engines."""
    block_s = BATCH * TOKENS / rate
    needs, blocks = LARGE / block_s, max(grown(runs, "blocks"), 1.0)
    scorers, writing = math.ceil(needs / per_actor), writers(LARGE)
    kib = max(grown(runs, "rss_mib"), 0.0) * 1024 / blocks
    place = max(grown(runs, "store_mib"), 0.0) * MIB / blocks
    block_mib = BATCH * 256 * 8 / MIB  # four bytes each for a token's id and for its text
    most = LOOKS_PER_S * ACTOR_TASKS
    scorer = (
        f"a pool of one scorer, which passes on {per_actor:.0f} blocks/s however little each takes; Ray Data looks for finished "
        f"tasks {LOOKS_PER_S} times a second and gives an actor {ACTOR_TASKS}, so {most} at most, and here all of it shares "
        f"two cores. {LARGE:,} engines need {scorers} actors in score.pool, more where a reward takes longer. "
        f"Actors that write requests and scores grow with the engines, to {writing} of each."
    )
    breaks = sorted([(int(per_actor * block_s), scorer), _driver(runs, shares, needs)])
    return [
        f"{LARGE:,} engines with a block of {BATCH} answers each {block_s:.1f} s bring {needs:.0f} blocks/s, "
        f"{needs * BATCH:,.0f} rows/s.",
        *(f"{'Then' if i else 'First'}, at {engines:,} engines, {what}" for i, (engines, what) in enumerate(breaks)),
        f"Driver memory: {kib:.1f} KiB per block beside a base of {runs[min(runs)]['rss_mib']:.0f} MiB: 100 million answers take "
        f"{1e8 / FAST_BATCH * kib / 2**20:.1f} GiB in blocks of {FAST_BATCH}, at most {1e8 / BATCH * kib / 2**20:.1f} GiB in "
        f"blocks of {BATCH}.",
        f"Object store: {place:.0f} bytes per block for its place among the prompts; at most two batches wait at each engine, as "
        f"file names. A block of {BATCH} answers of 256 tokens is about {block_mib:.1f} MiB, one for each of {LARGE:,} engines "
        f"{block_mib * LARGE / 1024:.1f} GiB over all nodes; a slow scorer fills it no further than Ray Data's budget.",
        f"GCS: {LARGE:,} engines are {LARGE + scorers + 2 * writing:,} actors with scorers and writers; Ray's own release tests "
        f"reach more than {RAY_ACTORS:,} actors and {RAY_NODES:,} nodes.",
        "Not part of this: the prompts stage and distill hold their tables in the driver's memory.",
    ]


def _driver(runs: Mapping[int, Mapping[str, Any]], shares: Mapping[int, float], needs: float) -> tuple[int, str]:
    """How many engines fill a core with the driver's process: by a line through the shares, or by blocks, `needs` a second."""
    counts, values = np.array(list(shares), float), np.array(list(shares.values()), float)
    each, base = np.polyfit(counts, values, 1) if counts.size > 1 else (values[0] / counts[0], 0.0)
    by_engines = max(float(base + LARGE * each), 0.0)
    many = runs[max(runs)]
    block_s = many["stream_cpu_s"] / (many["blocks"] - 1)
    cores = max(by_engines, needs * block_s, 1e-3)
    more = f" Blocks of {math.ceil(BATCH * cores)} (generate.batch_size), or several jobs, go further." if cores > 1 else ""
    return int(LARGE / cores), (
        f"the driver's CPU: {values.max():.1%} of a core with {int(counts.max())} engines and {each:.2%} for each further one, "
        f"so {by_engines:.2f} cores with {LARGE:,}; {block_s * 1000:.1f} ms per block at {max(runs):,} prompts, so "
        f"{needs * block_s:.2f} cores.{more}"
    )


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=ENGINES)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--keep", type=Path, help="a file of finished runs, to go on after a run that was cut off")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, engines, batch, size, reward, rate = options.child
        child(folder, int(engines), int(batch), int(size), reward, float(rate))
        return
    if len(set(options.prompts)) < 2:
        parser.error("--prompts: give two sizes at least, growth is what is measured")
    if options.keep and (commit() or "+").endswith("+"):
        parser.error("--keep: commit first; runs of a tree that differs from its commit cannot be told apart")
    if options.keep:
        options.keep.parent.mkdir(parents=True, exist_ok=True)
    rate = measured_rate()
    runs = Runs(options.keep)
    figures, shares = throughput(runs, options.engines, rate)
    of_memory, by_size = memory(runs, options.prompts)
    of_actors, per_actor = ceiling(runs)
    figures += [*of_memory, *backpressure(runs), of_actors]
    others = f"Before a run began, other work took {runs.others:.0f}% of the processor at most."
    notes = [*limits(by_size, shares, rate, per_actor), others]
    print(*notes, sep="\n")
    if (sorted(options.engines), sorted(options.prompts)) != (sorted(ENGINES), sorted(PROMPTS)):
        print(json.dumps(figures, indent=1))
        return
    print(store("scale", figures, notes=notes, tokens_per_s=rate, runs=by_size))


if __name__ == "__main__":
    main()
