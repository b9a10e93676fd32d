"""Makes the dial that ships inside the package, `ctrlray/assets/demo`, of a finished run on the embedded model.

What training changed is stored in half precision and, to keep to 6 MB, in fewer ranks: of all singular values of all weights
those stay that hold most of the change for their bytes. The dial is then assembled as `ctrlray chat --demo` does it and
evaluated once more on the run's own prompts; the card shows both. Of several runs and methods the best is taken. A dial that
does not move every attribute is refused, and so is one that a judge sees moving the wrong way.

    python -m benchmarks.demo --run /data/ctrlray-results/variants/* --out ctrlray/assets/demo
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from ctrlray import config, demo
from ctrlray.adapter import ADAPTER, ADAPTER_CARD
from ctrlray.console import Console
from ctrlray.models import EMBEDDED, PreparedBase
from ctrlray.pipeline import Run, evaluated, start_ray
from ctrlray.reporting import control_figures, headline
from ctrlray.stages.report_numbers import outside
from ctrlray.tables import Storage

ROOT = Path(__file__).parent.parent
MAX_BYTES, BESIDE = 6_000_000, 150_000
"""Of the shipped folder, and what of it is kept for the header of the tensors and the other files."""
MAX_WHEEL = 10_000_000
HALF = torch.float16
Change = dict[str, tuple[Tensor, Tensor]]
"""By weight, B [out, rank] and A [rank, in]: the weight moves by B A."""


def accuracy(metrics: Mapping[str, Any], judge: Mapping[str, Any], method: str) -> float:
    """Mean pairwise order accuracy over the attributes, by the training reward and by the judge where there is one."""
    regimes = [metrics, judge] if judge else [metrics]
    values = [a["pairwise"]["value"] for regime in regimes for a in regime[method]["attributes"].values()]
    return sum(values) / len(values)


class Candidate(NamedTuple):
    """A trained dial, and how well it orders pairs."""

    run: Run
    method: str
    accuracy: float


def candidates(runs: Sequence[Run], method: str | None) -> list[Candidate]:
    """Every trained dial of the runs, or those of one method. Raises SystemExit when there is none."""
    found = []
    for run in runs:
        evaluated = run.out("evaluate")
        measured = evaluated.read_json("metrics.json"), evaluated.read_json("judge.json") if run.job.judges else {}
        trained = [o.type for o in run.job.train.objectives if method in (None, o.type)]
        found += [Candidate(run, m, accuracy(*measured, m)) for m in trained]
    if not found:
        raise SystemExit(f"none of these runs has trained {method or 'anything'}")
    return found


def adapters(run: Run, method: str) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """What a method's training changed and its card, after what the model that it started from had been changed by."""
    (objective,) = (o for o in run.job.train.objectives if o.type == method)
    before = adapters(run, objective.start) if isinstance(objective, config.PPO) and objective.start != "base" else []
    place = run.out("train").sub(method, "adapter")
    return [*before, (load(place.read_bytes(ADAPTER)), place.read_json(ADAPTER_CARD))]


def total(changes: Sequence[tuple[dict[str, Tensor], dict[str, Any]]]) -> tuple[Change, dict[str, Tensor]]:
    """All changes of each weight as one product, and the control rows as the last one has them."""
    products: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    rows: dict[str, Tensor] = {}
    for tensors, card in changes:
        for name, value in tensors.items():
            if name.endswith(".lora_A"):
                weight = name.removesuffix(".lora_A")
                high, low = products.setdefault(weight, ([], []))
                high.append(card["lora_scale"] * tensors[f"{weight}.lora_B"])
                low.append(value)
            elif name.endswith(".rows"):
                rows[name] = value
            elif not name.endswith(".lora_B"):
                raise SystemExit(f"{name} was trained whole; the demo takes runs with LoRA")
    return {weight: (torch.cat(high, 1), torch.cat(low, 0)) for weight, (high, low) in products.items()}, rows


def truncated(change: Change, max_bytes: int) -> Change:
    """The change with the largest singular values, by squared value per byte, that fit; both halves share each root.

    B A = (Q_b R_b)(Q_a R_a)^T, so the singular values are those of the small R_b R_a^T.
    """
    parts, ranked = {}, []
    for weight, (high, low) in change.items():
        q_high, r_high = torch.linalg.qr(high.double())
        q_low, r_low = torch.linalg.qr(low.double().T)
        left, values, right = torch.linalg.svd(r_high @ r_low.T)
        parts[weight] = (q_high @ left, values, right @ q_low.T)
        size = (high.shape[0] + low.shape[1]) * HALF.itemsize
        ranked += [(float(v) ** 2 / size, size, weight) for v in values]
    kept: dict[str, int] = {}
    for worth, size, weight in sorted(ranked, reverse=True):
        if size <= max_bytes and worth > 0:
            max_bytes -= size
            kept[weight] = kept.get(weight, 0) + 1
    made = {}
    for weight, rank in kept.items():
        left, values, right = parts[weight]
        roots = values[:rank].sqrt()
        made[weight] = ((left[:, :rank] * roots).to(HALF), (roots[:, None] * right[:rank]).to(HALF))
    return made


def error(change: Change, made: Change) -> float:
    """Share of the change that is lost: ||change - made|| / ||change||, Frobenius, over all weights together."""
    lost, whole = 0.0, 0.0
    for weight, (high, low) in change.items():
        full = high.double() @ low.double()
        kept = made[weight][0].double() @ made[weight][1].double() if weight in made else torch.zeros_like(full)
        lost += float((full - kept).square().sum())
        whole += float(full.square().sum())
    return float((lost / whole) ** 0.5)


def write_adapter(run: Run, method: str, base: PreparedBase, out: Path) -> dict[str, Any]:
    """Write the shipped adapter; returns what storing it cost."""
    change, rows = total(adapters(run, method))
    made = truncated(change, MAX_BYTES - BESIDE - sum(r.numel() for r in rows.values()) * HALF.itemsize)
    tensors = {name: r.to(HALF) for name, r in rows.items()}
    for weight, (high, low) in made.items():
        tensors |= {f"{weight}.lora_B": high.contiguous(), f"{weight}.lora_A": low.contiguous()}
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})
    (out / ADAPTER_CARD).write_text(json.dumps({"lora_scale": 1.0, "control_ids": list(base.control_ids)}) + "\n")
    ranks = [high.shape[1] for high, _ in made.values()]
    trained = max(high.shape[1] for high, _ in change.values())
    return {"trained_rank": trained, "mean_rank": round(sum(ranks) / len(change), 2), "error": round(error(change, made), 4)}


def source(run: Run) -> dict[str, Any]:
    """Where a dial comes from."""
    manifest = run.storage.read_json("manifest.json")
    taken = {k: manifest[k] for k in ("job", "job_hash", "commit")}
    return taken | {"started": manifest["stages"]["prompts"]["started"]}


def again(run: Run, method: str, folder: Path, out: Storage) -> dict[str, str]:
    """Figures of the shipped dial: the run's evaluation of this one method, with the assembled folder's weights."""
    objectives = tuple(o for o in run.job.train.objectives if o.type == method)
    job = run.job.model_copy(
        update={
            "train": run.job.train.model_copy(update={"objectives": objectives}),
            "evaluate": run.job.evaluate.model_copy(update={"methods": (), "sets": ()}),
        }
    )
    start_ray(job.cluster)
    with Console(out.path()) as console:
        evaluated(run, job, lambda _: str(folder), out, console.stage("evaluate")).check("evaluate")
    check(out.read_json("metrics.json")[method], out.read_json("judge.json")[method] if job.judges else None)
    return control_figures(out, method, job.evaluate.sampling)


def check(measured: Mapping[str, Any], judged: Mapping[str, Any] | None) -> None:
    """Raises SystemExit unless every attribute is above chance, and none is below it by the judge, each by its interval."""
    for regime, found, least in (("the training reward", measured, 1), ("the judge", judged or {"attributes": {}}, 0)):
        for name, values in found["attributes"].items():
            if outside(values["pairwise"], 0.5) < least:
                told = ", ".join(f"{k} {v:.3f}" for k, v in values["pairwise"].items())
                raise SystemExit(f"this is no dial to ship: by {regime} {name} has a pairwise order accuracy of {told}")


def card(dial: Mapping[str, Any], in_run: Mapping[str, str]) -> str:
    """The shipped dial in words."""
    attributes = "\n".join(f"| `{a['name']}` | 1 to {a['levels']} |" for a in dial["control"]["attributes"])
    names = dict.fromkeys([*dial["figures"], *in_run])
    figures = "\n".join(f"| {n} | {in_run.get(n, '')} | {dial['figures'].get(n, '')} |" for n in names)
    came, kept = dial["from"], dial["kept"]
    return f"""# The demo dial

`ctrlray chat --demo` and `ctrlray serve --demo` merge this adapter into SmolLM2-135M-Instruct, as `ctrlray models pull` makes it.

| attribute | levels |
|---|---|
{attributes}

Made by the job `{came["job"]}` (hash {came["job_hash"]}, commit {came["commit"]}, started {came["started"]}) with the objective
`{dial["method"]}` (arXiv 2404.01295), and stored by `python -m benchmarks.demo`: LoRA of rank {kept["trained_rank"]}, cut to
{kept["mean_rank"]} singular values of each weight on average, in float16. The cut loses {kept["error"]:.1%} of the change, as the
Frobenius norm has it.

## Measured on the run's held-out prompts

In brackets 95% bootstrap intervals over prompts. `Trained` is the run's own evaluation, `shipped` the same with what is stored
here. The dial was chosen among {came["chosen_from"]} by its pairwise order accuracy, training reward and judge together, on
these same prompts, which flatters it a little.

| figure | trained | shipped |
|---|---|---|
{figures}

## Intended use

To see what a dial does, and for research on controllable safety and helpfulness. The model is small and often wrong, the dial
shifts tendencies that a reward model measures, and nothing here makes an answer safe.
"""


def wheel_bytes() -> int:
    """Size of the package's wheel."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, made)
        shutil.copytree(ROOT / "ctrlray", made / "ctrlray", ignore=shutil.ignore_patterns("__pycache__"))
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", scratch, scratch]
        subprocess.run(command, check=True)
        (wheel,) = made.glob("*.whl")
        return wheel.stat().st_size


def main() -> None:
    """Cut, assemble, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", required=True, help="roots of finished runs of one job")
    parser.add_argument("--method", help="a trained objective; the one that orders pairs best when left out")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    runs = [Run.at(Storage(str(Path(folder).resolve()))) for folder in options.run]
    if others := {run.job.model.name for run in runs} - {EMBEDDED}:
        raise SystemExit(f"the demo is a dial of the embedded model; these are of {sorted(others)}")
    found = candidates(runs, options.method)
    for c in found:
        print(f"{c.run.job.name}, {c.method}: orders {c.accuracy:.3f} of all pairs")
    run, method, _ = max(found, key=lambda c: c.accuracy)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "asset"
        made.mkdir()
        dial: dict[str, Any] = {
            "control": run.job.control.model_dump(mode="json"),
            "export": run.job.export.model_dump(mode="json", include={"levels", "defaults"}),
            "method": method,
            "from": source(run) | {"chosen_from": len(found)},
            "kept": write_adapter(run, method, run.base, made),
            "scales": run.out("distill").read_json("levels.json"),
            "figures": {},
        }
        print(f"{method}: {dial['kept']}", flush=True)
        (made / demo.DIAL).write_text(json.dumps(dial) + "\n")
        demo.assemble(made, Path(scratch) / "merged")
        dial["figures"] = again(run, method, Path(scratch) / "merged", Storage(f"{scratch}/evaluated"))
        (made / demo.DIAL).write_text(json.dumps(dial, indent=1) + "\n")
        (made / "card.md").write_text(card(dial, headline(run, method)))
        size = sum(f.stat().st_size for f in made.iterdir())
        if size > MAX_BYTES:
            raise SystemExit(f"the folder has {size} bytes, {size - MAX_BYTES} too many; raise BESIDE by as much")
        shutil.copytree(made, options.out, dirs_exist_ok=True)
    wheel = wheel_bytes()
    print((options.out / "card.md").read_text())
    print(f"{options.out}: {size / 1e6:.2f} MB; the wheel: {wheel / 1e6:.2f} MB")
    if wheel > MAX_WHEEL:
        raise SystemExit(f"the wheel has {wheel} bytes, more than {MAX_WHEEL}")


if __name__ == "__main__":
    main()
