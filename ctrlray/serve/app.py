"""Builds the Serve application of a set of models; `import_path: ctrlray.serve.app:build` of a Serve config file.

proxy ─► Ingress ─┬─► DialServer:<model>   one deployment for each model, each with its replicas and engines
                  ├─► RewardServer:<i>     where the run's rewards are served
                  └─► Desk                 where several ingress replicas share their counts
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.llm import LLMConfig, build_llm_deployment

from ctrlray import config, models
from ctrlray.config import parse
from ctrlray.engine.engine import EngineSpec
from ctrlray.serve.bypass import refuse_bypass, refuse_open
from ctrlray.serve.catalog import Catalog, Entry, environment, resolve
from ctrlray.serve.desk import Desk
from ctrlray.serve.ingress import Ingress, rooms
from ctrlray.serve.limits import UNSEEN_S
from ctrlray.serve.policy import Policy
from ctrlray.serve.rewards import RewardServer
from ctrlray.serve.server import DialServer
from ctrlray.serve.settings import ServeSettings

_HEALTH_PERIOD_S = 5.0
_DESK_AT_ONCE = 1000


def build(args: Mapping[str, Any]) -> Any:
    """The application of a Serve config file (`import_path: ctrlray.serve.app:build`); `args` are `ServeSettings`.

    Where it will listen is not known here, so it needs a policy file. Raises ConfigError.
    """
    settings = parse(ServeSettings, args, where="args")
    refuse_open(None, settings.policy is not None)
    return application(settings, resolve(settings), None)


def application(settings: ServeSettings, catalog: Catalog, policy: Policy | None) -> Any:
    """The Serve application. `policy` stands for a file where there is none."""
    refuse_bypass()
    entries = catalog.entries
    engines = {e.name: _engine(settings, e, len(entries)) for e in entries}
    rewards = [_reward(settings, r, i) for i, r in enumerate(catalog.rewards_of.rewards)] if catalog.rewards_of else []
    several = settings.ingress.replicas > 1
    shared = serve.deployment(Desk, max_ongoing_requests=_DESK_AT_ONCE, ray_actor_options=_actor(0.05))
    desk = shared.bind(rooms(settings, catalog), UNSEEN_S) if several else None
    ingress = serve.deployment(
        Ingress,
        num_replicas=settings.ingress.replicas,
        max_ongoing_requests=100_000,  # what waits is bounded by the desk, which says so properly
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=settings.drain_s,
        ray_actor_options=_actor(settings.ingress.cpus),
    )
    return ingress.bind(settings, catalog, policy, engines, rewards, desk)


def _engine(settings: ServeSettings, entry: Entry, num_models: int) -> Any:
    """One model's deployment."""
    replicas, gpu = settings.replicas, settings.replicas.gpus > 0
    spec = EngineSpec(
        model=entry.folder,
        dtype=models.pick_dtype(settings.dtype, gpu=gpu),
        max_context=entry.max_context,
        settings=settings.engine,
        gpus=float(replicas.gpus),
        whole_machine=num_models * replicas.max == 1,
    )
    arguments = {name: value for name, value in spec.arguments().items() if name != "model"}
    bundle: dict[str, float] = {"CPU": replicas.cpus} | ({"GPU": 1.0} if gpu else {})
    llm = LLMConfig(
        model_loading_config={"model_id": entry.name, "model_source": entry.folder},
        engine_kwargs=arguments,
        accelerator_type=replicas.accelerator if gpu else None,
        placement_group_config={"bundle_per_worker": bundle},
        runtime_env={"env_vars": environment() | spec.device_environment()},
        deployment_config={
            "ray_actor_options": {"num_cpus": 0},  # the bundle has them
            "health_check_period_s": _HEALTH_PERIOD_S,
            "graceful_shutdown_timeout_s": settings.drain_s,
            **_scaling(settings),
        },
        experimental_configs={"stream_batching_interval_ms": 0},  # DialServer sends the first token at once
        log_engine_metrics=False,
    )
    kwargs = {"entry": entry, "spec": spec, "stream_interval_s": settings.ingress.stream_interval_ms / 1000}
    return build_llm_deployment(llm, deployment_cls=DialServer, bind_kwargs=kwargs)


def _scaling(settings: ServeSettings) -> dict[str, Any]:
    low, high = settings.replicas.min, settings.replicas.max
    if low == high:
        return {"num_replicas": low}
    wanted = settings.engine.max_num_seqs
    return {"autoscaling_config": {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": wanted}}


def _reward(settings: ServeSettings, reward: config.Reward, number: int) -> Any:
    size = settings.scorers
    made = serve.deployment(
        RewardServer,
        name=f"RewardServer:{number}",
        num_replicas=size.replicas,
        graceful_shutdown_timeout_s=settings.drain_s,
        ray_actor_options=_actor(size.cpus) | {"num_gpus": size.gpus},
    )
    return made.bind(reward)


def _actor(cpus: float) -> dict[str, Any]:
    return {"num_cpus": cpus, "runtime_env": {"env_vars": environment()}}
