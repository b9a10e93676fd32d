"""Serving: the ingress of `ctrlray serve` against plain `vllm serve`, at rising concurrency.

Requests/s, time to the first token and time between tokens of streamed chats, by the same client, on the same exported folder
with the same engine arguments, greedily, so that both give about the same answers. Each pass starts a server of its own; the two
alternate. Plain vLLM gets the levels as `chat_template_kwargs`, ctrlray as `control`. Start-up, warm-up and the time in which
Ray's agents settle are not counted. All of it shares the machine's cores, the client too, which reads one message for each token
of vLLM's and fewer of ctrlray's, whose tokens travel together where they come fast or streams are many: CPU seconds by process
say who took them, the gap between messages and the tokens of one what the reader of a stream sees of it.

`--only` measures one of the two and stores nothing, to compare settings: CTRLRAY_SERVE_TRANSPORT, or what `--set` says.

    python -m benchmarks.serve [--repeats 3] [--concurrency 1,2,4,8,16] [--tokens 48]
    python -m benchmarks.serve --only ctrlray --repeats 1 --concurrency 8 --set ingress.stream_interval_ms=200
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
import yaml

from benchmarks.common import figure, middle, store
from ctrlray import config, models
from ctrlray.control import ControlSpace
from ctrlray.engine.engine import EngineSpec
from ctrlray.serve import transport
from ctrlray.serve.policy import mint
from ctrlray.stages import export
from ctrlray.stages.prompts import read_source

ROOT = Path(__file__).parent.parent
CONTEXT, START_S, WARM_UP, SETTLE_S, LEAST_REQUESTS = 1024, 600, 4, 20.0, 24
MOST_AT_ONCE = 64
"""Of the engine; more would measure a queue."""
LEVELS = {"helpfulness": 2, "safety": 2}
KINDS = {
    "ProxyActor": "Serve's proxy",
    "ctrlray:Ingress": "ingress",
    "ctrlray:DialServer": "vLLM server",
    "openai.api_server": "vLLM server",
    "VLLM::APIServer": "vLLM server",
    "VLLM::EngineCore": "engine",
    "VLLM::Worker": "engine",
}
"""What stands in a command line, and what the process is."""
Point = dict[str, Any]


class Timed(NamedTuple):
    """One streamed answer; seconds from sending the request."""

    first_s: float
    """Until the first text came; 0 when none did."""
    end_s: float
    tokens: int
    gaps_s: list[float]
    """Between messages that came one after the other."""


def make_model(folder: Path) -> EngineSpec:
    """Export the prepared base with its dial into `folder`; the engine that both servers run."""
    attributes = (config.Attribute(name="helpfulness", levels=3), config.Attribute(name="safety", levels=3, score="harmlessness"))
    job = config.Job(name="served", run_root=str(folder.parent), control=config.Control(attributes=attributes))
    base = models.prepare(job.model, ControlSpace.of(job.control))
    shutil.copytree(base.folder, folder)
    export.finish(str(folder), base, job, "clm", {})
    settings = config.EngineSettings(max_num_seqs=MOST_AT_ONCE)
    return EngineSpec(str(folder), models.pick_dtype("auto", gpu=False), CONTEXT, settings)


def our_command(spec: EngineSpec, port: int, scratch: Path, more: Sequence[str]) -> tuple[list[str], str]:
    """The command of ctrlray's server, and the key that it knows."""
    key, digest = mint()
    policy = scratch / "policy.yaml"
    policy.write_text(yaml.safe_dump({"keys": [{"name": "benchmark", "hash": digest}]}))
    settings = (f"max_context={CONTEXT}", f"dtype={spec.dtype}", f"engine.max_num_seqs={MOST_AT_ONCE}", *more)
    command = [sys.executable, "-m", "ctrlray", "serve", spec.model, "--policy", str(policy), "--port", str(port)]
    return command + [word for s in settings for word in ("--set", s)], key


def plain_command(spec: EngineSpec, port: int) -> list[str]:
    """The command of vLLM's own server, with the arguments of our engine.

    The module that `vllm serve` runs: the script itself looks for a package named vllm, which the CPU build is not.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", spec.model, "--served-model-name", "model"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    for name, value in spec.arguments().items():
        flag = "--" + name.replace("_", "-")
        if name != "model" and value is not False:
            command += [flag] if value is True else [flag, str(value)]
    return command


@contextmanager
def serving(who: str, spec: EngineSpec, scratch: Path, more: Sequence[str]) -> Iterator[tuple[psutil.Process, str, str]]:
    """A server that answers and has settled: its process, URL and key."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    command, key = our_command(spec, port, scratch, more) if who == "ctrlray" else (plain_command(spec, port), "none")
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | spec.device_environment()
    if who == "vllm":  # as it ships: where its processes begin and end is no argument of the engine
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with (scratch / f"{who}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        asyncio.run(answering(process, f"http://127.0.0.1:{port}", key, who, Path(log.name)))
        time.sleep(SETTLE_S)
        yield psutil.Process(process.pid), f"http://127.0.0.1:{port}", key
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        finally:
            kill(children)


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kill those that are still there; any may end meanwhile."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


async def answering(process: subprocess.Popen[bytes], url: str, key: str, who: str, log: Path) -> None:
    """Return once some requests were answered."""
    end = time.monotonic() + START_S
    async with aiohttp.ClientSession() as session:
        done = 0
        while done < WARM_UP:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{who} did not start:\n{log.read_text()[-4000:]}")
            try:
                await ask(session, url, key, who, "Say hello.", 4)
                done += 1
            except (aiohttp.ClientError, RuntimeError):
                await asyncio.sleep(1)


async def ask(session: aiohttp.ClientSession, url: str, key: str, who: str, text: str, tokens: int) -> Timed:
    """Stream one answer. Raises RuntimeError for an answer that is none."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    body |= {"model": "model", "control": LEVELS} if who == "ctrlray" else {"model": "model", "chat_template_kwargs": LEVELS}
    began, first_s, used = time.perf_counter(), 0.0, 0
    times: list[float] = []
    async with session.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {(await answer.text())[:500]}")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            now_s = time.perf_counter() - began
            if any(c["delta"].get("content") for c in chunk["choices"]):
                first_s = first_s or now_s
                times.append(now_s)
            used = (chunk.get("usage") or {}).get("completion_tokens", used)
    return Timed(first_s, time.perf_counter() - began, used, [b - a for a, b in pairwise(times)])


async def level(url: str, key: str, who: str, texts: Sequence[str], concurrency: int, tokens: int) -> Point:
    """All texts, so many at once."""
    waiting = iter(texts)
    found: list[Timed] = []
    patient = aiohttp.ClientTimeout(total=None)  # many at once take long
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=patient) as session:

        async def caller() -> None:
            for text in waiting:
                found.append(await ask(session, url, key, who, text, tokens))

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(concurrency)))
        return point(found, time.perf_counter() - began)


def point(found: Sequence[Timed], seconds: float) -> Point:
    """What all answers of some time make."""
    answered = sum(t.tokens for t in found)
    between = [(t.end_s - t.first_s) / (t.tokens - 1) for t in found if t.tokens > 1 and t.first_s]
    first = [t.first_s for t in found if t.first_s]  # an answer may end before it says anything
    gaps = [g for t in found for g in t.gaps_s]
    return {
        "requests_per_s": len(found) / seconds,
        "tokens_per_s": answered / seconds,
        "first_token_s": statistics.median(first),
        "first_token_p95_s": statistics.quantiles(first, n=20, method="inclusive")[-1],
        "between_tokens_s": statistics.median(between),
        "gap_s": statistics.median(gaps),
        "gap_p95_s": statistics.quantiles(gaps, n=20, method="inclusive")[-1],
        "longest_gap_s": max(gaps),
        "tokens_per_message": answered / (len(gaps) + len(first)),
        "tokens": answered,
    }


def cpu_seconds(root: psutil.Process) -> Counter[str]:
    """User and system time so far by kind of process."""
    spent: Counter[str] = Counter()
    for process in [root, *root.children(recursive=True)]:
        try:
            line, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        kind = next((kind for part, kind in KINDS.items() if part in line), "Ray and the rest")
        spent[kind] += times.user + times.system
    own = os.times()
    spent["client"] = own.user + own.system
    return spent


def measure_one(who: str, spec: EngineSpec, levels: Sequence[int], tokens: int, more: Sequence[str]) -> dict[int, Point]:
    """One server's points by concurrency; `more` are settings of ctrlray's."""
    texts = [r.messages[-1]["content"] for r in read_source(config.PackagedPrompts()) if r.messages]
    found: dict[int, Point] = {}
    with tempfile.TemporaryDirectory() as scratch, serving(who, spec, Path(scratch), more) as (process, url, key):
        for concurrency in levels:
            asked = [f"{concurrency}. {texts[i % len(texts)]}" for i in range(max(LEAST_REQUESTS, 4 * concurrency))]
            before = cpu_seconds(process)
            point = asyncio.run(level(url, key, who, asked, concurrency, tokens))
            spent = cpu_seconds(process)
            per_token = {kind: round(1000 * (spent[kind] - before[kind]) / point["tokens"], 3) for kind in spent}
            found[concurrency] = point | {"cpu_ms_per_token": {k: v for k, v in per_token.items() if v >= 0.01}}
            print(f"{who}, {concurrency} at once: {json.dumps(found[concurrency])}", flush=True)
    return found


def figures(found: Mapping[str, Sequence[Mapping[int, Point]]], levels: Sequence[int]) -> list[dict[str, Any]]:
    """Ratios repeat by repeat, then what they are made of."""
    made = []
    asked = (
        ("requests/s", "requests_per_s", ">= 0.9", lambda v: v >= 0.9),
        ("time to first token", "first_token_s", "<= 1.15", lambda v: v <= 1.15),
        ("95th percentile of the time to first token", "first_token_p95_s", "recorded", None),
        ("time between tokens", "between_tokens_s", "recorded", None),
        ("time between messages", "gap_s", "recorded", None),
        ("95th percentile of the time between messages", "gap_p95_s", "recorded", None),
    )
    for label, name, target, met in asked:
        for c in levels:
            pairs = zip(found["ctrlray"], found["vllm"], strict=True)
            value, spread = middle([ours[c][name] / plain[c][name] for ours, plain in pairs])
            made.append(figure(f"{label}, ctrlray / vllm serve, {c} at once", target, value, met and met(value), spread))
    return made + recorded(found, levels)


def recorded(found: Mapping[str, Sequence[Mapping[int, Point]]], levels: Sequence[int]) -> list[dict[str, Any]]:
    """Each server's own figures."""
    units = {
        "requests_per_s": "requests/s",
        "tokens_per_s": "tokens/s",
        "first_token_s": "seconds to first token",
        "first_token_p95_s": "seconds to first token, 95th percentile",
        "between_tokens_s": "seconds between tokens",
        "gap_s": "seconds between messages",
        "gap_p95_s": "seconds between messages, 95th percentile",
        "longest_gap_s": "seconds of the longest gap between messages",
        "tokens_per_message": "tokens of a message",
        "tokens": "tokens in all",
    }
    made = []
    for name, label in units.items():
        for who, points in found.items():
            for c in levels:
                value, spread = middle([p[c][name] for p in points])
                made.append(figure(f"{label}, {who}, {c} at once", "recorded", value, None, spread))
    return made


def cpu_table(found: Mapping[str, Sequence[Mapping[int, Point]]]) -> dict[str, dict[int, dict[str, float]]]:
    """Median CPU milliseconds per token by server, concurrency and kind of process."""

    def of(points: Sequence[Point]) -> dict[str, float]:
        kinds = sorted({k for p in points for k in p["cpu_ms_per_token"]})
        return {k: round(statistics.median(p["cpu_ms_per_token"].get(k, 0.0) for p in points), 3) for k in kinds}

    return {who: {c: of([r[c] for r in results]) for c in results[0]} for who, results in found.items()}


def at_once(text: str) -> list[int]:
    """`1,8,64` -> [1, 8, 64]. Raises argparse's error for what the engine does not hold."""
    levels = [int(c) for c in text.split(",")]
    if not all(1 <= c <= MOST_AT_ONCE for c in levels):
        raise argparse.ArgumentTypeError(f"{text}: the engines hold 1 to {MOST_AT_ONCE} requests at once")
    return levels


def main() -> None:
    """Measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrency", type=at_once, default="1,2,4,8,16")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--only", choices=("ctrlray", "vllm"))
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    if options.set and options.only != "ctrlray":
        parser.error("--set needs --only ctrlray: what is stored is of the settings as they are")
    levels = options.concurrency
    found: dict[str, list[dict[int, Point]]] = {who: [] for who in ("ctrlray", "vllm") if options.only in (None, who)}
    with tempfile.TemporaryDirectory() as scratch:
        spec = make_model(Path(scratch) / "model")
        for repeat in range(options.repeats):
            for who in list(found)[:: 1 if repeat % 2 == 0 else -1]:
                found[who].append(measure_one(who, spec, levels, options.tokens, options.set))
    if options.only:
        for line in recorded(found, levels):
            print(f"{line['name']}: {line['measured']} {line['spread']}")
        print(json.dumps(cpu_table(found), indent=1))
        return
    settings = {"dtype": spec.dtype, "new_tokens": options.tokens, "repeats": options.repeats, "max_num_seqs": MOST_AT_ONCE}
    settings |= {"transport": transport.chosen(), "settled_s": SETTLE_S}
    print(store("serve", figures(found, levels), settings=settings, cpu_ms_per_token=cpu_table(found)))


if __name__ == "__main__":
    main()
