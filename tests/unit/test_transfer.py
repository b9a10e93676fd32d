"""What is sent from a trainer to engines: who has which rank, which tensors come, and that layers make up the whole merge."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from ctrlray import config
from ctrlray.adapter import merged_tensors, tensor_names
from ctrlray.engine.transfer import Offer, Ranks
from ctrlray.train.ppo.transfer import Layers, layer_of

OFFER = Offer(3, Ranks(engines=2, width=2), "10.0.0.7", 4711, "bfloat16", ["a", "b"], [[2, 3], [5]])


def test_two_engines_of_two_processes_each_beside_the_trainer():
    """Rank 0 sends; vLLM adds a process's place in its engine: 1, 2 | 3, 4."""
    assert OFFER.ranks.world_size == 5 and [OFFER.ranks.first(i) for i in (0, 1)] == [1, 3]
    place = {"master_address": "10.0.0.7", "master_port": 4711, "world_size": 5, "packed": False}
    assert OFFER.joining(0) == place | {"rank_offset": 1} and OFFER.joining(1) == place | {"rank_offset": 3}
    members = [0, *(OFFER.joining(i)["rank_offset"] + j for i in range(2) for j in range(2))]
    assert members == list(range(OFFER.ranks.world_size))


def test_an_offer_says_what_comes_in_which_order_and_how_much():
    assert OFFER.contents() == {"names": ["a", "b"], "dtype_names": ["bfloat16"] * 2, "shapes": [[2, 3], [5]]}
    assert OFFER.num_bytes == 2 * (6 + 5) and OFFER._replace(dtype="float32").num_bytes == 4 * 11
    assert Offer.of(json.loads(json.dumps(OFFER._asdict()))) == OFFER


def test_layers_are_told_by_their_first_number():
    assert layer_of("model.layers.12.mlp.3.up.weight") == "model.layers.12"
    assert layer_of("model.layers.12.self_attn.q_proj.weight.lora_A") == "model.layers.12"
    assert layer_of("model.embed_tokens.weight.rows") == layer_of("model.embed_tokens.weight") == "model.embed_tokens.weight"


def network(folder, lora, seed=0, critic=False):
    """The network as a trainer has it, its trained parts moved off where they began."""
    from ctrlray.train.models import add_lora, load_network

    settings = config.Train(lora=lora)
    made, _ = load_network(str(folder), settings, [5, 6], "float32", "cpu")
    if critic:
        add_lora(made, lora, "critic")
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=rng) * 0.1
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [config.LoRA(rank=4, alpha=12), None])
def test_layer_by_layer_equals_the_whole_merge(tiny, lora, dtype):
    """To the bit, and under the names and with the shapes of the checkpoint; the critic's adapters stay out."""
    from ctrlray.train.models import Learner, adapter_card, trained_state

    net = network(tiny, lora, critic=lora is not None)
    state, card = trained_state(Learner(net, config.CLM(), torch.float32), lora, [5, 6])
    assert card == adapter_card(lora, [5, 6])
    whole = dict(merged_tensors(str(tiny), state, card, dtype))
    layers = Layers(net, card, sharded=False)
    parts = dict(layers.merged(getattr(torch, dtype)))
    assert parts.keys() == whole.keys() == tensor_names(str(tiny))
    assert all(torch.equal(parts[n], whole[n]) and parts[n].dtype == whole[n].dtype for n in whole)
    assert layers.shapes() == {n: list(t.shape) for n, t in parts.items()} and list(layers.shapes()) == list(parts)
    before = load_file(tiny / "model.safetensors")
    changed = [n for n, t in before.items() if not torch.equal(whole[n], t.to(getattr(torch, dtype)))]
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"} <= set(changed)


def test_tensors_of_one_layer_come_one_after_another(tiny):
    names = list(Layers(network(tiny, config.LoRA(rank=2)), {}, sharded=False).shapes())
    layers = [layer_of(n) for n in names]
    runs = [name for i, name in enumerate(layers) if i == 0 or layers[i - 1] != name]
    assert len(runs) == len(set(runs)) and layers.count("model.layers.0") == layers.count("model.layers.1") == 9
