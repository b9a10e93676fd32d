"""Weights from a trainer of two ranks under ZeRO-3 to two engines of two processes each: real processes, over gloo."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctrlray import config
from ctrlray.adapter import merged_tensors, tensor_names
from ctrlray.engine.probes import Given
from ctrlray.engine.transfer import Offer, Ranks
from ctrlray.tables import Storage
from ctrlray.train.ppo.handover import HANDOVER, Outgoing, Request
from ctrlray.train.ppo.weights import read_weights, write_weights
from tests import ranks
from tests.gloo import Gloo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # processes that each load and build DeepSpeed
CONTROL_IDS = [5, 6]
ENGINES, WIDTH = 2, 2


def train_and_send(rank, num_ranks, folder, base, lora):
    """A rank of the trainer, moved off where it began: sends version 1, then writes the same as a file, gathered at once."""
    from ctrlray.train.engine import Trainer
    from ctrlray.train.models import adapter_card, trained_state
    from ctrlray.train.ppo.policy import load_policy, policy_groups
    from ctrlray.train.ppo.transfer import Layers

    class Watched(Layers):
        """Of what went before, nothing is whole on any rank."""

        def gathered(self):
            before = []
            for layer in super().gathered():
                assert all(p.numel() for p in layer.values()) and not any(p.numel() for p in before)
                before += layer.values()
                yield layer

    ppo, settings = config.PPO(advantage="gae", steps=9), config.Train(lora=lora, zero_stage=3)
    policy = load_policy(base, ppo, settings, CONTROL_IDS if lora else [], "float32", "cpu")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=rng) * 0.1
    trainer = Trainer(policy, policy_groups(policy, settings), settings, gpu=False)
    out, card = Storage(str(folder)), adapter_card(lora, CONTROL_IDS)
    task = SimpleNamespace(out=out, folder=base, control_ids=CONTROL_IDS, objective=ppo)
    outgoing = Outgoing(task, Watched(policy.network, card, sharded=True), rank, num_ranks, Gloo)
    while not outgoing.seconds:
        outgoing.meet(1, False)
    with trainer.gathered() as whole:
        if rank == 0:
            write_weights(out, 1, *trained_state(whole, lora, CONTROL_IDS))


def receive(engine, folder):
    """An engine as vLLM's processes are: each joins at its place within the engine, and takes what the offer lists."""
    out = Storage(str(folder))
    while not out.exists(HANDOVER, "000001-offer.json"):
        time.sleep(0.05)
    offer = Offer.of(out.read_json(HANDOVER, "000001-offer.json"))
    place, what = offer.joining(engine), offer.contents()

    def worker(place_within):
        group = Gloo(place["master_address"], place["master_port"], place["world_size"], place["rank_offset"] + place_within)
        taken = {}
        for name, dtype, shape in zip(what["names"], what["dtype_names"], what["shapes"], strict=True):
            taken[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            group.broadcast(taken[name], src=0)
        save_file(taken, folder / f"engine-{engine}-{place_within}.safetensors")

    workers = [threading.Thread(target=worker, args=(i,)) for i in range(WIDTH)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()


FULL = pytest.param(None, marks=pytest.mark.soak)


@pytest.mark.parametrize("lora", [config.LoRA(rank=4, alpha=12), FULL], ids=["lora", "full"])
def test_every_engine_gets_the_whole_merge_a_layer_at_a_time(tiny, tmp_path, lora):
    """Equal to the bit to merging the file that the same trainer writes."""
    request = Request(Ranks(ENGINES, WIDTH), 0, "bfloat16", least=1, most=1)
    out = Storage(str(tmp_path))
    out.write_json(request._asdict(), HANDOVER, "000001-request.json")
    spawn = multiprocessing.get_context("spawn")
    engines = [spawn.Process(target=receive, args=(i, tmp_path), daemon=True) for i in range(ENGINES)]
    for e in engines:
        e.start()
    ranks.run(2, train_and_send, tmp_path, str(tiny), lora)
    for e in engines:
        e.join(60)
    assert [e.exitcode for e in engines] == [0] * ENGINES
    state, card = read_weights(out, 1)
    whole = dict(merged_tensors(str(tiny), state, card, "bfloat16"))
    received = [load_file(f) for f in sorted(Path(tmp_path).glob("engine-*"))]
    assert len(received) == ENGINES * WIDTH and whole.keys() == tensor_names(str(tiny))
    for taken in received:
        assert taken.keys() == whole.keys() and all(torch.equal(taken[n], whole[n]) for n in whole)
    given = Given("base", whole, CONTROL_IDS)
    list(given.watch(iter(whole.items())))
    sent = out.read_json(HANDOVER, "000001-sent.json")
    assert sent["sums"] == given.sums and len(sent["sums"]) == 4
