"""Scale by simulation: what Ray Data, actors, tables and the driver cost around engines that only sleep.

Generation with scoring behind it, through the stage's own code, on one machine. The engines are simulated: each sleeps for a
batch as long as one with the rate measured in `results/generation.json` needs, ten seconds for 96 answers of 25 tokens, which is
also what an engine of a 7B model on a GPU takes for answers of 256 tokens at 2,500 tokens/s. Efficiency is the share of the
time, from when all engines are up to when the first runs out of work, in which engines work: rows/s over what as many single
engines give. The memory runs let engines answer at once. Prompts are a few words each, and their tokens are bytes.

    python -m benchmarks.scale [--engines 1 8 32 64] [--prompts 10000 100000 1000000] [--keep FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import RESULTS, figure, store
from benchmarks.simulation import BUSY, Bytes, Simulation
from ctrlray import config, schema
from ctrlray.ledger import Silent
from ctrlray.quiet import quiet_ray
from ctrlray.tables import Storage, from_rows

ROOT = Path(__file__).parent.parent
ENGINES, PROMPTS = (1, 8, 32, 64), (10_000, 100_000, 1_000_000)
BATCH, TOKENS, BATCHES = 96, 25, 7
"""Answers of a batch and tokens of an answer; batches of an engine where its efficiency is measured."""
FAST_BATCH, FAST_ENGINES = 256, 2
STORE_BYTES = 400 * 2**20
LEAST_EFFICIENCY, MOST_GROWTH, LARGE = 0.95, 1.2, 1_000
ANSWER_BYTES, SLOW_BLOCKS, SLOW_BATCH = 80_000, 300, 32
"""Of the run with a slow scorer: its blocks together are nearly twice the object store."""
RAY_ACTORS, RAY_NODES = 40_000, 2_000
"""What Ray's own release tests reach (release/benchmarks/README.md in its repository)."""
MIB = 2**20


class Watch(Silent):
    """A stage's progress with its times, and the peaks of the driver's memory and the object store's while it runs."""

    def __init__(self) -> None:
        import ray

        self._node = ray.nodes()[0]
        self.first_row_s: float | None = None
        self.store_peak = self.spilled = self.rss_peak = 0
        self._began, self._over = time.time(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def advance(self, rows: int, tokens: int = 0) -> None:
        """Note when the first rows came through."""
        if rows and self.first_row_s is None:
            self.first_row_s = time.time() - self._began

    def _sample(self) -> None:
        from ray._private.internal_api import node_stats

        me = psutil.Process()
        while not self._over.wait(0.25):
            self.rss_peak = max(self.rss_peak, me.memory_info().rss)
            stats = node_stats(self._node["NodeManagerAddress"], self._node["NodeManagerPort"], False).store_stats
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
            "pool": {"min_size": engines, "max_size": engines, "cpus": 0.02},
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
    began, cpu = time.time(), time.process_time()
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
        found = {"wall_s": time.time() - began, "driver_cpu_s": time.process_time() - cpu}
    peaks = {"rss_mib": watch.rss_peak / MIB, "store_mib": watch.store_peak / MIB, "spilled_mib": watch.spilled / MIB}
    told = {"rows": result.rows_out, "blocks": len(out.names("responses")), "first_row_s": watch.first_row_s}
    print("RESULT " + json.dumps(found | peaks | told), flush=True)


class Runs:
    """Runs, each in a process of its own with a Ray of its own; finished ones are kept in a file, where one is given."""

    def __init__(self, kept: Path | None) -> None:
        self._kept, self.others = kept, 0.0
        self._found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept and kept.is_file() else {}

    def run(
        self,
        prompts: int,
        engines: int = FAST_ENGINES,
        batch: int = FAST_BATCH,
        answer_bytes: int = 100,
        reward: str = "length",
        rate: float = float("inf"),
    ) -> dict[str, Any]:
        """One run, or what it gave before."""
        asked = [engines, batch, answer_bytes, reward, rate]
        key = f"{prompts} prompts: {asked}"
        if key not in self._found:
            self._found[key] = _run(prompts, asked)
            if self._kept:
                self._kept.write_text(json.dumps(self._found, indent=1))
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
        if (worked := Path(folder, "g", BUSY)).is_dir():
            found["efficiency"] = efficiency([json.loads(p.read_text()) for p in worked.iterdir()])
    return found


def efficiency(worked: Sequence[Sequence[Sequence[float]]]) -> float:
    """Share of engine time spent in batches, while every engine is up and has work; each batch as its begin and its seconds."""
    begin = max(engine[0][0] for engine in worked)
    end = min(engine[-1][0] + engine[-1][1] for engine in worked)
    busy = sum(max(min(at + s, end) - max(at, begin), 0.0) for engine in worked for at, s in engine)
    return busy / (len(worked) * (end - begin))


def throughput(runs: Runs, engines: Sequence[int], rate: float) -> list[dict[str, Any]]:
    """Figures of one to many engines, each with the same work."""
    made = []
    for number in engines:
        found = runs.run(number * BATCHES * BATCH, number, BATCH, rate=rate)
        target = f">= {LEAST_EFFICIENCY}" if number == 32 else "recorded"
        share = round(found["efficiency"], 4)
        made.append(figure(f"throughput of {number} simulated engines, of linear", target, share, None))
        if number == 32:
            made[-1]["met"] = share >= LEAST_EFFICIENCY
        made.append(figure(f"rows/s of {number} simulated engines", "recorded", round(share * number * rate / TOKENS, 1), None))
    return made


def memory(runs: Runs, prompts: Sequence[int]) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """Figures of few to many prompts, and what each run gave."""
    by_size = {number: runs.run(number) for number in prompts}
    made = []
    for number, found in by_size.items():
        made += [
            figure(f"driver memory at {number} prompts, MiB", "recorded", round(found["rss_mib"], 1), None),
            figure(f"object store at its fullest at {number} prompts, MiB", "recorded", round(found["store_mib"], 2), None),
            figure(f"seconds to the first scored block at {number} prompts", "recorded", round(found["first_row_s"], 1), None),
        ]
    few, many = by_size[min(by_size)], by_size[max(by_size)]
    for key, name in (("rss_mib", "driver memory"), ("store_mib", "object store memory")):
        ratio = round(many[key] / few[key], 3)
        title = f"{name}, {max(by_size)} prompts / {min(by_size)}"
        made.append(figure(title, f"<= {MOST_GROWTH}", ratio, ratio <= MOST_GROWTH))
    return made, by_size


def backpressure(runs: Runs) -> list[dict[str, Any]]:
    """Figures of engines that are many times as fast as the scorer."""
    found = runs.run(SLOW_BLOCKS * SLOW_BATCH, batch=SLOW_BATCH, answer_bytes=ANSWER_BYTES, reward="slow_length")
    made = SLOW_BLOCKS * SLOW_BATCH * ANSWER_BYTES
    share = round(found["store_mib"] * MIB / made, 3)
    return [
        figure(f"slow scorer: MiB spilled out of an object store of {STORE_BYTES // MIB}", "0", found["spilled_mib"], None)
        | {"met": found["spilled_mib"] == 0},
        figure(f"slow scorer: object store at its fullest, of {made // MIB} MiB of answers", "recorded", share, None),
    ]


def limits(runs: dict[int, dict[str, Any]], rate: float) -> list[str]:
    """What breaks first and at what size, for a thousand engines."""
    few, many = runs[min(runs)], runs[max(runs)]
    block_s = BATCH * TOKENS / rate
    cpu_s = (many["driver_cpu_s"] - few["driver_cpu_s"]) / (many["blocks"] - few["blocks"])
    kib = (many["rss_mib"] - few["rss_mib"]) * 1024 / (many["blocks"] - few["blocks"])
    needs, gives = LARGE / block_s, 1 / cpu_s
    most = int(gives * block_s)
    enough = BATCH * max(needs / gives, 1)
    block_mib = BATCH * 256 * 8 / MIB  # four bytes each for a token's id and for its text
    return [
        f"First the driver's CPU: {cpu_s * 1000:.1f} ms per block of answers, so {gives:.0f} blocks/s through one driver, of "
        f"whatever size. {LARGE:,} engines with a block of {BATCH} answers each {block_s:.1f} s bring {needs:.0f} blocks/s, "
        f"{needs * BATCH:,.0f} rows/s. One driver carries {most:,} such engines; for {LARGE:,}, generate.batch_size should be "
        f"{enough:.0f} or more on this processor.",
        f"Driver memory: {kib:.1f} KiB per block beside a base of {few['rss_mib']:.0f} MiB: 100 million answers in blocks of "
        f"{FAST_BATCH} take {1e8 / FAST_BATCH * kib / 2**20:.1f} GiB.",
        f"GCS: {LARGE:,} engines are {LARGE:,} actors, with scorers and writers some {LARGE + LARGE // 32 + 40:,}; Ray's own "
        f"release tests reach {RAY_ACTORS:,} actors and {RAY_NODES:,} nodes.",
        f"Object store: at most two batches wait at each engine, as file names. A block of {BATCH} answers of 256 tokens is "
        f"about {block_mib:.1f} MiB, one for each of {LARGE:,} engines {block_mib * LARGE / 1024:.1f} GiB over all nodes; a slow "
        "scorer fills it no further than Ray Data's budget.",
        "Not part of this: the prompts stage and distill hold their tables in the driver's memory.",
    ]


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
    rate = measured_rate()
    runs = Runs(options.keep)
    figures, by_size = memory(runs, options.prompts)
    figures = [*throughput(runs, options.engines, rate), *figures, *backpressure(runs)]
    notes = [*limits(by_size, rate), f"Before a run began, other work took {runs.others:.0f}% of the processor at most."]
    print(*notes, sep="\n")
    print(store("scale", figures, notes=notes, tokens_per_s=rate, runs=by_size))


if __name__ == "__main__":
    main()
