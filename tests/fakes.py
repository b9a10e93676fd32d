"""Small stand-ins for unit tests; the main path never sees them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer without merges: one token per byte, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama of two layers with its tokenizer, as a safetensors folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the least that vLLM takes on a CPU
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def length_reward(prompts: list[Any], responses: list[str]) -> dict[str, list[float]]:
    """Brevity and variety of an answer: rewards of texts alone."""
    return {
        "brevity": [-float(len(r)) for r in responses],
        "variety": [float(len(set(r))) for r in responses],
    }


def word_judge(prompts: list[Any], responses: list[str]) -> dict[str, list[float]]:
    """Brevity and variety of an answer by its words; no opinion on one that says `sorry`."""
    blind = [float("nan") if "sorry" in r else 0.0 for r in responses]
    return {
        "brevity": [b - len(r.split()) for r, b in zip(responses, blind, strict=True)],
        "variety": [b + len(set(r.split())) for r, b in zip(responses, blind, strict=True)],
    }


def faulty_reward(prompts: list[Any], responses: list[str]) -> list[float]:
    """NaN for one answer, an exception for another."""
    if "boom" in responses:
        raise RuntimeError("this reward cannot read boom")
    return [float("nan") if r == "nan" else float(len(r)) for r in responses]


def deadly_reward(prompts: list[Any], responses: list[str]) -> list[float]:
    """Ends its process, without a word, at one answer."""
    if "kill" in responses:
        os._exit(1)
    return [float(len(r)) for r in responses]


def three_rewards(prompts: list[Any], responses: list[str]) -> dict[str, list[float]]:
    """Three outputs of texts alone."""
    return length_reward(prompts, responses) | {"vowels": [float(sum(r.lower().count(v) for v in "aeiou")) for r in responses]}


def stuck_reward(prompts: list[Any], responses: list[str]) -> list[float]:
    """Takes longer than anybody waits for one answer; not for ever, so that a test session's actors come free again."""
    if "stuck" in responses:
        time.sleep(75)
    return [float(len(r)) for r in responses]


def short_reward(prompts: list[Any], responses: list[str]) -> list[float]:
    """One number too few where an answer is `short`."""
    scores = [float(len(r)) for r in responses]
    return scores[1:] if "short" in responses else scores


def lost_reward(prompts: list[Any], responses: list[str]) -> list[float]:
    """Its server is gone when an answer is `lost`."""
    from ctrlray.errors import ClusterError

    if "lost" in responses:
        raise ClusterError("no server at http://nowhere")
    return [1.0] * len(responses)


class StuckHost:
    """An engine host that starts and then never answers."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def ready(self) -> int:
        return 1

    def generate(self, prompts: Any, sampling: Any) -> None:
        time.sleep(3600)
