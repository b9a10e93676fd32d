"""Any sequence-classification model is a reward by job file: made on the fly, scored in batches, cut where it must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from ctrlray import config
from ctrlray.config import Model
from ctrlray.errors import ConfigError
from ctrlray.rewards.encode import RewardEncoder
from ctrlray.rewards.finetune import make_start
from ctrlray.rewards.hf import UNITS, HFScorer
from ctrlray.rewards.job import FineTune, LabelFiles, RewardTrainJob
from ctrlray.rewards.learner import RewardTask, load_network
from ctrlray.rewards.registry import build
from ctrlray.tables import Storage
from tests.fakes import tiny_tokenizer

CHATS = [[{"role": "user", "content": "question " * (1 + 3 * i)}] for i in range(6)]
TEXTS = ["short", "a much longer answer than the others", "x", "<|im_end|> special", "<|pad|><|pad|>", "same"]
FAMILIES = ["llama", "deberta-v2", "gpt2"]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr("ctrlray.models.pick_dtype", lambda *_, **__: "float32")


def settings_of(family, vocab, pad, labels):
    from transformers import DebertaV2Config, GPT2Config, LlamaConfig

    common = {"vocab_size": vocab, "pad_token_id": pad, "num_labels": labels, "initializer_range": 0.3}
    blocks = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    match family:
        case "llama":
            return LlamaConfig(**common, **blocks)
        case "deberta-v2":  # as DeBERTa-v3 is made: relative positions, shared keys, no token types
            relative = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
            return DebertaV2Config(**common, **blocks, **relative, share_att_key=True, norm_rel_ebd="layer_norm")
        case _:
            return GPT2Config(**common, n_embd=32, n_layer=2, n_head=2, n_positions=512, bos_token_id=0, eos_token_id=0)


def save(family, folder, *, chat=True, pad=True, labels=2):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    if not pad:  # like GPT-2 and most causal models
        tokenizer.pad_token = None
    made = AutoModelForSequenceClassification.from_config(settings_of(family, len(tokenizer), tokenizer.pad_token_id, labels))
    made.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", [True, False], ids=["chat template", "no template"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_score_like_single_answers(tmp_path, family, chat):
    folder = save(family, tmp_path, chat=chat, pad=family != "gpt2")
    raw = {"type": "hf", "model": str(folder), "attributes": ["kind", "brief"], "batch_size": 4}
    scorer = build(config.parse(config.HFReward, raw, where="test"))
    together = scorer(CHATS, TEXTS)
    for name in ("kind", "brief"):
        alone = [scorer([c], [t])[name][0] for c, t in zip(CHATS, TEXTS, strict=True)]
        np.testing.assert_allclose(together[name], alone, atol=1e-4)
        assert np.std(alone) > 1e-3
    # and like the stock model on one unpadded row
    from transformers import AutoModelForSequenceClassification

    stock = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([scorer.encode(CHATS[1], TEXTS[1])])
    with torch.no_grad():
        np.testing.assert_allclose(stock(input_ids=ids).logits[0], [together["kind"][1], together["brief"][1]], atol=1e-4)


def test_units_turn_logits_into_ratings(tmp_path):
    from transformers import AutoConfig

    folder = save("llama", tmp_path)
    reward = config.HFReward(model=str(folder), attributes=("a", "b"))
    plain = HFScorer(reward)(CHATS, TEXTS)
    settings = AutoConfig.from_pretrained(folder)
    setattr(settings, UNITS, {"mean": [3.0, 0.0], "std": [2.0, 1.0]})
    settings.save_pretrained(folder)
    scaled = HFScorer(reward)(CHATS, TEXTS)
    np.testing.assert_allclose(scaled["a"], 3 + 2 * plain["a"], rtol=1e-6)
    np.testing.assert_allclose(scaled["b"], plain["b"])


def test_too_long_a_pair_loses_the_prompts_beginning_and_keeps_its_special_tokens():
    """DeBERTa's score is read from [CLS]: a plain cut from the left would take it away."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B <|im_end|>",
        special_tokens=[("<|im_start|>", start), ("<|im_end|>", end)],
    )
    encode = RewardEncoder(tokenizer, 16)

    def words(prompt, answer):
        ids = encode([{"role": "user", "content": prompt}], answer)
        assert len(ids) <= 16 and ids[0] == start and ids[-1] == end and ids.count(end) == 2
        return tokenizer.decode([i for i in ids if i not in (start, end)])

    assert words("abc", "xyz") == "abcxyz"
    assert words("abcdefghijklmnop", "xyz") == "ghijklmnopxyz"
    assert words("abc", "0123456789" * 3).endswith("56789")


def test_a_model_of_hh_reads_hh_s_dialogues_whatever_template_its_tokenizer_has():
    tokenizer = tiny_tokenizer()
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    said = {hh: tokenizer.decode(RewardEncoder(tokenizer, 1000, hh=hh)(chat, "d")) for hh in (False, True)}
    assert said[True] == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    assert said[False] != said[True] and "<|im_start|>" in said[False]
    tokenizer.chat_template = None
    assert tokenizer.decode(RewardEncoder(tokenizer, 1000)(chat, "d")) == "a\n\nb\n\nc\n\nd"
    assert tokenizer.decode(RewardEncoder(tokenizer, 20, hh=True)(chat, "d")) == "man: c\n\nAssistant: d"[-20:]
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A <|im_start|> $B", special_tokens=[("<|im_start|>", start)]
    )
    ids = RewardEncoder(tokenizer, 1000, hh=True)(chat, "d")
    assert ids[0] == start and ids.count(start) == 1  # one text, not two


def test_the_tokenizers_own_limit_holds():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 20
    assert len(RewardEncoder(tokenizer, 1000)([{"role": "user", "content": "q" * 50}], "a")) == 20


def train_job(folder, model, *names, **method):
    files = tuple(LabelFiles(name=n, train="t.jsonl", valid="v.jsonl") for n in names)
    return RewardTrainJob(
        name="t", out=str(folder), model=Model(name=str(model)), attributes=files, method=FineTune(**method), max_tokens=64
    )


def start_and_network(folder, model, job):
    make_start(model, folder / "start", job, {"mean": [0.0], "std": [1.0]})
    return load_network(RewardTask(str(folder / "start"), job.method, Storage(str(folder)), "float32", 0), "cpu").network


def test_a_causal_model_gets_a_head_at_zero(tiny, tmp_path):
    network = start_and_network(tmp_path, tiny, train_job(tmp_path, tiny, "kind"))
    assert type(network).__name__ == "LlamaForSequenceClassification"
    assert network.score.weight.shape == (1, 64) and not network.score.weight.any()
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).model.layers[1].mlp.up_proj.weight
    assert torch.equal(network.model.layers[1].mlp.up_proj.base_layer.weight, before)
    trained = {n.split(".")[0] + ("/lora" if "lora_" in n else "") for n, p in network.named_parameters() if p.requires_grad}
    assert trained == {"score", "model/lora"}


def test_an_encoder_trains_its_pooler_beside_lora(tmp_path):
    save("deberta-v2", tmp_path / "model", labels=1)
    network = start_and_network(tmp_path, tmp_path / "model", train_job(tmp_path, tmp_path / "model", "kind"))
    trained = {n for n, p in network.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert network.classifier.weight.any()  # the checkpoint's own head is kept


def test_another_number_of_attributes_gets_a_fresh_head(tmp_path):
    save("deberta-v2", tmp_path / "model", labels=3)
    network = start_and_network(tmp_path, tmp_path / "model", train_job(tmp_path, tmp_path / "model", "kind", lora=None))
    assert network.classifier.weight.shape == (1, 32) and not network.classifier.weight.any()
    assert all(p.requires_grad for p in network.parameters())


def test_lora_says_where_it_finds_nothing_to_adapt(tmp_path):
    save("gpt2", tmp_path / "model", labels=1)
    with pytest.raises(ConfigError, match=r"GPT2ForSequenceClassification has no linear layers.*method\.lora=null"):
        start_and_network(tmp_path, tmp_path / "model", train_job(tmp_path, tmp_path / "model", "kind"))
    network = start_and_network(tmp_path / "full", tmp_path / "model", train_job(tmp_path, tmp_path / "model", "kind", lora=None))
    assert network.score.weight.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_finer_than_what_the_body_computes_in(tmp_path, family, monkeypatch):
    """bfloat16 has 8 bits of a number: scores computed in it would all be bfloat16 numbers, and close answers tie."""
    monkeypatch.setattr("ctrlray.models.pick_dtype", lambda *_, **__: "bfloat16")
    raw = {"type": "hf", "model": str(save(family, tmp_path)), "attributes": ["kind", "brief"]}
    found = build(config.parse(config.HFReward, raw, where="test"))(CHATS, TEXTS)
    values = torch.tensor(np.concatenate(list(found.values())))
    assert (values != values.bfloat16().float()).float().mean() > 0.8


def test_a_classifier_that_is_its_own_body_stays_as_it_is():
    from ctrlray.rewards.precise import widen_head

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(2, 2, dtype=torch.bfloat16)

        @property
        def base_model(self):
            return self

    made = Whole()
    widen_head(made)
    assert made.body.weight.dtype == torch.bfloat16
