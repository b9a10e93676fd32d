"""What is deployed, built without Ray running: options of each deployment, what is refused, vLLM's fields that nobody may send.

Ray Serve's LLM library, and vLLM with it, takes seconds to import: fixtures do that, so that collecting the tests does not.
"""

from __future__ import annotations

import asyncio
import importlib
from types import SimpleNamespace

import pytest

from ctrlray.config import Cluster
from ctrlray.errors import ConfigError
from ctrlray.serve import api
from ctrlray.serve.catalog import Catalog, Entry
from ctrlray.serve.limits import UNSEEN_S
from ctrlray.serve.policy import local_policy
from ctrlray.serve.settings import ServeSettings
from ctrlray.serve.translate import order
from tests.ingress import CHAT, World, ask
from tests.unit.test_serve_start import CARD, POLICY, exported

BYPASS = "RAY_SERVE_ENABLE_DIRECT_INGRESS"


@pytest.fixture(scope="module")
def app():
    return importlib.import_module("ctrlray.serve.app")


@pytest.fixture(scope="module")
def launch(app):
    return importlib.import_module("ctrlray.serve.launch")


def settings(**changes):
    return ServeSettings.model_validate({"models": [{"model": "x"}]} | changes)


def entry(name="mine"):
    return Entry(name, f"/models/{name}", f"/models/{name}", CARD, 512)


def catalog(*names, run=None):
    return Catalog(tuple(entry(n) for n in names), run, {})


@pytest.fixture
def engines(app, monkeypatch):
    """What Ray's builder of vLLM servers is asked for; the builder itself would connect to Ray."""
    asked = []

    def build(llm, deployment_cls, bind_kwargs):
        asked.append((llm, bind_kwargs))
        return f"server of {llm.model_id}"

    monkeypatch.setattr(app, "build_llm_deployment", build)
    return asked


def options(bound):
    """The options of a deployment."""
    return bound._bound_deployment._deployment_config


def arguments(bound):
    return bound._bound_deployment.init_args


def test_replicas_are_fixed_or_follow_the_load(app):
    assert app._scaling(settings(replicas={"min": 2, "max": 2})) == {"num_replicas": 2}
    scaled = app._scaling(settings(replicas={"min": 0, "max": 3}, engine={"max_num_seqs": 24}))
    assert scaled == {"autoscaling_config": {"min_replicas": 0, "max_replicas": 3, "target_ongoing_requests": 24}}


def test_an_engine_on_gpus(app, engines):
    made = settings(
        replicas={"min": 1, "max": 4, "cpus": 3, "gpus": 2, "accelerator": "L4"}, engine={"tensor_parallel": 2}, drain_s=120
    )
    app.application(made, catalog("mine"), None)
    ((llm, bound),) = engines
    assert llm.accelerator_type == "L4" and llm.model_id == "mine"
    assert llm.placement_group_config == {"bundle_per_worker": {"CPU": 3.0, "GPU": 1.0}}
    assert llm.engine_kwargs["tensor_parallel_size"] == 2 and llm.engine_kwargs["dtype"] == "bfloat16"
    assert llm.engine_kwargs["max_model_len"] == 512 and "model" not in llm.engine_kwargs
    assert llm.deployment_config["ray_actor_options"] == {"num_cpus": 0}
    assert llm.deployment_config["graceful_shutdown_timeout_s"] == 120
    assert llm.deployment_config["autoscaling_config"]["max_replicas"] == 4
    assert bound["entry"].name == "mine" and bound["spec"].gpus == 2 and bound["stream_interval_s"] == 0.1


def test_an_engine_on_cpus_asks_for_no_gpu(app, engines):
    app.application(settings(replicas={"accelerator": "L4"}, dtype="float32"), catalog("mine", "other"), None)
    for llm, bound in engines:
        assert llm.accelerator_type is None and llm.placement_group_config == {"bundle_per_worker": {"CPU": 1.0}}
        assert llm.deployment_config["num_replicas"] == 1 and bound["spec"].gpus == 0
        assert not bound["spec"].whole_machine  # there are two of them
    assert [llm.model_id for llm, _ in engines] == ["mine", "other"]


def test_the_ingress_drains_and_several_share_a_desk(app, engines):
    one = app.application(settings(), catalog("mine"), None)
    assert options(one).graceful_shutdown_timeout_s == 300 and options(one).num_replicas == 1
    assert arguments(one)[3] == {"mine": "server of mine"} and arguments(one)[5] is None  # it has a desk of its own
    made = settings(ingress={"replicas": 3, "waiting": 10}, engine={"max_num_seqs": 8}, replicas={"max": 2}, drain_s=40)
    several = app.application(made, catalog("mine", "other"), None)
    assert options(several).graceful_shutdown_timeout_s == 40 and options(several).num_replicas == 3
    assert arguments(arguments(several)[5]) == ({"mine": 26, "other": 26}, UNSEEN_S)


def test_rewards_drain_with_those_who_ask_them(app, engines):
    run = SimpleNamespace(rewards=["a reward", "another"])
    made = app.application(settings(rewards=True, drain_s=40, scorers={"gpus": 0.5}), catalog("mine", run=run), None)
    rewards = arguments(made)[4]
    assert [arguments(r) for r in rewards] == [("a reward",), ("another",)]
    assert [options(r).graceful_shutdown_timeout_s for r in rewards] == [40, 40]


def test_rooms_are_what_engines_hold_and_what_may_wait(app):
    made = settings(replicas={"max": 3}, engine={"max_num_seqs": 8}, ingress={"waiting": 5})
    assert app.rooms(made, catalog("mine", "other")) == {"mine": 29, "other": 29}  # 3 x 8 + 5


def test_ways_around_the_ingress_are_refused_wherever_something_starts(app, monkeypatch):
    """By the process that deploys, and by each node's own environment."""
    from ctrlray.serve.server import DialServer

    monkeypatch.setenv(BYPASS, "1")
    with pytest.raises(ConfigError, match=BYPASS):
        app.application(settings(), catalog("mine"), None)
    nothing = SimpleNamespace()  # in place of the instance, which has a destructor that needs an event loop
    with pytest.raises(ConfigError, match=BYPASS):
        asyncio.run(app.Ingress.__init__(nothing, settings(), catalog("mine"), local_policy()[1], {}, [], None))
    with pytest.raises(ConfigError, match=BYPASS):
        asyncio.run(DialServer.__init__(nothing, None, entry(), None, 0.1))


def test_a_serve_config_needs_a_policy_file(app):
    with pytest.raises(ConfigError, match="needs a policy file"):
        app.build({"models": [{"model": "x"}]})


class FakeServe:
    """Stands for `ray.serve`."""

    def __init__(self):
        self.started, self.ran, self.deleted = [], [], []
        self.now_s, self.up_s = 0.0, 0.0

    def start(self, http_options, controller_options):
        self.started.append(http_options)

    def run(self, application, name):
        self.ran.append(application)
        if self.up_s:
            raise RuntimeError("an engine did not start")

    def delete(self, name):
        """As Ray's, which waits for a minute at most, for an application that takes `up_s` to end."""
        self.deleted.append(name)
        self.now_s += min(self.up_s, 60.0)
        self.up_s -= min(self.up_s, 60.0)
        if self.up_s:
            raise TimeoutError("weren't deleted after 60s")


@pytest.fixture
def serve(launch, monkeypatch):
    """A Ray Serve that listens where it is told to, unless `held` says that it was there before."""
    fake = FakeServe()
    fake.held = None
    monkeypatch.setattr(launch, "serve", fake)
    monkeypatch.setattr(launch, "start_ray", lambda cluster: None)
    monkeypatch.setattr(launch, "refuse_tokenless", lambda: None)
    monkeypatch.setattr(launch, "_app", lambda: SimpleNamespace(application=lambda *given: given))

    def client():
        return SimpleNamespace(http_config=SimpleNamespace(**(fake.held or fake.started[-1])))

    monkeypatch.setattr("ray.serve.context._get_global_client", client)
    return fake


@pytest.fixture
def served(tmp_path):
    return settings(models=[{"model": str(exported(tmp_path / "mine"))}])


def test_without_a_policy_file_the_key_that_is_returned_is_the_only_one(launch, serve, served):
    key = launch.run(served, "127.0.0.1", 8123, Cluster())
    ((_, _, policy),) = serve.ran
    assert policy.find(key).name == "local" and len(policy.keys) == 1 and key.startswith("ck-")
    assert serve.started == [{"host": "127.0.0.1", "port": 8123}]
    assert launch.run(served, "127.0.0.1", 8123, Cluster()) != key


def test_with_a_policy_file_there_is_no_other_key(launch, serve, served, tmp_path):
    (tmp_path / "policy.yaml").write_text(POLICY.format(""))
    made = served.model_copy(update={"policy": str(tmp_path / "policy.yaml")})
    assert launch.run(made, "0.0.0.0", 8123, Cluster()) is None
    assert serve.ran[0][2] is None and serve.started == [{"host": "0.0.0.0", "port": 8123}]


def test_nothing_starts_on_a_public_interface_without_a_policy_file(launch, serve, served):
    with pytest.raises(ConfigError, match="needs a policy file"):
        launch.run(served, "0.0.0.0", 8123, Cluster())
    assert serve.started == serve.ran == []


def test_a_ray_serve_that_was_there_before_and_listens_to_all_gets_no_application(launch, serve, served):
    serve.held = {"host": "0.0.0.0", "port": 8123}
    with pytest.raises(ConfigError, match="needs a policy file"):
        launch.run(served, "127.0.0.1", 8123, Cluster())
    assert serve.ran == []


@pytest.mark.parametrize("up_s, calls", [(0, 1), (60, 1), (61, 2), (125, 3)])
def test_the_end_waits_as_long_as_answers_may_take(launch, serve, monkeypatch, up_s, calls):
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: serve.now_s))
    serve.up_s = float(up_s)
    launch.stop(100.0)
    assert serve.deleted == [launch.APP] * calls


def test_an_end_that_takes_much_longer_than_answers_may_is_an_error(launch, serve, monkeypatch):
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: serve.now_s))
    serve.up_s = 1e9
    with pytest.raises(TimeoutError):
        launch.stop(100.0)
    assert serve.now_s == 180  # 130, to the end of the minute


def test_what_did_not_start_is_taken_down_for_as_long_as_it_takes(launch, serve, served, monkeypatch):
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: serve.now_s))
    serve.up_s = 110.0
    with pytest.raises(RuntimeError, match="did not start"):
        launch.run(served.model_copy(update={"drain_s": 100.0}), "127.0.0.1", 8123, Cluster())
    assert serve.deleted == [launch.APP] * 2


THEIRS_AND_OURS = [
    ("ChatCompletionRequest", api.ChatRequest, CHAT, ask()),
    ("CompletionRequest", api.CompletionRequest, "/v1/completions", {"model": "tiny", "prompt": "x"}),
]


@pytest.mark.parametrize("name, ours, path, body", THEIRS_AND_OURS)
def test_no_other_field_of_vllm_is_taken(app, name, ours, path, body):
    from ray.serve.llm import openai_api_models

    theirs = getattr(openai_api_models, name)
    others = set(theirs.model_fields) - set(ours.model_fields)
    assert {"allowed_token_ids", "logit_bias", "add_special_tokens", "vllm_xargs", "prompt_logprobs"} <= others
    world = World()
    for field in others:
        refused = world.admin.post(path, json=body | {field: 1})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == field
    assert world.engine.orders == [] and world.admin.post(path, json=body).status_code == 200


EXTREMES = {
    "n": (1, 128),
    "max_tokens": (1, 10_000_000),
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "top_k": (0, 1_000_000),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (-(2**63), 2**63 - 129),
    "stop": ("x" * 256, ["x" * 256] * 4),
    "response_format": ({"type": "text"}, {"type": "json_object"}),
}


@pytest.mark.parametrize("field", EXTREMES)
def test_vllm_takes_what_is_let_through(app, field):
    """Else it would be refused late, by an error of the engine's server, and its tokens would be gone."""
    import msgspec
    from ray.serve.llm import openai_api_models

    for value in EXTREMES[field]:
        ours = api.ChatRequest.model_validate(ask(**{field: value}))
        made = order(ours, [[1, 2]], ours.max_tokens or 5, "r")
        theirs = openai_api_models.CompletionRequest.model_validate(made)
        params = theirs.to_sampling_params(made["max_tokens"], {})
        msgspec.msgpack.encode(params)  # as it travels to the engine
        if field == "seed":
            assert params.seed + api.MAX_CHOICES < 2**63  # vLLM counts it up for each further choice, in 64 bits
    with pytest.raises(ValueError):
        api.ChatRequest.model_validate(ask(**{field: BEYOND[field]}))


BEYOND = {
    "n": 129,
    "max_tokens": 10_000_001,
    "temperature": 2.01,
    "top_p": 0.0,
    "top_k": -1,
    "min_p": 1.1,
    "presence_penalty": 2.1,
    "frequency_penalty": -2.1,
    "seed": 2**63 - 128,
    "stop": ["x"] * 5,
    "response_format": {"type": "grammar"},
}
