"""The ingress deployment: the application of `ctrlray.serve.routes` with real models, rewards and policy behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import serve

from ctrlray.serve.bypass import refuse_bypass, refuse_tokenless
from ctrlray.serve.catalog import Catalog, Entry
from ctrlray.serve.desk import Desk
from ctrlray.serve.dial import check_policy
from ctrlray.serve.entrance import App
from ctrlray.serve.front import Front
from ctrlray.serve.handles import RemoteDesk, ReplicaEngine
from ctrlray.serve.policy import Policy, PolicyFile
from ctrlray.serve.prompts import Prompts
from ctrlray.serve.rewards import RewardJudge
from ctrlray.serve.routes import create_app
from ctrlray.serve.served import Served
from ctrlray.serve.settings import ServeSettings


@serve.ingress()
class Ingress:
    """One replica. Without a policy file, `policy` is the policy."""

    def __init__(
        self,
        settings: ServeSettings,
        catalog: Catalog,
        policy: Policy | None,
        engines: Mapping[str, Any],
        rewards: Sequence[Any],
        desk: Any,
    ) -> None:
        refuse_bypass()  # in the cluster's own environment too
        refuse_tokenless()
        self._settings = settings
        dials = {e.name: e.dial for e in catalog.entries}
        if policy is None:
            assert settings.policy is not None
            file = PolicyFile(Path(settings.policy), lambda p: check_policy(p, dials))
            current, problem = (lambda: file.policy), (lambda: file.problem)
        else:
            current, problem = (lambda: policy), (lambda: "")
        models = [self._served(e, engines[e.name]) for e in catalog.entries]
        counts = RemoteDesk(desk) if desk is not None else Desk(rooms(settings, catalog))
        run, timeout_s = catalog.rewards_of, settings.ingress.answer_timeout_s
        judge = RewardJudge(rewards, run.control, catalog.scales, timeout_s) if run else None
        self._front = Front(models, current, counts, judge, problem)

    def _served(self, entry: Entry, handle: Any) -> Served:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(entry.local())
        prompts = Prompts(tokenizer, entry.dial, entry.coded, entry.max_context)
        engine = ReplicaEngine(handle, self._settings.ingress.answer_timeout_s)
        return Served(entry.name, entry.dial, prompts, engine, self._settings.replicas.gpus > 0, entry.method)

    async def __serve_build_asgi_app__(self) -> App:
        """Called by Ray Serve after the constructor."""
        own = self._settings.ingress
        return create_app(self._front, own.max_body_bytes, own.body_timeout_s, own.max_held_bytes)


def rooms(settings: ServeSettings, catalog: Catalog) -> dict[str, int]:
    """Requests that each model takes in at once: what its engines hold, and what may wait."""
    held = settings.engine.max_num_seqs * settings.replicas.max
    return {e.name: held + settings.ingress.waiting for e in catalog.entries}
