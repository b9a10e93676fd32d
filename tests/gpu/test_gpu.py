"""What only a GPU shows: an engine in device memory, and training over NCCL. Run with `pytest -m gpu` on a GPU node."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_engine_answers_and_swaps_weights(tiny, private_cache):
    from ctrlray import config, models
    from ctrlray.control import ControlSpace
    from ctrlray.engine.engine import Engine, EngineSpec

    space = ControlSpace((config.Attribute(name="brevity", levels=2),))
    base = models.prepare(config.Model(name=str(tiny)), space, ["hello there"])
    spec = EngineSpec(base.folder, "bfloat16", 512, config.EngineSettings(gpu_memory_utilization=0.3), gpus=1)
    os.environ.update(spec.environment())
    engine = Engine(spec)
    prompt = base.renderer(space).render([{"role": "user", "content": "q"}], (1,))
    (first,) = engine.generate([prompt], config.Sampling(max_tokens=8, temperature=0.0))
    engine.load_weights(base.folder, version=1)
    (again,) = engine.generate([prompt], config.Sampling(max_tokens=8, temperature=0.0))
    assert engine.weights_version == 1 and first[0].token_ids == again[0].token_ids
