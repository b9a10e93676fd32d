"""Small stand-ins for unit tests; the main path never sees them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
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
        time.sleep(90)
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


def dialled_tokenizer(dial: Any, coded: bool = True, of: Any = None) -> Any:
    """A tokenizer as an export would leave it: control tokens, and the dial in its chat template if it is `coded`.

    The tiny one, unless another is given, which is changed.
    """
    from tokenizers import AddedToken

    from ctrlray.control import dialled_template, safe_template, special_strings

    tokenizer, space = of or tiny_tokenizer(), dial.space
    template = tokenizer.chat_template
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in space.tokens], special_tokens=True)
    specials = special_strings(tokenizer, space)
    if not coded:
        tokenizer.chat_template = safe_template(template, specials)
        return tokenizer
    tokenizer.chat_template = dialled_template(
        template,
        space,
        specials,
        allowed={r.name: (r.low, r.high) for r in dial.ranges},
        defaults={r.name: r.default for r in dial.ranges},
    )
    return tokenizer


def folding(tokenizer: Any) -> Any:
    """The same tokenizer, but it folds case and Unicode's compatible forms before it looks for special tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    raw["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    for token in raw["added_tokens"]:
        token["normalized"] = True
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)), **names)
    made.chat_template = tokenizer.chat_template
    return made


class FakeEngine:
    """Stands for a vLLM replica: keeps the orders that reach it, and answers each choice with the next of `texts`."""

    def __init__(self, texts: Sequence[str] = ("Hello there",)) -> None:
        self.texts = list(texts)
        self.orders: list[dict[str, Any]] = []
        self.stopped = 0
        self.breaks_after: int | None = None
        """Chunks of a stream before the replica dies."""
        self.error: dict[str, Any] | None = None
        self.hangs: Any = None
        """An asyncio.Event to wait for before anything is answered."""

    async def answer(self, order: dict[str, Any]) -> AsyncGenerator[list[str], None]:
        self.orders.append(order)
        try:
            if self.hangs is not None:
                await self.hangs.wait()
            if self.error is not None:
                yield [json.dumps({"error": self.error})]
                return
            count = order["n"] * len(order["prompt"])
            answers = [self.texts[i % len(self.texts)] for i in range(count)]
            for batch in self._chunks(order, answers) if order["stream"] else [[self._whole(order, answers)]]:
                yield [json.dumps(doc) for doc in batch]
        finally:
            self.stopped += 1

    def _whole(self, order: dict[str, Any], answers: list[str]) -> dict[str, Any]:
        choices = [
            {"index": i, "text": t, "finish_reason": "stop", "logprobs": self._logprobs(order, t)} for i, t in enumerate(answers)
        ]
        return {"choices": choices, "usage": {"completion_tokens": sum(map(len, answers))}}

    def _chunks(self, order: dict[str, Any], answers: list[str]) -> Iterator[list[dict[str, Any]]]:
        from ctrlray.serve.refusal import Refusal

        sent = 0
        for i, text in enumerate(answers):
            for at, character in enumerate(text):
                if sent == self.breaks_after:
                    raise Refusal(503, "the replica ended", code="engine_error", retry_after_s=1)
                done = "stop" if at == len(text) - 1 else None
                logprobs = self._logprobs(order, character)
                choice = {"index": i, "text": character, "finish_reason": done, "logprobs": logprobs}
                yield [{"choices": [choice], "usage": {"completion_tokens": at + 1}}]
                sent += 1
        yield [{"choices": [], "usage": {"completion_tokens": sum(map(len, answers))}}]

    def _logprobs(self, order: dict[str, Any], text: str) -> dict[str, Any] | None:
        if "logprobs" not in order:
            return None
        ids = [ord(c) for c in text]
        if not order.get("return_tokens_as_token_ids"):
            return {"tokens": list(text), "token_logprobs": [-1.0] * len(ids), "top_logprobs": [{c: -1.0} for c in text]}
        others = [{f"token_id:{i}": -1.0, f"token_id:{i + 1}": -0.5} for i in ids]
        return {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-1.0] * len(ids), "top_logprobs": others}


class FakeJudge:
    """Stands for the run's rewards: an answer achieves the levels that its first characters say."""

    def __init__(self, attributes: int = 2) -> None:
        self.attributes = attributes

    async def units(self, turns: Any, texts: Sequence[str]) -> list[list[float]]:
        heads = [text.ljust(self.attributes)[: self.attributes] for text in texts]
        return [[float(c) if c.isdigit() else float("nan") for c in head] for head in heads]
