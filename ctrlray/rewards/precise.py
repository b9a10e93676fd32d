"""A classifier's last layers in float32, whatever its body computes in: bfloat16 logits tie answers that are close."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def widen_head(network: Any) -> None:
    """Keep what lies outside of a sequence classifier's body in float32, inputs and products too, also under autocast."""
    body = network.base_model
    if body is network:  # one without a body of its own
        return
    for module in network.children():
        if module is not body:
            module.float()
            module.forward = _Wide(module.forward)


class _Wide:
    """A forward method in float32."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **named: Any) -> Any:
        wide = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        kind = next((a.device.type for a in wide if isinstance(a, Tensor)), "cpu")
        with torch.autocast(kind, enabled=False):
            return self._forward(*wide, **named)

