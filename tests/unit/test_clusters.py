"""The files in cluster/: valid for Ray and KubeRay, read as their own code reads them, and every job finds its nodes there."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from ctrlray import config, models, placement
from ctrlray.clusters import Cluster, gpu_gib, known_gpus, launch, read_cluster, read_prices
from ctrlray.errors import ConfigError
from ctrlray.placement import Group, Node
from ctrlray.serve.settings import ServeSettings

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "cluster"
LAUNCHER = [FOLDER / f"{name}.yaml" for name in ("aws", "gcp", "local")]
KUBERAY = sorted((FOLDER / "kuberay").glob("*.yaml"))
FOR_JOBS = [*LAUNCHER, *(p for p in KUBERAY if p.stem != "rayservice")]
PRICES = read_prices(FOLDER / "prices.yaml")
SCHEMA = json.loads((ROOT / "tests" / "data" / "kuberay.json").read_text())
JOBS = sorted(p for p in ROOT.glob("jobs/**/job.yaml") if "method" not in yaml.safe_load(p.read_text()))


def stem(path):
    return path.parent.name if path.name == "job.yaml" else path.stem


def cluster_spec(resource):
    spec = resource["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


@pytest.mark.parametrize("path", LAUNCHER, ids=stem)
def test_ray_s_own_schema_and_checks_take_a_launcher_file(path):
    validate_config(prepare_config(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("path", LAUNCHER, ids=stem)
def test_ray_refuses_a_launcher_file_with_a_misspelt_key(path):
    raw = yaml.safe_load(path.read_text()) | {"max_wrkers": 3}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(raw))


@pytest.mark.parametrize("path", KUBERAY, ids=stem)
def test_kuberay_files_have_published_fields_only(path):
    jsonschema.validate(yaml.safe_load(path.read_text()), SCHEMA)


@pytest.mark.parametrize("path", KUBERAY, ids=stem)
def test_a_misspelt_field_does_not_pass_the_schema(path):
    raw = yaml.safe_load(path.read_text())
    group = cluster_spec(raw)["workerGroupSpecs"][0]
    for there, name in ((raw["spec"], "entrypont"), (group, "maxReplica"), (group["template"]["spec"], "nodeSelectr")):
        there[name] = "x"
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(raw, SCHEMA)
        del there[name]
    jsonschema.validate(raw, SCHEMA)


def test_the_service_is_ctrlray_s_own_behind_a_policy():
    spec = yaml.safe_load((FOLDER / "kuberay" / "rayservice.yaml").read_text())["spec"]
    served = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (app,) = served.applications
    plain = yaml.safe_load((FOLDER / "serve.yaml").read_text())["applications"][0]
    assert app.import_path == plain["import_path"] == "ctrlray.serve.app:build"
    settings = config.parse(ServeSettings, app.args, where="rayservice.yaml")
    assert spec["rayClusterDeletionDelaySeconds"] >= settings.drain_s
    edge = {"name": "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "value": "ctrlray.serve.edge:install"}
    cluster = spec["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert edge in container["env"] and "secret" in volumes[mounts[str(Path(settings.policy).parent)]]


@pytest.mark.parametrize("path", KUBERAY, ids=stem)
def test_ray_s_autoscaler_reads_the_same_node_types_from_kuberay_files(path):
    raw = yaml.safe_load(path.read_text())
    made = {"metadata": {"namespace": "default", "name": raw["metadata"]["name"]}, "spec": cluster_spec(raw)}
    theirs = _derive_autoscaling_config_from_ray_cr(made)["available_node_types"]
    ours = read_cluster(path, PRICES)
    assert set(theirs) - {t.name for t in ours.workers} == {"headgroup"}
    for t in ours.workers:
        given = theirs[t.name]
        assert (given["min_workers"], given["max_workers"]) == (t.least, t.most)
        assert given["resources"]["CPU"] == t.node.cpus and given["resources"]["GPU"] == t.node.gpus
        assert t.node.memory_gib == pytest.approx(0.7 * given["resources"]["memory"] / 2**30)
        assert t.node.groups == frozenset(given["resources"]) - {"CPU", "GPU", "memory"}


@pytest.mark.parametrize("path", FOR_JOBS, ids=stem)
def test_pods_and_machines_have_what_the_file_says(path):
    """No node type promises more than its machine has, and the file's limit takes all types at their most."""
    cluster = read_cluster(path, PRICES)
    for t in (cluster.head, *cluster.workers):
        machine = PRICES.machines[t.machine]
        assert t.node.cpus <= machine.cpus and t.node.gpus <= machine.gpus
        assert t.node.memory_gib <= machine.memory_gib * 0.7
    assert sum(t.most for t in cluster.workers) <= cluster.most


@pytest.mark.parametrize("path", [p for p in FOR_JOBS if p.stem != "local"], ids=stem)
def test_the_head_computes_nothing_on_gpus_and_only_training_pays_for_keeping_its_machines(path):
    cluster = read_cluster(path, PRICES)
    assert cluster.head.node.gpus == 0
    assert {t.name: t.spot for t in cluster.workers} == {
        "generation": True,
        "reward": True,
        "training": False,
        "training-large": False,
    }
    assert all(t.least == 0 for t in cluster.workers)


@pytest.mark.parametrize("path", [*LAUNCHER, *KUBERAY], ids=stem)
def test_every_node_sees_the_models_and_data_of_the_head(path):
    raw = yaml.safe_load(path.read_text())
    if "kind" not in raw:
        options = " ".join(raw["docker"]["run_options"])
        assert "-v /shared:/shared" in options and "XDG_CACHE_HOME=/shared/cache" in options
        return
    spec = cluster_spec(raw)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {"name": "XDG_CACHE_HOME", "value": "/shared/cache"} in container["env"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert container["image"] == spec["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]


@pytest.mark.parametrize("path", FOR_JOBS, ids=stem)
@pytest.mark.parametrize("job_path", JOBS, ids=stem)
def test_every_job_is_scheduled_on_the_file_s_node_types(path, job_path):
    """Pools at their least, and at their largest where nodes come as needed: each actor on a node of its group."""
    cluster = read_cluster(path, PRICES)
    job = config.load_job(job_path)
    shape, rewards = models.shape_from_hub(job.model), models.reward_parameters(job.rewards)
    for least in (True,) if path.stem == "local" else (True, False):
        groups = placement.plan(job, shape, rewards, least=least)
        assert placement.misfit(job, groups, cluster.nodes(), shape, rewards) is None
        for mine in placement.phases(groups).values():
            launched = launch(cluster, mine)
            assert not isinstance(launched, ConfigError), launched
            assert all(count <= limit(cluster, name) for name, count in launched.counts.items())
            assert placement.packs(mine, up(cluster, launched.counts))


def limit(cluster: Cluster, name: str) -> int:
    return next(t.most for t in cluster.workers if t.name == name)


def up(cluster: Cluster, counts: dict[str, int]) -> list[Node]:
    return [cluster.head.node, *(t.node for t in cluster.workers for _ in range(counts.get(t.name, 0)))]


def engines(count: int, gpus: float = 8, gpu_gib: float = 0.0) -> list[Group]:
    return [Group("generate and score", "engine", count, 8, gpus, 10, "generation", gpu_gib)]


def test_how_long_idle_nodes_stay_is_what_the_file_says_or_ray_s_own(tmp_path):
    for name, idle_s in (("aws.yaml", 600), ("gcp.yaml", 600), ("kuberay/rayjob.yaml", 600), ("local.yaml", 0)):
        assert read_cluster(FOLDER / name, PRICES).idle_s == idle_s
    raw = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    del raw["idle_timeout_minutes"]
    path = tmp_path / "silent.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert read_cluster(path, PRICES).idle_s == 300
    raw = yaml.safe_load((FOLDER / "kuberay" / "raycluster.yaml").read_text())
    given = {"idleTimeoutSeconds": 90}
    for options, scales, idle_s in ((None, True, 60), (given, True, 90), (given, False, 0)):
        raw["spec"] |= {"autoscalerOptions": options, "enableInTreeAutoscaling": scales}
        path.write_text(yaml.safe_dump(raw))
        assert read_cluster(path, PRICES).idle_s == idle_s


def test_a_launch_stops_at_the_limits_of_the_file_and_names_them():
    cluster = read_cluster(FOLDER / "aws.yaml", PRICES)
    assert launch(cluster, engines(4)).counts == {"generation": 4}  # type: ignore[union-attr]
    assert "generation (4); raise that limit" in str(launch(cluster, engines(5)))
    assert "max_workers=2 nodes; raise it" in str(launch(cluster._replace(most=2), engines(3)))
    assert "no node type takes engine actors" in str(launch(cluster, engines(1, gpu_gib=99)))


def test_a_launch_takes_the_machine_on_which_one_actor_costs_least():
    cluster = read_cluster(FOLDER / "aws.yaml", PRICES)
    anywhere = [Group("train", "worker", 2, 2, 1, 10)]
    # a g6.2xlarge holds 1 for $0.39 spot, a g6e.48xlarge 8 for $12.05, that is $1.51 each
    assert launch(cluster, anywhere).counts == {"reward": 2}  # type: ignore[union-attr]
    on_head = [Group("train", "worker", 2, 2, 0, 10)]
    assert launch(cluster, on_head).counts == {}  # type: ignore[union-attr]
    assert launch(cluster, anywhere).dollars_per_hour == pytest.approx(2 * 0.39)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw["available_node_types"]["reward"]["node_config"].update(InstanceType="g9.huge"), "'g9.huge' has no"),
        (lambda raw: raw["available_node_types"]["reward"].pop("node_config"), "'node_config'"),
        (lambda raw: raw.pop("provider"), "no cluster file of Ray or KubeRay"),
    ],
)
def test_what_is_missing_in_a_file_is_named(tmp_path, change, said):
    raw = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    change(raw)
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read_cluster(path, PRICES)
    assert str(path) in str(caught.value)


def test_a_spot_group_needs_a_spot_price():
    prices = PRICES.model_dump()
    prices["machines"]["g6.2xlarge"]["spot_dollars_per_hour"] = None
    with pytest.raises(ConfigError, match="no spot_dollars_per_hour"):
        read_cluster(FOLDER / "aws.yaml", type(PRICES).model_validate(prices))


@pytest.mark.parametrize(("name", "field"), [("aws", "ImageId"), ("gcp", "disks")])
def test_every_node_names_its_machine_image_and_has_a_driver(name, field):
    types = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["available_node_types"]
    assert all(t["node_config"][field] for t in types.values())
    if name == "gcp":  # of these images the driver is installed on first start, where it is asked for
        kinds = {n: t["node_config"].get("metadata", {}).get("items") for n, t in types.items()}
        assert kinds == {n: [{"key": "install-nvidia-driver", "value": "True"}] if n != "head" else None for n in types}
        assert {t["node_config"]["disks"][0]["initializeParams"]["diskType"].rsplit("/")[-1] for t in types.values()} == {
            "pd-balanced",
            "hyperdisk-balanced",
        }


@pytest.mark.parametrize("path", KUBERAY, ids=stem)
def test_pods_may_write_to_the_claim_and_have_an_identity(path):
    spec = cluster_spec(yaml.safe_load(path.read_text()))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"] == {"fsGroup": 1000} and pod["serviceAccountName"]


def test_the_image_has_the_pods_user_and_its_commands_are_found_in_login_shells():
    text = (FOLDER / "Dockerfile").read_text()
    as_root, as_user = text.split("\nUSER ray\n")
    assert as_root.index("userdel --remove ubuntu") < as_root.index("useradd --create-home --uid 1000 ray")  # one uid, one user
    assert "> /etc/profile.d/ctrlray.sh" in as_root and "uv venv --seed" in as_user


def test_processes_compile_nothing_when_they_start():
    """In an image, or where bytecode is not written, each would compile all that it imports, which takes half of its start."""
    assert "UV_COMPILE_BYTECODE=1" in (FOLDER / "Dockerfile").read_text()
    assert "export UV_COMPILE_BYTECODE := 1" in (ROOT / "Makefile").read_text()


def test_the_image_is_built_of_what_is_there():
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    stages = {line.split()[-1] for line in lines if re.match(r"FROM .* AS ", line)}
    assert stages == {"cpu", "gpu"} and "ARG DEVICE=cpu" in lines and "FROM ${DEVICE}" in lines
    for device in stages:
        copied = [
            Path(ROOT, source.replace("${DEVICE}", device))
            for line in lines
            if line.startswith("COPY") and "--from" not in line
            for source in line.split()[2:-1]
        ]
        assert len(copied) == 5 and all(p.exists() for p in copied), copied


@pytest.mark.parametrize("path", [*LAUNCHER, *KUBERAY], ids=stem)
def test_all_files_run_the_package_s_version(path):
    from ctrlray import __version__

    assert set(re.findall(r"REGISTRY/ctrlray:(\S+)-gpu", path.read_text())) == {__version__}


@pytest.mark.parametrize("path", KUBERAY, ids=stem)
def test_kuberay_files_name_the_ray_that_is_pinned(path):
    import ray

    assert cluster_spec(yaml.safe_load(path.read_text()))["rayVersion"] == ray.__version__


@pytest.mark.parametrize(
    ("found", "gib"),
    [
        (["CPU", "GPU", "accelerator_type:L4"], 22.5),
        (["accelerator_type:L40S"], 44.9),
        (["accelerator_type:A100"], 79.3),  # either kind: the larger counts, so that nothing is refused that may fit
        (["accelerator_type:A100-40G"], 39.6),
        (["accelerator_type:A100-80G"], 79.3),
        (["accelerator_type:B200"], 179.0),
        (["accelerator_type:GB200"], math.inf),
        (["accelerator_type:L"], math.inf),
        (["accelerator_type:L4", "accelerator_type:unheard-of"], math.inf),
        (["CPU", "L4"], math.inf),
    ],
)
def test_memory_of_a_gpu_by_the_kind_that_ray_names(found, gib):
    assert gpu_gib(found, known_gpus()) == gib
