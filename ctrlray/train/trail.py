"""What a training loop leaves on its way: curves, notes for the driver, snapshots that Ray Train keeps, and what it learned."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ctrlray import config
from ctrlray.adapter import ADAPTER, ADAPTER_CARD
from ctrlray.tables import Storage
from ctrlray.train.engine import Trainer

SNAPSHOT = "snapshot.safetensors"
"""Parameters and moments by name, as `Trainer.snapshot` gives them."""
_RECENT_STEPS = 100


def read_learned(out: Storage) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter that a finished training left, and its card."""
    from safetensors.torch import load

    return load(out.read_bytes("adapter", ADAPTER)), out.read_json("adapter", ADAPTER_CARD)


class Trail:
    """One rank's; every rank keeps one and calls it alike, rank 0 writes.

    A step is one of the loop's; where it makes several optimizer steps its point says so in `updates`.
    """

    def __init__(self, trainer: Trainer, out: Storage, rank: int, num_steps: int) -> None:
        self._trainer, self._out, self._rank, self._num_steps = trainer, out, rank, num_steps
        self.curves: list[dict[str, float]] = []

    def resume(self) -> int:
        """Go on from the last snapshot of this very training; returns how many steps are done."""
        import ray.train
        from safetensors.torch import load_file

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            note = json.loads((Path(folder) / "progress.json").read_text())
            self.curves = note["curves"]
            updates = sum(int(p.get("updates", 1)) for p in self.curves)
            self._trainer.restore(load_file(Path(folder) / SNAPSHOT), updates)
        return int(note["step"])

    def add(self, point: dict[str, float]) -> None:
        """One more step; noted for the driver, which looks once a second and sees every step."""
        self.curves.append(point)
        if self._rank == 0:
            recent = self.curves[-_RECENT_STEPS:]
            self._out.write_json({"step": len(self.curves), "steps": self._num_steps, "recent": recent}, "progress.json")

    def keep(self, point: dict[str, float]) -> None:
        """A snapshot behind this step, through Ray Train."""
        import ray.train
        from safetensors.torch import save_file

        state = self._trainer.snapshot()
        if self._rank != 0:
            ray.train.report(dict(point))
            return
        with tempfile.TemporaryDirectory() as scratch:
            save_file(state, Path(scratch) / SNAPSHOT)
            (Path(scratch) / "progress.json").write_text(json.dumps({"step": point["step"], "curves": self.curves}))
            ray.train.report(dict(point), checkpoint=ray.train.Checkpoint.from_directory(scratch))

    def write_learned(self, lora: config.LoRA | None, control_ids: Sequence[int]) -> bool:
        """Write `adapter` and `curves.json`; whether this rank is the one that did."""
        from safetensors.torch import save

        from ctrlray.train.models import trained_state

        with self._trainer.gathered() as network:
            if self._rank != 0:
                return False
            state, card = trained_state(network, lora, control_ids)
        self._out.write_bytes(save(state), "adapter", ADAPTER)
        self._out.write_json(card, "adapter", ADAPTER_CARD)
        self._out.write_json(self.curves, "curves.json")
        return True
