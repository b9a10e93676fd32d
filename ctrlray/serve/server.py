"""A model's vLLM server under Ray Serve: `ray.serve.llm`'s own, with one more method that takes token ids only.

Its other methods (chat with any template, tokenize, embeddings, ...) stay inside of the cluster: no route leads to them.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import psutil
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import CompletionRequest

from ctrlray.engine.engine import EngineSpec
from ctrlray.serve.bypass import refuse_bypass
from ctrlray.serve.catalog import Entry
from ctrlray.serve.stream import coalesce, pause_s

_PREFIX = "data: "
_DONE = "[DONE]"
_ENGINE_NICE = 19
"""Ray starts its workers at 15."""


class DialServer(LLMServer):  # type: ignore[misc]
    """One replica."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, llm_config: LLMConfig, entry: Entry, spec: EngineSpec, stream_interval_s: float
    ) -> None:
        refuse_bypass()  # by this node's own environment
        os.environ.update(spec.device_environment())  # of this node's cores; the engine's processes inherit it
        entry.local()
        self._stream_interval_s, self._num_streams, self._num_cores = stream_interval_s, 0, len(os.sched_getaffinity(0))
        await super().__init__(llm_config)
        if not spec.gpus:
            _give_way()

    async def answer(self, order: dict[str, Any]) -> AsyncGenerator[list[str], None]:
        """JSON documents of vLLM's completion API for an order of `ctrlray.serve.translate`, in batches.

        The prompts must be token ids: text would be tokenized here, special tokens in it included.
        """
        prompts = order["prompt"]
        if not all(isinstance(i, int) for ids in prompts for i in ids):
            raise TypeError("prompts are lists of token ids")
        documents = self._documents(CompletionRequest.model_validate(order))
        if not order["stream"]:
            async for document in documents:
                yield [document]
            return
        self._num_streams += 1
        try:
            async for batch in coalesce(documents, self._pause_s):
                yield batch
        finally:
            self._num_streams -= 1

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


def _give_way() -> None:
    """Let the engine's processes, which take all cores, give way to those that carry requests and tokens to and fro."""
    for process in psutil.Process().children(recursive=True):
        process.nice(_ENGINE_NICE)
