"""Sums of probe tensors on both sides, by hand; the modules are named as vLLM names its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ctrlray.engine.probes import Given, Probe, compare, in_network
from ctrlray.errors import ConfigError


class QKVParallelLinear(nn.Module):
    """2 inputs; q has 2 outputs, k and v have 1 each."""

    def __init__(self, weight, packed, replicas=1):
        super().__init__()
        self.kernel = weight
        self.weight = nn.Parameter(torch.empty(0) if packed else weight, requires_grad=False)
        self.output_partition_sizes, self.num_kv_head_replicas = [2, 1, 1], replicas
        self.input_size_per_partition, self.params_dtype = 2, torch.float32
        self.quant_method = SimpleNamespace(apply=lambda layer, x: x @ layer.kernel.T)


class VocabParallelEmbedding(nn.Module):
    def __init__(self, weight, start, end):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.shard_indices = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=end)


class ParallelLMHead(VocabParallelEmbedding):
    """The output layer is an embedding to vLLM, too."""


QKV = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0], [100.0, 200.0]])
TABLE = torch.tensor([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0], [8.0, 8.0]])


def network(packed=True, replicas=1, rows=slice(0, 4), start=0):
    padded = torch.cat([TABLE[rows], torch.full((3, 2), 1e9)])  # rows that are no token's
    parts = [
        ParallelLMHead(torch.ones(4, 2), 0, 4),
        VocabParallelEmbedding(padded, start, start + len(TABLE[rows])),
        QKVParallelLinear(QKV, packed, replicas),
        QKVParallelLinear(2 * QKV, packed, replicas),
        QKVParallelLinear(3 * QKV, packed, replicas),
    ]
    return nn.ModuleList(parts)


@pytest.mark.parametrize("packed", [True, False])
def test_a_network_s_sums_by_hand(packed):
    """qkv: 1 + 2 + 3 + 4 + 30 + 300 = 340, three times that in the last layer; rows 1 and 3: 4 + 16."""
    made = in_network(network(packed), (1, 3))
    assert made == {"first qkv": 340.0, "last qkv": 1020.0, "embedding": 30.0, "control rows": 20.0}


def test_workers_of_one_engine_add_up_and_copies_of_heads_count_once():
    """Two workers, each with its own q and half of the vocabulary; both hold the same k and v."""
    halves = [in_network(network(replicas=2, rows=slice(i, i + 2), start=i), (1, 3)) for i in (0, 2)]
    assert [h["first qkv"] for h in halves] == [10 + 330 / 2] * 2
    assert [h["embedding"] for h in halves] == [6.0, 24.0] and [h["control rows"] for h in halves] == [4.0, 16.0]


def stream():
    yield "model.embed_tokens.weight", TABLE
    for layer in (0, 1, 2):
        for name, value in zip("qkv", torch.split((layer + 1) * QKV, [2, 1, 1]), strict=True):
            yield f"model.layers.{layer}.self_attn.{name}_proj.weight", value
        yield f"model.layers.{layer}.self_attn.q_proj.bias", torch.ones(2)
    yield "lm_head.weight", torch.ones(4, 2)


def given(control_ids=(1, 3)):
    made = Given("folder", [n for n, _ in stream()], control_ids)
    passed = dict(made.watch(stream()))
    assert made.seen == set(passed) and len(passed) == 14 and made.seconds > 0
    return made


def test_what_is_given_and_what_is_found_agree():
    probes = compare(given(), [in_network(network(), (1, 3))])
    assert {n: p.expected for n, p in probes.items()} == in_network(network(), (1, 3))
    assert all(p.holds and 0 < p.tolerance < 1e-8 for p in probes.values())


def test_one_changed_number_is_noticed():
    other = network()
    with torch.no_grad():
        other[1].weight[3, 0] += 1e-3
        other[4].kernel[0, 0] *= 1 + 1e-6
    probes = compare(given(), [in_network(other, (1, 3))])
    assert [n for n, p in probes.items() if not p.holds] == ["embedding", "control rows", "last qkv"]


def test_a_probe_that_the_network_lacks_does_not_hold():
    probes = compare(given(), [{"embedding": 30.0}])
    assert probes["embedding"].holds and not probes["first qkv"].holds
    assert not Probe(float("nan"), float("nan"), 1.0).holds


def test_only_layer_counts_as_first_and_last():
    names = ["m.layers.7.attn.qkv_proj.weight"]
    made = Given("f", names, ())
    list(made.watch(iter([(names[0], QKV)])))
    assert made.sums == {"first qkv": 340.0, "last qkv": 340.0}


def test_a_checkpoint_of_unknown_names_is_refused():
    with pytest.raises(ConfigError, match="odd: none of its tensors is known by name"):
        Given("odd", ["a.b"], ())
    assert "control rows" not in given(()).sums
