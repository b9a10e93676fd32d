"""Training on real gloo ranks under DeepSpeed: the same steps whatever ranks, micro batches and ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctrlray import config
from tests import ranks

pytestmark = pytest.mark.slow  # processes that each load and build DeepSpeed
STEPS = [[0, 2, 4, 6], [1, 3, 5, 7], [0, 1, 2, 4, 6], [7, 6, 3, 0, 5]]
"""Examples of four prompts each, so two ranks have two rows each, which take a micro batch each."""
ROW = 16
LEARNING_RATE = 5e-3


def examples():
    from ctrlray.train.batches import TrainExample

    rng = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(9, 32, (n,), generator=rng).tolist())  # noqa: E731
    made = []
    for i in range(8):
        prompt, answer = draw(3 + i % 3), draw(2 + i % 4)
        made.append(TrainExample(((*prompt, 5), (*prompt, 6)), (answer, answer), 1.0 + 0.5 * (i % 2), f"p{i // 2}"))
    return made


def trainer(stage, lora):
    from transformers import AutoConfig, AutoModelForCausalLM

    from ctrlray.train.engine import Trainer
    from ctrlray.train.models import ControlRows, Learner, add_lora, parameter_groups

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=32, tie_word_embeddings=False, **sizes))
    net.requires_grad_(False)
    add_lora(net, lora)
    net.set_input_embeddings(ControlRows(net.get_input_embeddings(), [5, 6]))
    settings = config.Train(lora=lora, zero_stage=stage, learning_rate=LEARNING_RATE, control_rate=LEARNING_RATE)
    learner = Learner(net.train(), config.ExMATE(weight=0.8), torch.float32)
    return Trainer(learner, parameter_groups(learner, settings), settings, gpu=False), learner


def step(made, learner, chosen, rank, num_ranks, most):
    from ctrlray.train.batches import shard, tree_rows
    from ctrlray.train.worker import sum_over_ranks

    every = examples()
    rows = tree_rows([(i, every[i]) for i in chosen], wrong=True, share=True)
    branches = [b for r in rows for b in r.branches]
    totals = {
        "num_tokens": sum(b.weight * len(b.token_ids) for b in branches if b.right),
        "num_wrong": float(sum(not b.right for b in branches)),
    }
    mine = shard(rows, num_ranks, most)[rank]
    parts = made.step([learner.collated(m, 0) for m in mine], 1.0, ranks=num_ranks, **totals)
    return len(mine), sum_over_ranks(parts, num_ranks)["nll"]


def train(rank, num_ranks, folder, stages, lora, most):
    """All steps under each stage; a snapshot after two of them, one at the end."""
    from safetensors.torch import save_file

    for stage in stages:
        made, learner = trainer(stage, lora)
        for i, chosen in enumerate(STEPS):
            passes, _ = step(made, learner, chosen, rank, num_ranks, most)
            assert passes >= num_ranks
            if i in (1, 3):
                state = made.snapshot()
                if rank == 0:
                    save_file(state, folder / f"{num_ranks}-{stage}-{i + 1}.safetensors")


def go_on(rank, num_ranks, folder, stage, start, steps, out):
    """Steps 3 and 4 from another's snapshot."""
    from safetensors.torch import load_file, save_file

    made, learner = trainer(stage, config.LoRA(rank=2))
    made.restore(load_file(folder / start), steps)
    for chosen in STEPS[steps:]:
        step(made, learner, chosen, rank, num_ranks, ROW)
    state = made.snapshot()
    if rank == 0:
        save_file(state, folder / out)


def load(folder: Path, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / name))


def close(a, b, atol):
    assert a.keys() == b.keys()
    worst = max((a[n] - b[n]).abs().max().item() for n in a)
    assert worst <= atol, worst


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    lora = config.LoRA(rank=2)
    ranks.run(1, train, folder, [0, 2], lora, 10_000)  # one rank, one micro batch a step
    ranks.run(2, train, folder, [0, 1, 2, 3], lora, ROW)  # two ranks, two micro batches each
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_of_two_micro_batches_equal_one_big_batch(runs, stage):
    one, two = load(runs, "1-0-2.safetensors"), load(runs, f"2-{stage}-2.safetensors")
    moved = max(t.abs().max().item() for n, t in one.items() if n.endswith("lora_B.default.weight.value"))
    assert moved > LEARNING_RATE  # adapters begin at zero
    close(one, two, 1e-5)


def test_a_snapshot_of_zero_3_on_two_ranks_goes_on_on_one(runs):
    ranks.run(1, go_on, runs, 0, "2-3-2.safetensors", 2, "resumed.safetensors")
    close(load(runs, "1-0-4.safetensors"), load(runs, "resumed.safetensors"), 2e-5)


@pytest.mark.soak
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_snapshot_of_one_rank_goes_on_on_two(runs, stage):
    ranks.run(2, go_on, runs, stage, "1-0-2.safetensors", 2, f"resumed-{stage}.safetensors")
    close(load(runs, f"2-{stage}-4.safetensors"), load(runs, f"resumed-{stage}.safetensors"), 2e-5)


def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(runs):
    """One rank on a processor."""
    ranks.run(1, go_on_alone, runs)
    one, resumed = load(runs, "1-0-4.safetensors"), load(runs, "alone.safetensors")
    assert all(torch.equal(one[n], resumed[n]) for n in one)


def go_on_alone(rank, num_ranks, folder):
    from safetensors.torch import load_file, save_file

    made, learner = trainer(0, config.LoRA(rank=2))
    made.restore(load_file(folder / "1-0-2.safetensors"), 2)
    for chosen in STEPS[2:]:
        step(made, learner, chosen, rank, num_ranks, 10_000)
    save_file(made.snapshot(), folder / "alone.safetensors")


def test_snapshots_of_another_network_are_refused():
    from ctrlray.errors import DataError
    from ctrlray.train.engine import Trainer

    made = Trainer.__new__(Trainer)
    made.engine = type("Engine", (), {"module": torch.nn.Linear(2, 2)})()
    with pytest.raises(DataError, match="another network"):
        made.restore({"weight.value": torch.zeros(2, 2)}, 1)


def smollm(rank, num_ranks, folder, base):
    """Four steps of the real model under every ZeRO stage."""
    import json

    from ctrlray.train.engine import Trainer
    from ctrlray.train.models import load_learner, parameter_groups

    curves = {}
    for stage in (0, 1, 2, 3):
        torch.manual_seed(0)
        settings = config.Train(zero_stage=stage, learning_rate=1e-3)
        learner = load_learner(base.folder, config.ExMATE(weight=0.8), settings, base.control_ids, "float32", "cpu")
        made = Trainer(learner, parameter_groups(learner, settings), settings, gpu=False)
        curves[stage] = [step(made, learner, STEPS[i % 2], rank, num_ranks, 64)[1] for i in range(4)]
    if rank == 0:
        (folder / "curves.json").write_text(json.dumps(curves))


@pytest.mark.soak
def test_every_zero_stage_trains_the_embedded_model_alike(tmp_path):
    import json

    from ctrlray import models
    from ctrlray.control import ControlSpace

    base = models.prepare(config.Model(), ControlSpace((config.Attribute(name="brevity", levels=2),)))
    ranks.run(2, smollm, tmp_path, base)
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert curves["0"][2] < curves["0"][0] - 0.1  # it learns
    for stage in ("1", "2", "3"):
        assert curves[stage] == pytest.approx(curves["0"], rel=1e-3), stage
