"""A model's vLLM server under Ray Serve: `ray.serve.llm`'s own, with one more method that takes token ids only.

Its other methods (chat with any template, tokenize, embeddings, ...) stay inside of the cluster: no route leads to them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import psutil
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import CompletionRequest

from ctrlray.engine.engine import EngineSpec
from ctrlray.serve.bypass import refuse_bypass, refuse_tokenless
from ctrlray.serve.catalog import Entry
from ctrlray.serve.stream import coalesce, joined, pause_s

_PREFIX = "data: "
_DONE = "[DONE]"
_ENGINE_NICE = 19
"""Ray starts its workers at 15, those of a Ray that `ctrlray serve` starts at 0."""
_MOST_TOGETHER = 8
_MEMORY = 0.9
"""Weight of the mean so far against the newest answer's time for a token."""


def in_one_process() -> Any:
    """Ray's vLLM engine with model and scheduler in one process.

    On processors Ray asks for a process of its own for the model, whatever the arguments say. Between two steps the other waits
    for it by spinning, on the very cores that compute, and a start imports vLLM once more.
    """
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine  # imports vLLM, which who deploys it need not

    class OneProcess(VLLMEngine):  # type: ignore[misc]
        def _prepare_engine_config(self, callback_ctx: Any) -> Any:
            arguments, frontend, made = super()._prepare_engine_config(callback_ctx)
            made.parallel_config.distributed_executor_backend = "uni"
            return arguments, frontend, made

    return OneProcess


class DialServer(LLMServer):  # type: ignore[misc]
    """One replica."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, llm_config: LLMConfig, entry: Entry, spec: EngineSpec, stream_interval_s: float
    ) -> None:
        refuse_bypass()  # by this node's own environment
        refuse_tokenless()
        os.environ.update(spec.device_environment())  # of this node's cores; the engine's processes inherit it
        entry.local()
        self._stream_interval_s, self._num_streams, self._num_cores = stream_interval_s, 0, len(os.sched_getaffinity(0))
        self._token_s = 0.0
        """Mean time between tokens of a stream; 0 before the first."""
        alone = not spec.gpus and spec.whole_machine and spec.settings.tensor_parallel == 1
        if alone:  # Ray sets 1 for an actor that reserves no CPU itself
            os.environ["OMP_NUM_THREADS"] = str(self._num_cores)
        await super().__init__(llm_config, engine_cls=in_one_process() if alone else None)
        if not spec.gpus:
            _give_way()

    async def answer(self, order: dict[str, Any]) -> AsyncGenerator[list[str], None]:
        """JSON documents of vLLM's completion API for an order of `ctrlray.serve.translate`, in batches, which are joined.

        The prompts must be token ids: text would be tokenized here, special tokens in it included.
        """
        async with aclosing(joined(self._batches(order))) as batches:
            async for batch in batches:
                yield batch

    async def _batches(self, order: dict[str, Any]) -> AsyncGenerator[list[str], None]:
        prompts = order["prompt"]
        if not all(isinstance(i, int) for ids in prompts for i in ids):
            raise TypeError("prompts are lists of token ids")
        if not order["stream"]:
            async for document in self._documents(CompletionRequest.model_validate(order)):
                yield [document]
            return
        self._num_streams += 1
        try:
            # vLLM puts as many tokens into a chunk as are sent together anyway; the first comes by itself
            request = CompletionRequest.model_validate(order | {"stream_interval": self._together()})
            documents = self._timed(self._documents(request), len(prompts) * order["n"])
            async with aclosing(coalesce(documents, self._pause_s, _shows)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            self._num_streams -= 1

    async def _timed(self, documents: AsyncIterator[str], num_choices: int) -> AsyncGenerator[str, None]:
        """A stream's documents as they are; when it has ended, its time for a token of one choice counts."""
        began_s, last = 0.0, ""
        async for document in documents:
            began_s, last = began_s or time.monotonic(), document
            yield document
        tokens = ((json.loads(last).get("usage") if last else None) or {}).get("completion_tokens", 0) / num_choices
        if tokens > 1:
            token_s = (time.monotonic() - began_s) / (tokens - 1)
            self._token_s = _MEMORY * self._token_s + (1 - _MEMORY) * token_s if self._token_s else token_s

    def _together(self) -> int:
        """Tokens that come between two messages of a stream."""
        return min(max(int(self._pause_s() / self._token_s), 1), _MOST_TOGETHER) if self._token_s else 1

    def _pause_s(self) -> float:
        return pause_s(self._stream_interval_s, self._num_streams, self._num_cores)

    async def _documents(self, request: CompletionRequest) -> AsyncIterator[str]:
        async for items in await self.completions(request):
            for item in items if isinstance(items, list) else [items]:
                text = item if isinstance(item, str) else item.model_dump_json()
                for event in filter(None, text.split("\n\n")):
                    document = event.removeprefix(_PREFIX).strip()
                    if document != _DONE:
                        yield document


def _shows(document: str) -> bool:
    """Whether there is text to read in it, or an end; the first tokens may make no whole character, or begin a stop string."""
    choices = json.loads(document).get("choices") or []
    return not choices or any(c.get("text") or c.get("finish_reason") for c in choices)


def _give_way() -> None:
    """Let the engine's processes, which take all cores, give way to those that carry requests and tokens to and fro.

    Niceness is a thread's, not a process's; threads to come inherit it.
    """
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended
            for thread in process.threads():
                with suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, thread.id, _ENGINE_NICE)
