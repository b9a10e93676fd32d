"""What only a GPU shows: an engine in device memory, and training over NCCL. Run with `pytest -m gpu` on a GPU node."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

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


def test_tree_rows_under_flex_attention_equal_separate_sequences():
    """Loss and gradients in float32 of packed rows of several prompts, compiled, against one padded sequence per answer."""
    from ctrlray.config import ExMATE
    from ctrlray.train.batches import tree_rows
    from ctrlray.train.models import Learner
    from tests.unit.test_attention import EXAMPLES, GROUPED, network

    torch.set_float32_matmul_precision("highest")
    net = network("llama", **GROUPED | {"head_dim": 16}).cuda()
    own, found = net.config._attn_implementation, []
    for path in (None, "separate"):
        learner = Learner(net, ExMATE(weight=0.7), torch.float32, "cuda", path)
        if path is None:
            assert learner.path == "flex"
        else:
            net.set_attn_implementation(own)
        net.zero_grad()
        batch = learner.collated(tree_rows(EXAMPLES, wrong=True, share=learner.shares), 0)
        loss = learner(type(batch)(*(t.cuda() for t in batch)), num_tokens=8.0, num_wrong=3.0)
        loss.total.backward()
        found.append((loss.total.item(), {n: p.grad.clone() for n, p in net.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert all(torch.allclose(g, found[1][1][n], atol=1e-5) for n, g in found[0][1].items())


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (3, "optimizer"), (3, "all")])
def test_offloaded_steps_lower_the_loss(stage, offload, tmp_path):
    """DeepSpeed moves optimizer states, or weights too, to the host and back; a snapshot goes on."""
    os.environ.pop("DS_ACCELERATOR", None)  # other tests run on the processor
    import torch.distributed as dist

    from ctrlray import config
    from ctrlray.train.batches import tree_rows
    from ctrlray.train.engine import Trainer
    from ctrlray.train.models import Learner, parameter_groups
    from tests.unit.test_attention import EXAMPLES, GROUPED, network

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        settings = config.Train(lora=None, gpus_per_worker=1, zero_stage=stage, offload=offload, learning_rate=1e-2)
        net = network("llama", **GROUPED | {"head_dim": 16}).cuda().train()
        learner = Learner(net, config.CLM(), torch.float32, "cuda")
        trainer = Trainer(learner, parameter_groups(learner, settings), settings, gpu=True)
        batch = learner.collated(tree_rows(EXAMPLES, wrong=False, share=True), 0)
        losses = [trainer.step([batch], 1.0, ranks=1, num_tokens=8.0, num_wrong=0.0)["nll"] for _ in range(5)]
        assert losses[-1] < losses[0] - 0.1
        trainer.restore(trainer.snapshot(), 5)
        assert trainer.step([batch], 1.0, ranks=1, num_tokens=8.0, num_wrong=0.0)["nll"] < losses[-1] + 0.05
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("width", [1, 2])
def test_weights_go_over_nccl_into_an_engine_that_stays_up(tiny, private_cache, tmp_path, width):
    """From a trainer on the last GPU to all processes of an engine on the first ones, twice in one group; then as by file."""
    if torch.cuda.device_count() <= width:
        pytest.skip(f"needs {width + 1} CUDA devices: NCCL takes no two members on one")
    import ray

    from ctrlray import config, models
    from ctrlray.engine.engine import EngineSpec
    from ctrlray.engine.pool import EnginePool
    from ctrlray.engine.transfer import BACKEND
    from ctrlray.tables import Storage
    from ctrlray.train.ppo.handover import Incoming
    from ctrlray.train.ppo.transfer import Group
    from tests.e2e.test_transfer import Trainer, until
    from tests.e2e.test_weights import SPACE, random_adapter

    base = models.prepare(config.Model(name=str(tiny)), SPACE, ["hello there"])
    settings = config.EngineSettings(gpu_memory_utilization=0.3, tensor_parallel=width)
    spec = EngineSpec(base.folder, "bfloat16", 512, settings, gpus=1, masked_ids=base.control_ids, transfer=BACKEND)
    root = str(Path(__file__).parent.parent.parent)
    ray.init(address="local", num_cpus=2, num_gpus=width, runtime_env={"env_vars": {"PYTHONPATH": root}})
    trainer = Trainer(base, Storage(str(tmp_path)), Group, f"cuda:{torch.cuda.device_count() - 1}")
    try:
        with EnginePool(spec, config.Pool(gpus=1), "nccl", 300) as engines:
            incoming = Incoming(Storage(str(tmp_path)), engines, "bfloat16", until)
            trainer.thread.start()
            for version in (1, 2):
                adapter, card = random_adapter(base, seed=version, size=0.3)
                trainer.learn(adapter)
                engines.renew = partial(incoming.bring, version, version)
                engines.renew()
                assert engines.weights_version == version and trainer.formed == [width + 1]
            sent = dict(engines._checksums)
            assert engines.load_adapter(adapter, card, 3).checksums == pytest.approx(sent, abs=0.05)
    finally:
        trainer.over.set()
        ray.shutdown()
