"""PPO's loop on real gloo ranks under DeepSpeed: two ranks that shard everything learn what one rank learns."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load, save

from ctrlray import config, schema
from ctrlray.adapter import ADAPTER, ADAPTER_CARD
from ctrlray.control import ControlSpace
from ctrlray.tables import Storage
from ctrlray.train.ppo.rollouts import ROLLOUTS, part
from tests import ranks

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]  # processes that each load and build DeepSpeed
CODES = (5, 6)
SPACE = ControlSpace.of(config.Control.model_validate({"attributes": [{"name": "brevity", "levels": 2}]}))
LORA = config.LoRA(rank=4)
STEPS, PROMPTS, GROUP = 2, 4, 2


def write_rollouts(out: Storage, step: int) -> None:
    """As the driver leaves them: four prompts, a setting each, two answers each."""
    rng = torch.Generator().manual_seed(step)
    draw = lambda n: torch.randint(9, 32, (n,), generator=rng).tolist()  # noqa: E731
    rows = []
    for i in range(PROMPTS):
        plain, level = draw(3 + i), 1 + i % 2
        for sample in range(GROUP):
            answer = draw(2 + (i + sample) % 3)
            rows.append(
                {
                    "rollout_id": f"{step}-{i}-{sample}", "step": step, "prompt_id": f"p{i}", "group": i, "sample": sample,
                    "plain_ids": plain, "prompt_ids": [*plain, CODES[level - 1]], "token_ids": answer,
                    "logprobs": [-3.0] * len(answer), "text": "x", "finish_reason": "stop", "weights_version": step, "error": "",
                    "requested_brevity": level, "score_brevity": 0.0, "units_brevity": 1.0 + len(answer) / 4,
                }
            )  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=schema.rollouts(SPACE.names))
    out.write_table(table, ROLLOUTS, part(step))
    out.write_json({"dropped": {}}, ROLLOUTS, f"{part(step)}.json")


def learn(rank, num_ranks, folder, base, stage):
    """The loop itself, on rollouts that are there already; Ray Train's context is this process group's."""
    import ray.train

    from ctrlray.train.ppo.loop import PPOTask, ppo_loop

    ray.train.get_context = lambda: SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: num_ranks)
    ray.train.get_checkpoint = lambda: None
    ray.train.report = lambda *_, **__: None
    out = Storage(str(folder)).sub(f"{num_ranks}-{stage}")
    task = PPOTask(
        folder=base,
        base=base,
        learned=Storage(str(folder)).sub("before"),
        control_ids=CODES,
        space=SPACE,
        objective=config.PPO(
            advantage="gae", start="exmate", steps=STEPS, prompts_per_step=PROMPTS, group_size=GROUP, batch_size=8, epochs=2,
            learning_rate=1e-2, importance_cap=2.0, critic={"warmup_steps": 0},
        ),
        settings=config.Train(lora=LORA, zero_stage=stage, micro_batch_tokens=64, eval_every=1, cpus_per_worker=1),
        out=out, dtype="float32", seed=3, key="k", pad_id=0, timeout_s=30.0, transfer="file",
    )  # fmt: skip
    ppo_loop({"task": task})


@pytest.fixture
def base(tmp_path):
    """A small Llama, and beside it what a training before left."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ctrlray.train.models import load_learner, trained_state

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.3, **sizes)).save_pretrained(tmp_path / "base")
    learner = load_learner(str(tmp_path / "base"), config.CLM(), config.Train(lora=LORA), CODES, "float32", "cpu")
    with torch.no_grad():
        for p in learner.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    state, card = trained_state(learner, LORA, CODES)
    before = Storage(str(tmp_path)).sub("before")
    before.write_bytes(save(state), "adapter", ADAPTER)
    before.write_json(card, "adapter", ADAPTER_CARD)
    return str(tmp_path / "base")


def test_two_ranks_under_zero_3_learn_what_one_rank_learns(base, tmp_path):
    for num_ranks, stage in ((1, 0), (2, 3)):
        out = Storage(str(tmp_path)).sub(f"{num_ranks}-{stage}")
        for step in range(STEPS):
            write_rollouts(out, step)
        ranks.run(num_ranks, learn, tmp_path, base, stage)
    one, two = (Storage(str(tmp_path)).sub(name) for name in ("1-0", "2-3"))
    adapters = [load(out.read_bytes("adapter", ADAPTER)) for out in (one, two)]
    assert adapters[0].keys() == adapters[1].keys() and adapters[0]
    for name, value in adapters[0].items():
        assert torch.allclose(value, adapters[1][name], atol=2e-5), name
    for a, b in zip(one.read_json("curves.json"), two.read_json("curves.json"), strict=True):
        for key in ("reward", "kl", "kl_base", "value", "entropy", "clip_fraction", "importance"):
            assert math.isfinite(a[key]) and a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key
        assert abs(a["kl_base"] - a["kl"]) > 1e-2
