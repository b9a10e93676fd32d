"""What `serve deploy` builds: two models of one run, the run's rewards, and two ingress replicas that share one desk."""

from __future__ import annotations

import importlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from ray import serve

from ctrlray.errors import ConfigError
from ctrlray.serve.policy import mint
from tests.e2e.served import free_port, make_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CHAT = "/v1/chat/completions"
KEY, HASH = mint()
FEW, FEW_HASH = mint()


def app_module():
    """`ctrlray.serve.app`, which imports vLLM: collecting tests must not wait for that."""
    return importlib.import_module("ctrlray.serve.app")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory, private_cache):
    made = make_run(tiny, tmp_path_factory.mktemp("deployed") / "run")
    made.out("train").write_json({"facts": {}}, "result.json")
    return made


@pytest.fixture(scope="module")
def server(run, tmp_path_factory, local_ray):
    policy = tmp_path_factory.mktemp("policy") / "policy.yaml"
    few = {"name": "few", "hash": FEW_HASH, "requests_per_minute": 5}
    policy.write_text(yaml.safe_dump({"keys": [{"name": "all", "hash": HASH, "metrics": True}, few]}))
    args = {
        "models": [{"model": run.job.root, "methods": ["exmate", "start"]}],
        "policy": str(policy),
        "rewards": True,
        "replicas": {"cpus": 0.5},
        "ingress": {"replicas": 2},
    }
    port = free_port()
    serve.start(http_options={"port": port})
    serve.run(app_module().build(args), name="ctrlray")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as made:
        yield made


def ask(**fields):
    return {"model": "tiny-exmate", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6} | fields


def test_the_serve_config_names_it():
    config = yaml.safe_load((Path(__file__).parent.parent.parent / "cluster" / "serve.yaml").read_text())
    assert config["applications"][0]["import_path"] == f"{app_module().__name__}:{app_module().build.__name__}"


def test_it_needs_a_policy_file(run):
    with pytest.raises(ConfigError, match="needs a policy file"):
        app_module().build({"models": [{"model": run.job.root}]})


@pytest.mark.soak
def test_models_of_a_run_side_by_side(client):
    assert {m["id"] for m in client.get("/v1/models").json()["data"]} == {"tiny-exmate", "tiny-start"}
    described = {m["model"]: m["strategies"] for m in client.get("/v1/control").json()["data"]}
    assert described == {"tiny-exmate": ["dial", "rerank"], "tiny-start": ["rerank"]}
    dialled = client.post(CHAT, json=ask(control={"brevity": 2})).json()
    assert dialled["control"] == {"brevity": 2, "variety": 2} and "achieved" not in dialled["choices"][0]


@pytest.mark.soak
def test_a_model_without_a_dial_is_reranked(client):
    answer = client.post(CHAT, json=ask(model="tiny-start", candidates=4, temperature=1.0, control={"brevity": 1})).json()
    assert set(answer["choices"][0]["achieved"]) == {"brevity", "variety"} and answer["control"]["brevity"] == 1
    plain = client.post(CHAT, json=ask(control_strategy="dial")).json()["usage"]["prompt_tokens"]
    assert answer["usage"]["prompt_tokens"] == plain - 2  # no code


@pytest.mark.soak
def test_limits_hold_over_all_ingress_replicas(server):
    headers = {"Authorization": f"Bearer {FEW}"}
    with httpx.Client(base_url=server, headers=headers, timeout=120) as few, ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(lambda _: few.post(CHAT, json=ask(max_tokens=1)).status_code, range(12)))
    assert sorted(statuses) == [200] * 5 + [429] * 7


@pytest.mark.soak
def test_metrics_are_of_all_ingress_replicas(client):
    told, end = 'ctrlray_refused_total{key="few",status="429"} 7.0', time.monotonic() + 60
    while told not in (before := client.get("/metrics").text):  # the desk is told of a refusal after its answer
        assert time.monotonic() < end, before
        time.sleep(0.1)
    assert all(client.get("/metrics").text == before for _ in range(6))
    assert 'ctrlray_requests_total{key="few",model="tiny-exmate",status="200"} 5.0' in before
