"""Log-probs out of hidden states: the usual numbers, without all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ctrlray.config import ExMATE
from ctrlray.errors import ConfigError
from ctrlray.train import logprobs
from ctrlray.train.batches import TrainExample, tree_rows
from ctrlray.train.logprobs import Head, logp_and_entropy, target_logp
from ctrlray.train.models import Learner


def head(cap=None, scale=1.0, bias=False, frozen=True, temperature=1.0):
    torch.manual_seed(1)
    layer = nn.Linear(6, 50, bias=bias).double()
    layer.requires_grad_(not frozen)
    return Head(layer, scale, cap, temperature)


def logp_of_all(h, hidden):
    raw = h.layer(hidden) * h.scale
    logits = h.cap * torch.tanh(raw / h.cap) if h.cap else raw
    return (logits / h.temperature).log_softmax(-1)


def plain(h, hidden, target):
    return logp_of_all(h, hidden).gather(1, target[:, None])[:, 0]


HEADS = [
    {},
    {"cap": 0.8},
    {"scale": 3.0},
    {"bias": True, "cap": 1.5, "scale": 0.5},
    {"frozen": False},
    {"cap": 0.8, "temperature": 0.5},
    {"temperature": 2.0, "frozen": False},
]


@pytest.mark.parametrize("given", HEADS)
def test_log_probs_and_gradients_in_chunks(given, monkeypatch):
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 16 * 50)  # 37 tokens in three chunks
    h = head(**given)
    hidden, target = torch.randn(37, 6, dtype=torch.float64, requires_grad=True), torch.randint(50, (37,))
    wanted = [hidden, *(p for p in h.layer.parameters() if p.requires_grad)]
    mine, usual = target_logp(h, hidden, target), plain(h, hidden, target)
    assert torch.allclose(mine.double(), usual, atol=1e-6)
    loss = lambda logp: (logp.exp() * torch.arange(37)).sum()  # noqa: E731  # anything but a plain sum
    pairs = zip(torch.autograd.grad(loss(mine), wanted), torch.autograd.grad(loss(usual), wanted), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


def test_masked_tokens_take_no_part():
    """As if the rows from 3 up to 5 were not there."""
    h = head(cap=2.0, temperature=0.7)
    hidden, target = torch.randn(9, 6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 10])
    left = nn.Linear(6, 48, bias=False).double()
    left.weight.data = torch.cat([h.layer.weight[:3], h.layer.weight[5:]]).detach()
    less = h._replace(layer=left.requires_grad_(False))
    moved = torch.where(target >= 5, target - 2, target)
    mine, theirs = target_logp(h._replace(masked=(3, 5)), hidden, target), target_logp(less, hidden, moved)
    assert torch.allclose(mine, theirs, atol=1e-6)
    (a,), (b,) = (torch.autograd.grad((logp * torch.arange(9)).sum(), hidden) for logp in (mine, theirs))
    assert torch.allclose(a, b, atol=1e-6)
    both = logp_and_entropy(h._replace(masked=(3, 5)), hidden, target), logp_and_entropy(less, hidden, moved)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("given", HEADS)
def test_entropy_and_its_gradient_in_chunks(given, monkeypatch):
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 16 * 50)
    h = head(**given)
    hidden, target = torch.randn(37, 6, dtype=torch.float64, requires_grad=True), torch.randint(50, (37,))
    logp, entropy = logp_and_entropy(h, hidden, target)
    every = logp_of_all(h, hidden)
    usual = -(every.exp() * every).sum(-1)
    assert torch.allclose(logp.double(), plain(h, hidden, target), atol=1e-6)
    assert torch.allclose(entropy.double(), usual, atol=1e-5)
    weights = torch.arange(37)
    (mine,), (theirs,) = (torch.autograd.grad((e * weights).sum(), hidden) for e in (entropy, usual))
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_unlikely_targets_keep_their_log_prob():
    """exp(-200) is no float32; its log still is."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.eye(2) * 200
    layer.requires_grad_(False)
    assert target_logp(Head(layer, 1.0, None), torch.tensor([[1.0, 0.0]]), torch.tensor([1])).item() == pytest.approx(-200.0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 0.2, "sliding_window": 8}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 7.0}),
    ],
)
def test_heads_of_families_are_known_and_others_refused(kind, settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    wanted = AutoConfig.for_model(kind, vocab_size=32, num_key_value_heads=1, initializer_range=0.5, **sizes, **settings)
    net = AutoModelForCausalLM.from_config(wanted).eval()
    known = Head.of(net)
    known.check(net)
    with pytest.raises(ConfigError, match="makes its logits in a way"):
        known._replace(scale=known.scale * 2, cap=known.cap and known.cap * 2).check(net)


class Largest(TorchDispatchMode):
    """Most values of any tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor):
                self.values = max(self.values, made.numel())
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_no_tensor_of_all_logits_ever(monkeypatch, frozen):
    from transformers import AutoConfig, AutoModelForCausalLM

    vocabulary, tokens = 3000, 200
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 16 * vocabulary)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = AutoConfig.for_model("llama", vocab_size=vocabulary, tie_word_embeddings=False, **sizes)
    net = AutoModelForCausalLM.from_config(settings)
    net.get_output_embeddings().requires_grad_(not frozen)
    learner = Learner(net, ExMATE(weight=0.5), torch.float32)
    example = TrainExample(((1, 2, 8), (1, 2, 9)), (tuple(range(tokens)),) * 2, 1.0, "p")
    batch = learner.collated(tree_rows([(0, example)], wrong=True, share=True), 0)  # 405 tokens, 400 of answers
    with Largest() as seen:
        learner(batch, num_tokens=200.0, num_wrong=1.0).total.backward()
    assert 16 * vocabulary <= seen.values < 400 * vocabulary / 4
