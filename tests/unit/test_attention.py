"""Tree rows under attention: the same numbers as separate sequences, or no tree rows."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ctrlray.config import ExMATE
from ctrlray.train import attention
from ctrlray.train.attention import Segments, allowed, block_mask, choose_path, owners, segment_attention
from ctrlray.train.batches import Branch, TrainExample, TreeRow, collate, tree_rows
from ctrlray.train.models import Learner

A = TrainExample(((1, 2, 8), (1, 2, 9)), ((5, 6), (5, 6)), 1.0, "p")
B = TrainExample(((1, 2, 9), (1, 2, 8)), ((7,), (7,)), 2.0, "p")
C = TrainExample(((1, 2, 3, 4, 9), (1, 2, 3, 4, 8)), ((7, 5, 5, 10, 6), (7, 5, 5, 10, 6)), 0.5, "q")
EXAMPLES = [(0, A), (1, B), (2, C)]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
LAYERS = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "gemma3_text": GROUPED | LAYERS,
    "mistral": GROUPED | {"sliding_window": 3},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.0},
}


def network(kind, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=32, **ids, **settings)).eval()


def test_mask_by_hand():
    """Two prompts of 2 and 1 tokens, the first with branches of 2 and 1, the second with one of 1."""
    spans = torch.tensor([[0, 2, 0, 0], [2, 4, 0, 2], [4, 5, 0, 2], [5, 6, 0, 0], [6, 7, 5, 6]])
    seen = allowed(*owners(spans, 7)).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def packed(seed):
    rng = random.Random(seed)
    rows = []
    for _ in range(rng.randint(1, 3)):
        branches = tuple(Branch((), (1,) * rng.randint(1, 6), True, 1.0, 0) for _ in range(rng.randint(0, 3)))
        rows.append(TreeRow((1,) * rng.randint(1, 5), branches))
    return collate(rows, 0)


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_segments_equal_masked_attention(seed, window):
    """Values and gradients, with two heads to a key, windows counted in positions."""
    batch = packed(seed)
    size, at = batch.input_ids_RS.shape[1], batch.position_ids_RS[0]
    mask = allowed(*owners(batch.spans_K4, size))
    if window:
        mask &= at[:, None] - at[None] < window
    torch.manual_seed(seed)
    given = [torch.randn(1, heads, size, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    pull = torch.randn(1, size, 4, 4, dtype=torch.float64)
    tree = Segments(batch.spans_K4)
    mine, _ = segment_attention(None, *given, None, 0.7, sliding_window=window or None, tree=tree)  # type: ignore[arg-type]
    plain = scaled_dot_product_attention(*given, attn_mask=mask, scale=0.7, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(mine, plain, atol=1e-10)
    grads = [torch.autograd.grad((out * pull).sum(), given) for out in (mine, plain)]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("window", [0, 2])
def test_the_block_mask_is_the_mask(window):
    from torch.nn.attention.flex_attention import create_mask

    batch = packed(3)
    size, at = batch.input_ids_RS.shape[1], batch.position_ids_RS[0]
    made = block_mask(batch.spans_K4, at, window)
    dense = create_mask(made.mask_mod, None, None, size, size, device="cpu")[0, 0].bool()
    mask = allowed(*owners(batch.spans_K4, size))
    assert torch.equal(dense, mask & (at[:, None] - at[None] < window) if window else mask)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_pass_equals_separate_passes(kind):
    """Loss and gradients of branches in packed tree rows equal those of ordinary sequences, in float32."""
    net = network(kind, attention_dropout=0.0, **KINDS[kind])
    own = net.config._attn_implementation
    found = []
    for path in ("segments", "separate"):
        learner = Learner(net, ExMATE(weight=0.7), torch.float32, path=path)
        assert choose_path(net, gpu=False) == "segments"
        net.set_attn_implementation(attention.IMPLEMENTATIONS["segments"] if path == "segments" else own)
        net.zero_grad()
        batch = learner.collated(tree_rows(EXAMPLES, wrong=True, share=learner.shares), 0)
        loss = learner(batch, num_tokens=8.0, num_wrong=3.0)
        loss.total.backward()
        found.append((loss.total.item(), {n: p.grad.clone() for n, p in net.named_parameters()}))
        net.set_attn_implementation(own)
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for name, grad in found[0][1].items():
        assert torch.allclose(grad, found[1][1][name], atol=1e-5), name


def test_a_packed_batch_loses_what_its_rows_lose():
    net = network("llama", **GROUPED)
    learner = Learner(net, ExMATE(weight=0.7), torch.float32)
    rows = tree_rows(EXAMPLES, wrong=True, share=True)
    whole = learner(learner.collated(rows, 0), num_tokens=8.0, num_wrong=3.0).total
    apart = sum(learner(learner.collated([r], 0), num_tokens=8.0, num_wrong=3.0).total for r in rows)
    assert len(rows) == 2 and whole.item() == pytest.approx(apart.item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_networks_that_take_no_tree_fall_back(kind):
    net = network(kind, **SIZES, n_layer=2, n_head=2)
    before = net.config._attn_implementation
    learner = Learner(net, ExMATE(weight=0.7), torch.float32)
    assert learner.path == "separate" and not learner.shares and net.config._attn_implementation == before
    batch = learner.collated(tree_rows(EXAMPLES, wrong=True, share=False), 0)
    assert learner(batch, num_tokens=8.0, num_wrong=3.0).total.isfinite()


def test_dropout_of_attention_weights_is_left_to_the_network():
    """It is on in training alone, so comparing values would not show it."""
    net = network("llama", **GROUPED, attention_dropout=0.1)
    learner = Learner(net, ExMATE(weight=0.7), torch.float32)
    assert learner.path == "separate" and not net.training
    batch = learner.train().collated(tree_rows(EXAMPLES, wrong=True, share=False), 0)
    assert learner(batch, num_tokens=8.0, num_wrong=3.0).total.isfinite()


def test_an_attention_that_sees_too_much_is_found_out(monkeypatch):
    def everything(module, query, key, value, mask, tree=None, **rest):
        made = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return made.transpose(1, 2).contiguous(), None

    monkeypatch.setattr(attention, "segment_attention", everything)
    assert choose_path(network("llama", **GROUPED), gpu=False) == "separate"
