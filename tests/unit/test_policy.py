"""Policy, reference and critic in one network: who sees which adapters, and whose parameters a loss moves."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from ctrlray import config
from ctrlray.adapter import ADAPTER, ADAPTER_CARD, merge
from ctrlray.errors import ConfigError
from ctrlray.train.batches import TrainExample, tree_rows
from ctrlray.train.models import trained_state
from ctrlray.train.ppo.policy import Origin, PolicyBatch, load_policy, policy_groups

PROMPTS = ((1, 2, 3, 4, 30), (1, 2, 3, 4, 31), (5, 6, 7, 30))
ANSWERS = ((8, 9, 10), (11,), (12, 13))
CONTROL_IDS = (30, 31)
PLAIN = tuple(p[:-1] for p in PROMPTS)
"""The prompts without their codes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("start")
    LlamaForCausalLM(settings).save_pretrained(out)
    return str(out)


def policy(folder, settings=None, **objective):
    torch.manual_seed(1)
    return load_policy(folder, config.PPO(**objective), settings or config.Train(), CONTROL_IDS, "float32", "cpu")


def tree(network, share=True, prompts=PROMPTS):
    examples = [
        (i, TrainExample((p,), (a,), 1.0, "x" if p[0] == 1 else "y"))
        for i, (p, a) in enumerate(zip(prompts, ANSWERS, strict=True))
    ]
    return network.collated(tree_rows(examples, wrong=False, share=share), 0)


def batch(network, *, empty=False, **given):
    made = network.collated([], 0) if empty else tree(network)
    shape = made.mask_NT.shape
    values = {
        "old_NT": torch.full(shape, torch.nan),
        "engine_NT": torch.full(shape, torch.nan),
        "reference_NT": torch.zeros(shape),
        "advantage_NT": torch.ones(shape),
        "value_NT": torch.zeros(shape),
        "return_NT": torch.ones(shape),
    } | given
    return PolicyBatch(made, *(values[n] for n in PolicyBatch._fields[1:]))


def usual(folder, temperature=1.0, prompts=PROMPTS):
    """Log-probs of the answers by transformers alone, each in a sequence of its own, in the order of the tree's branches."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    out = torch.zeros(3, 3)
    for i, (prompt, answer) in enumerate(zip(prompts, ANSWERS, strict=True)):
        logits = network(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        logits[:, list(CONTROL_IDS)] -= 100  # as engines do, so that no control token is sampled
        logits /= temperature
        out[i, : len(answer)] = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    return out


def disturb(network, named):
    """Change every trained parameter whose name `named` accepts."""
    for i, (name, parameter) in enumerate(network.named_parameters()):
        if parameter.requires_grad and named(name):
            torch.manual_seed(i)
            parameter.data += 0.3 * torch.randn_like(parameter)


@pytest.mark.parametrize("lora", [config.LoRA(rank=2), None])
def test_the_reference_stays_what_training_started_from(folder, lora):
    network = policy(folder, config.Train(lora=lora))
    before = network(tree(network), channels=("policy", "reference"))
    assert torch.allclose(before[0], usual(folder), atol=1e-5) and torch.allclose(before[0], before[1], atol=1e-6)
    disturb(network, lambda name: not name.startswith("reference"))
    after = network(tree(network), channels=("policy", "reference"))
    assert torch.allclose(after[1], before[1], atol=1e-6)
    assert not torch.allclose(after[0], before[0], atol=0.05)

@pytest.mark.parametrize("lora", [config.LoRA(rank=2, alpha=3.0), None])
@pytest.mark.parametrize("advantage", ["rloo", "gae"])
def test_the_base_is_what_the_start_was_trained_from(folder, tmp_path, lora, advantage):
    """PPO starts from a model that was trained before: the reference is that model, the base the one before it."""
    settings = config.Train(lora=lora)
    before = policy(folder, settings)
    disturb(before, lambda name: not name.startswith("reference"))
    state, card = trained_state(before, lora, CONTROL_IDS)
    (tmp_path / "adapter").mkdir()
    save_file(state, tmp_path / "adapter" / ADAPTER)
    (tmp_path / "adapter" / ADAPTER_CARD).write_text(json.dumps(card))
    start = str(tmp_path / "start")
    merge(folder, str(tmp_path / "adapter"), start)

    torch.manual_seed(1)
    ppo = config.PPO(advantage=advantage, start="exmate")
    network = load_policy(start, ppo, settings, CONTROL_IDS, "float32", "cpu", Origin(folder, state, card))
    disturb(network, lambda name: not name.startswith(("reference", "base")))
    found = network(tree(network, prompts=PLAIN), channels=("base",))[0]
    assert torch.allclose(found, usual(folder, prompts=PLAIN), atol=1e-4)
    assert torch.allclose(network(tree(network), channels=("reference",))[0], usual(start), atol=1e-5)
    assert not torch.allclose(usual(start, prompts=PLAIN), usual(folder, prompts=PLAIN), atol=0.05)
    learns = {n for n, p in network.named_parameters() if p.requires_grad}
    assert not [n for n in learns if n.startswith("base") or ".origin." in n]
    assert set(trained_state(network, lora, CONTROL_IDS)[0]) == set(state)


def test_temperature_scales_log_probs_and_entropy(folder):
    hot = policy(folder, sampling=config.Sampling(temperature=2.0, min_p=0))
    logp, entropy = hot(tree(hot), channels=("policy", "entropy"))
    assert torch.allclose(logp, usual(folder, 2.0), atol=1e-5)
    cold = policy(folder)
    assert (cold(tree(cold), channels=("entropy",))[0] < entropy).sum() == tree(hot).mask_NT.sum()


def test_the_critic_has_adapters_of_its_own(folder):
    network = policy(folder, advantage="gae")
    torch.nn.init.normal_(network.value_head.weight)
    before = network(tree(network), channels=("policy", "value"))
    disturb(network, lambda name: ".critic." in name)
    after = network(tree(network), channels=("policy", "value"))
    assert torch.allclose(after[0], before[0]) and not torch.allclose(after[1], before[1], atol=1e-3)
    disturb(network, lambda name: ".default." in name or name.endswith(".rows"))
    last = network(tree(network), channels=("policy", "value"))
    assert torch.allclose(last[1], after[1]) and not torch.allclose(last[0], after[0], atol=1e-3)
    state, _ = trained_state(network, config.LoRA(), CONTROL_IDS)
    assert not [name for name in state if "critic" in name or "value" in name]
    assert {n.rsplit(".", 1)[-1] for n in state} == {"lora_A", "lora_B", "rows"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_policy_and_critic_learn_from_their_own_losses(folder, checkpointing):
    """Activation checkpointing computes the critic's pass again with the critic's adapters."""
    network = policy(folder, config.Train(activation_checkpointing=checkpointing), advantage="gae")
    disturb(network, lambda name: True)
    network(batch(network), num_tokens=6.0, learns_policy=False).total.backward()
    moved = {n for n, p in network.named_parameters() if p.requires_grad and p.grad is not None and p.grad.abs().max() > 0}
    wanted = {n for n, p in network.named_parameters() if p.requires_grad and (".critic." in n or n.startswith("value_head"))}
    assert moved == wanted
    network.zero_grad()
    network(batch(network), num_tokens=6.0).total.backward()
    moved = {n for n, p in network.named_parameters() if p.requires_grad and p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {n for n, p in network.named_parameters() if p.requires_grad}


def test_checkpointing_changes_no_gradient(folder):
    grads = []
    for checkpointing in (False, True):
        network = policy(folder, config.Train(activation_checkpointing=checkpointing), advantage="gae", entropy_bonus=0.1)
        disturb(network, lambda name: True)
        advantage = torch.tensor([[1.0, -2, 3], [0.5, 0, 0], [-1, 1, 0]])
        network(batch(network, advantage_NT=advantage), num_tokens=6.0).total.backward()
        grads.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])


def test_on_policy_the_ratio_is_one_and_the_gradient_that_of_reinforce(folder):
    """Advantage 1 on every token of 6: the gradient is that of minus the mean log-prob."""
    network = policy(folder)
    network(batch(network), num_tokens=6.0).total.backward()
    mine = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    (-network._policy(tree(network), entropy=False)[0].sum() / 6).backward()
    theirs = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert all(torch.allclose(mine[n], theirs[n], atol=1e-6) for n in theirs)


def test_kl_in_the_loss_pulls_towards_the_reference(folder):
    network = policy(folder, kl=config.KL(place="loss", estimator="k2"))
    disturb(network, lambda name: True)
    with torch.no_grad():
        logp, reference = network(tree(network), channels=("policy", "reference"))
    no_advantage = {"advantage_NT": torch.zeros(3, 3), "reference_NT": reference}
    loss = network(batch(network, **no_advantage), num_tokens=6.0, kl=0.5)
    k2 = 0.5 * (logp - reference) ** 2 * tree(network).mask_NT
    assert loss.total.item() == pytest.approx(0.5 * float(k2.sum() / 6), rel=1e-4)
    assert network(batch(network, **no_advantage), num_tokens=6.0, kl=0.0).total.item() == pytest.approx(0.0, abs=1e-6)


def test_tokens_that_the_engine_saw_otherwise_count_less_or_more_up_to_the_cap(folder):
    network = policy(folder, importance_cap=2.0)
    logp = network(tree(network), channels=("policy",))[0]
    same = network(batch(network, engine_NT=logp), num_tokens=6.0)
    assert same.parts["importance"].item() == pytest.approx(1.0) and same.parts["mismatch"].item() == pytest.approx(0.0, abs=1e-6)
    double = network(batch(network, engine_NT=logp - 3.0), num_tokens=6.0)  # e^3 capped at 2
    assert double.parts["importance"].item() == pytest.approx(2.0) and double.parts["mismatch"].item() == pytest.approx(3.0)
    assert double.parts["policy"].item() == pytest.approx(2 * same.parts["policy"].item())
    free = policy(folder, importance_cap=None)
    plain = free(batch(free, engine_NT=logp - 3.0), num_tokens=6.0)
    assert plain.parts["policy"].item() == pytest.approx(same.parts["policy"].item())


@pytest.mark.parametrize("objective", [{}, {"advantage": "gae"}, {"entropy_bonus": 0.1}])
def test_an_empty_micro_batch_reaches_every_parameter(folder, objective):
    """Ranks that got fewer micro batches still meet the others in every gradient."""
    network = policy(folder, **objective)
    loss = network(batch(network, empty=True), num_tokens=6.0)
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in network.parameters() if p.requires_grad)


def test_shared_prompts_change_no_channel(folder):
    network = policy(folder, advantage="gae")
    disturb(network, lambda name: True)
    names = ("policy", "entropy", "reference", "value")
    packed, single = (network(tree(network, share), channels=names) for share in (True, False))
    assert torch.allclose(packed, single, atol=1e-5)


def test_groups_of_the_optimizer(folder):
    settings = config.Train(learning_rate=1e-4, control_rate=1e-3, weight_decay=0.1)
    network = policy(folder, settings, advantage="gae", learning_rate=2e-5)
    groups = policy_groups(network, settings)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(2e-5, 0.1), (pytest.approx(2e-4), 0.0), (1e-3, 0.0)]
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters() if p.requires_grad)


def test_a_critic_from_another_model(folder, tmp_path):
    """A reward model of the same family, without the control tokens in its vocabulary."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "num_labels": 1, "pad_token_id": 0}
    other = LlamaForSequenceClassification(LlamaConfig(vocab_size=30, **sizes))
    other.save_pretrained(tmp_path / "reward")
    network = policy(folder, advantage="gae", critic=config.Critic(model=str(tmp_path / "reward")))
    body = dict(network.critic.base_model.named_parameters())
    name = "layers.0.self_attn.q_proj.base_layer.weight"
    assert torch.equal(body[name], other.model.layers[0].self_attn.q_proj.weight)
    own = network.critic.get_input_embeddings().weight
    assert torch.equal(own[:30], other.model.embed_tokens.weight)
    assert torch.equal(own[30:], network.network.get_input_embeddings().weight[30:])
    torch.nn.init.normal_(network.value_head.weight)
    before = network(tree(network), channels=("policy", "value"))
    disturb(network, lambda n: n.startswith("critic."))
    after = network(tree(network), channels=("policy", "value"))
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1], atol=1e-3)

    LlamaForSequenceClassification(LlamaConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / "big")
    with pytest.raises(ConfigError, match=r"critic.model=.*vocabulary and hidden size are \(40, 16\), the policy's \(32, 16\)"):
        policy(folder, advantage="gae", critic=config.Critic(model=str(tmp_path / "big")))


def test_a_critic_s_pickle_is_not_loaded(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder)
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        policy(folder, advantage="gae", critic=config.Critic(model=str(tmp_path)))


def test_acting_ends_with_the_policy_even_after_an_error(folder):
    network = policy(folder, advantage="gae")
    spare = copy.deepcopy(network)
    disturb(network, lambda name: True)
    with pytest.raises(RuntimeError), network._acting("reference"):
        raise RuntimeError
    assert not torch.allclose(network(tree(network), channels=("policy",)), spare(tree(spare), channels=("policy",)), atol=1e-3)
