"""What a run shows in the terminal: one live line per stage, and a closing summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ctrlray.config import Job
    from ctrlray.pipeline import Run

_QUIET_S = 30.0


class StageLine:
    """Progress of one stage: a bar on a terminal, a line every 30 s elsewhere."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._began = self._said = time.monotonic()
        self._rows = self._total = self._tokens = 0
        self._task: TaskID = console.bars.add_task(name, total=None, note="", rate="")
        self._first_block: float | None = None
        self._losses = ""
        self._gap: float | None = None

    def total(self, rows: int) -> None:
        """Say how many rows there will be."""
        self._total = rows
        self._console.bars.update(self._task, total=rows)

    def advance(self, rows: int, tokens: int = 0) -> None:
        """Say that some more rows, with so many sampled tokens, are done."""
        self._rows += rows
        if tokens and self._first_block is None:  # start-up is no part of the rate
            self._first_block = time.monotonic()
        else:
            self._tokens += tokens
        self._console.bars.update(self._task, advance=rows, rate=self._rate())
        self._speak(f"{self._rows}/{self._total} rows {self._rate()}")

    def note(self, text: str) -> None:
        """Say what the stage is doing now."""
        self._first_block, self._tokens, self._losses = None, 0, ""
        self._console.bars.update(self._task, note=text)
        if text:
            self._speak(text, force=True)

    def measure(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Say what an optimizer step measured: its loss and the code gap where it was taken, or reward and KL."""
        shown = {"loss": values.get("loss"), "held-out gap": values.get("valid_gap", self._gap)}
        shown |= {"reward": values.get("reward"), "KL": values.get("kl")}
        self._gap = shown["held-out gap"]
        self._losses = "  ".join(f"{k} {v:.2f}" for k, v in shown.items() if v is not None)

    def _rate(self) -> str:
        if self._losses:
            return self._losses
        seconds = time.monotonic() - (self._first_block or self._began)
        return f"{self._tokens / seconds:.0f} tokens/s" if self._tokens else ""

    def _speak(self, text: str, force: bool = False) -> None:
        if self._console.live:
            return
        now = time.monotonic()
        if force or now - self._said > _QUIET_S or self._rows >= self._total:
            self._said = now
            self._console.print(f"{self._name:<9} {now - self._began:6.0f}s  {text}")


class Console:
    """The terminal of one run; use as a context manager."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._rich = RichConsole(stderr=False, highlight=False)
        self.live = sys.stdout.isatty()
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total} {task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._rich,
            disable=not self.live,
        )
        self._began = time.monotonic()

    def __enter__(self) -> Console:
        """Start drawing."""
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self.bars.stop()

    def print(self, text: str) -> None:
        """One line, as it is."""
        self._rich.print(text, markup=False, soft_wrap=True)
        sys.stdout.flush()

    def head(self, job: Job) -> None:
        """Say what runs where."""
        self.print(
            f"job {job.name}: {job.model.name}, {', '.join(a.name for a in job.control.attributes)}; run root {self._root}"
        )

    def stage(self, name: str) -> StageLine:
        """A new stage's line."""
        return StageLine(self, name)

    def close(self, run: Run) -> None:
        """The closing summary: accounts of each stage, the headline figures, where the results are."""
        from ctrlray.pipeline import STAGES
        from ctrlray.reporting import headline

        self.bars.stop()
        self.print("")
        for line in accounts({s: r for s in STAGES if (r := run.result(s)) is not None}):
            self.print(line)
        if run.result("evaluate") is not None:
            for objective in run.job.train.objectives:
                self.print(f"\n{objective.type}, with 95% intervals over held-out prompts:")
                for name, value in headline(run, objective.type).items():
                    self.print(f"  {name}: {value}")
        if (report := run.result("report")) is not None:
            self.print(f"\nreport  {report['facts']['page']}")
        if (exported := run.result("export")) is not None:
            self.print(f"model   {exported['facts']['folder']}")
        self.print(f"took    {(time.monotonic() - self._began) / 60:.1f} minutes")


def accounts(results: Mapping[str, dict[str, Any]], *, reasons: bool = False) -> list[str]:
    """The ledger of finished stages, one line each; with `reasons`, below it those of its rows that were left out."""
    lines = [f"{'stage':<10}{'in':>7}{'out':>7}{'dropped':>9}{'quarantined':>13}{'tokens':>9}{'seconds':>9}"]
    for stage, r in results.items():
        lines += [_account(stage, r), *(_reasons(r) if reasons else [])]
    return lines


def _account(stage: str, r: dict[str, Any]) -> str:
    dropped, bad = sum(r["dropped"].values()), sum(r["quarantined"].values())
    seconds = f"  with {host}" if (host := r["facts"].get("streamed_behind")) else f"{r['seconds']:>9}"
    return f"{stage:<10}{r['rows_in']:>7}{r['rows_out']:>7}{dropped:>9}{bad:>13}{r['tokens'] or '':>9}{seconds}"


def _reasons(r: dict[str, Any]) -> list[str]:
    """`  dropped      12 cell_full, 3 truncated`, most rows first, the same of those quarantined, and accounts beside these."""
    left = {kind: r[kind] for kind in ("dropped", "quarantined")} | dict(_beside(r["facts"]))
    return [f"  {kind:<12} " + _most_first(found) for kind, found in left.items() if found]


def _beside(facts: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Accounts that a stage keeps of other rows than its own: PPO's rollouts and prompts, judged answers, sets of prompts."""
    for name, found in facts.items():
        if isinstance(found, Mapping) and "rollouts" in found:
            yield f"{name}: dropped", found["dropped"]
            yield f"{name}: prompts left out", found.get("prompts_left_out", {})
    if facts.get("not_judged"):
        yield "answers", {"not judged": facts["not_judged"]}
    for name, found in facts.get("sets", {}).items():
        yield f"{name}: dropped", found["dropped"]
        yield f"{name}: quarantined", found["quarantined"]


def _most_first(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {why}" for why, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
