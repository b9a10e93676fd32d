from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

from ctrlray import config, models
from ctrlray.adapter import ADAPTER, ADAPTER_CARD, merge
from ctrlray.control import ControlSpace
from ctrlray.errors import ConfigError
from ctrlray.train.batches import TrainExample, tree_rows
from ctrlray.train.models import load_learner, parameter_groups, trained_state

SPACE = ControlSpace((config.Attribute(name="brevity", levels=3), config.Attribute(name="variety", levels=2)))


@pytest.fixture
def base(tiny, private_cache):
    return models.prepare(config.Model(name=str(tiny)), SPACE, ["hello there", "what is this"])


def test_prepared_base_by_hand(base, tiny):
    from transformers import AutoModelForCausalLM

    tokenizer = base.tokenizer()
    start = len(tokenizer) - 5
    assert base.control_ids == tuple(range(start, start + 5))
    assert base.base_fingerprint == models.fingerprint(tiny)
    before, after = AutoModelForCausalLM.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(base.folder)
    assert before.config.tie_word_embeddings and not after.config.tie_word_embeddings
    assert torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight[:start])
    assert torch.equal(before.get_output_embeddings().weight, after.get_output_embeddings().weight[:start])
    ids = torch.tensor([tokenizer("hi")["input_ids"]])
    assert torch.allclose(before(ids).logits, after(ids).logits[..., :start], atol=1e-5)


def test_control_tokens_are_masked_in_generate(base):
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base.folder)
    prompt = torch.tensor([base.renderer(SPACE).render([{"role": "user", "content": "x"}], (1, 2))])
    torch.manual_seed(0)
    out = network.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=40, num_return_sequences=8
    )
    assert not set(out[:, prompt.shape[1] :].flatten().tolist()) & set(base.control_ids)


def test_prepare_twice_gives_one_folder(base, tiny, private_cache):
    assert models.prepare(config.Model(name=str(tiny)), SPACE).folder == base.folder


def folder_with(path, text):
    path.mkdir(parents=True)
    (path / "weights").write_text(text)
    return path


def test_a_folder_that_another_process_published_first_stays(tmp_path):
    made, there = folder_with(tmp_path / "made", "mine"), folder_with(tmp_path / "there", "theirs")
    models.publish(made, there)
    assert (there / "weights").read_text() == "theirs" and not made.exists()
    models.publish(folder_with(tmp_path / "made", "mine"), tmp_path / "new")
    assert (tmp_path / "new" / "weights").read_text() == "mine"
    with pytest.raises(FileNotFoundError):  # nothing is there: this one is no success
        models.publish(folder_with(tmp_path / "made", "mine"), tmp_path / "no" / "folder")


def test_two_that_prepare_a_base_at_once_read_one_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    record = {"base_fingerprint": "f", "base_template": "t", "control_ids": []}

    def prepare(made, *_):
        for folder, who in ((made, "mine"), (made.parent.parent / target(), "theirs")):
            folder_with(folder, who)
            (folder / "ctrlray_base.json").write_text(json.dumps(record))

    def target():
        return models.digest(models.fingerprint(tiny), SPACE.tokens, [["brevity", 3], ["variety", 2]], SPACE.encoding, "v1")

    monkeypatch.setattr(models, "_prepare_into", prepare)
    base = models.prepare(config.Model(name=str(tiny)), SPACE)
    assert (tmp_path / "ctrlray" / "bases" / target() / "weights").read_text() == "theirs"
    assert base.folder.endswith(target())


@pytest.mark.parametrize(("force", "stays"), [(False, "theirs"), (True, "mine")])
def test_a_model_that_another_process_pulled_meanwhile_is_deleted_on_demand_only(tmp_path, monkeypatch, force, stays):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf, target = tmp_path / "g", tmp_path / "cache" / "ctrlray" / "models" / models.EMBEDDED_NAME
    gguf.write_bytes(b"gguf")

    def convert(gguf, made):
        folder_with(made, "mine")
        folder_with(target, "theirs")

    monkeypatch.setattr(models, "_GGUF_SHA256", hashlib.sha256(b"gguf").hexdigest())
    monkeypatch.setattr(models, "_embedded_gguf", lambda scratch: gguf)
    monkeypatch.setattr(models, "_convert_gguf", convert)
    assert models.pull_embedded(force) == target and (target / "weights").read_text() == stays


def test_fingerprint_tells_checkpoints_apart(tiny, tmp_path, private_cache):
    from tests.fakes import tiny_model

    copy = shutil.copytree(tiny, tmp_path / "copy")
    assert models.fingerprint(copy) == models.fingerprint(tiny) != models.fingerprint(tiny_model(tmp_path / "other", seed=1))


@pytest.mark.parametrize(
    ("remove", "message"),
    [("config.json", r"no config\.json; give"), ("model.safetensors", "no .*is a pickle"), ("tokenizer*", "no tokenizer files")],
)
def test_broken_folders_are_refused(tiny, tmp_path, remove, message):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    for file in folder.glob(remove):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=rf"^rewards\.2\.model='{folder}': {message}"):
        models.resolve(config.Model(name=str(folder)), "rewards.2.model")
    with pytest.raises(ConfigError, match=rf"^model\.name='org/m' in {folder}: {message}"):
        models.check_folder(folder, "model.name", "org/m")


@pytest.mark.parametrize("lora", [config.LoRA(rank=4), None])
def test_merged_weights_equal_the_learner(base, tmp_path, lora):
    """After some steps the merged folder gives the learner's own log-probs: adapters, control rows, full tensors."""
    from safetensors.torch import save_file

    render = base.renderer(SPACE).render
    prompts = tuple(tuple(render([{"role": "user", "content": "q"}], c)) for c in ((1, 1), (3, 2)))
    settings = config.Train(lora=lora, learning_rate=1e-2)
    learner = load_learner(base.folder, config.ExMATE(weight=1.0), settings, base.control_ids, "float32", "cpu")
    batch = learner.collated(tree_rows([(0, TrainExample(prompts, ((5, 6, 7),) * 2, 1.0, "p"))], wrong=True, share=True), 0)
    groups = parameter_groups(learner, settings)
    assert len(groups) == (2 if lora else 1)
    optimizer = torch.optim.AdamW(groups)
    for _ in range(3):
        optimizer.zero_grad()
        learner(batch, num_tokens=3.0, num_wrong=1.0).total.backward()
        optimizer.step()
    state, card = trained_state(learner, lora, base.control_ids)
    (tmp_path / "adapter").mkdir()
    save_file(state, tmp_path / "adapter" / ADAPTER)
    (tmp_path / "adapter" / ADAPTER_CARD).write_text(json.dumps(card))
    merge(base.folder, str(tmp_path / "adapter"), str(tmp_path / "merged"))
    again = load_learner(str(tmp_path / "merged"), config.CLM(), config.Train(lora=None), (), "float32", "cpu")
    start = load_learner(base.folder, config.CLM(), config.Train(lora=None), (), "float32", "cpu")
    with torch.no_grad():
        want, got, untrained = learner(batch), again(batch), start(batch)
    assert torch.allclose(want, got, atol=1e-4)
    assert not torch.allclose(want, untrained, atol=1e-2)
    assert want[0] > want[1]  # the right code explains the answer better than the wrong one


def test_merge_refuses_foreign_tensors(base, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "adapter").mkdir()
    save_file({"model.unknown.weight": torch.zeros(2)}, tmp_path / "adapter" / ADAPTER)
    (tmp_path / "adapter" / ADAPTER_CARD).write_text(json.dumps({"lora_scale": 1.0, "control_ids": []}))
    with pytest.raises(ValueError, match=r"model.unknown.weight"):
        merge(base.folder, str(tmp_path / "adapter"), str(tmp_path / "merged"))


def one_pass(base, **settings):
    """A learner after one backward pass, and its gradients by name."""
    torch.manual_seed(0)
    learner = load_learner(base.folder, config.ExMATE(), config.Train(**settings), base.control_ids, "float32", "cpu")
    prompts = tuple(tuple(base.renderer(SPACE).render([{"role": "user", "content": "q"}], c)) for c in ((1, 1), (3, 2)))
    rows = tree_rows([(0, TrainExample(prompts, ((5, 6, 7),) * 2, 1.0, "p"))], wrong=True, share=True)
    learner(learner.collated(rows, 0), num_tokens=3.0, num_wrong=1.0).total.backward()
    return learner, {n: p.grad for n, p in learner.named_parameters() if p.grad is not None}


def test_only_adapters_and_control_rows_have_gradients(base):
    """No gradient of the embedding matrix's size, though its control rows train."""
    learner, grads = one_pass(base)
    assert all("lora_" in n or n.endswith("embed_tokens.rows") for n in grads)
    rows = grads["network.model.embed_tokens.rows"]
    used = [i - base.control_ids[0] for i in base.renderer(SPACE).code_ids((1, 1)) + base.renderer(SPACE).code_ids((3, 2))]
    assert rows.shape == (5, 64) and [i for i in range(5) if rows[i].any()] == sorted(used)
    assert learner.network.get_input_embeddings().base.weight.grad is None


def test_checkpointed_activations_give_the_same_gradients(base):
    plain, spared = one_pass(base)[1], one_pass(base, activation_checkpointing=True)[1]
    assert plain.keys() == spared.keys() and all(torch.equal(plain[n], spared[n]) for n in plain)
    learner, _ = one_pass(base, activation_checkpointing=True)
    assert all(block.gradient_checkpointing for block in learner.network.model.layers)


def test_adapters_keep_no_copy_of_their_inputs(base):
    """Under bfloat16 the backward pass holds each block's activations once: q, k and v share one input, gate and up another."""
    learner = load_learner(base.folder, config.CLM(), config.Train(), base.control_ids, "bfloat16", "cpu")
    rows = tree_rows([(0, TrainExample(((1, 2, 3),), ((5, 6, 7),), 1.0, "p"))], wrong=False, share=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner(learner.collated(rows, 0), num_tokens=3.0)
    inputs = {t.data_ptr() for t in kept if t.dtype == torch.bfloat16 and t.shape[-2:] == (32, 64)}
    assert len(inputs) <= 2 * 7  # with copies for q, k, v, gate and up it would be 10 a block
