"""A Ray cluster on this machine that grows by fake nodes and shrinks again, for a process of its own.

Ray's `AutoscalingCluster` opens a file that the wheel lacks and ends every Ray of the machine. Here the head's processes are
children of this process and the fake nodes' are children of the head's monitor, so that all can be ended by their ids.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

ROOT = Path(__file__).parent.parent.parent
IDLE_S = 6
HEAD = "ray.head.default"
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
SMALL = {"CPU": 1}
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"  # the one that `ray up` and KubeRay start


@contextmanager
def fake_nodes(folder: Path, node_types: Mapping[str, Mapping[str, Any]], head: Mapping[str, int] = SMALL) -> Iterator[None]:
    """A head and no other node, connected to; `node_types` are what the autoscaler may start."""
    of_all = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "PYTHONPATH": str(ROOT), AUTOSCALER_V2: "1"}
    of_head = dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), FAKE_HEAD_NODE_ID)
    of_head["RAY_NODE_TYPE_NAME"] = HEAD
    os.environ |= of_all | of_head
    try:
        common: dict[str, Any] = {"include_dashboard": False, "min_worker_port": 0, "max_worker_port": 0}
        common |= {"num_cpus": head["CPU"], "num_gpus": head.get("GPU", 0), "object_store_memory": 300 * 2**20}
        named = {k: v for k, v in head.items() if k not in ("CPU", "GPU")}
        parameters = RayParams(resources=named, no_monitor=True, **common)
        node = Node(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)  # its processes end with this one
        for name in of_head:  # the monitor passes its environment on to the nodes that it starts
            del os.environ[name]
        config = folder / "cluster.json"
        config.write_text(json.dumps(cluster_file(node.gcs_address, node_types, head)))
        parameters.autoscaling_config = str(config)
        node.start_monitor()
        ray.init(address=node.gcs_address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        processes = psutil.Process().children(recursive=True)
        ray.shutdown()
        end(processes)


def cluster_file(gcs_address: str, node_types: Mapping[str, Mapping[str, Any]], resources: Mapping[str, int]) -> dict[str, Any]:
    head = {"resources": dict(resources), "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "fake",
        "max_workers": sum(t["max_workers"] for t in node_types.values()),
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "external",  # under its own name, `fake_multinode`, Ray wants that file for its defaults
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": gcs_address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {HEAD: head, **node_types},
        "head_node_type": HEAD,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{kind}_commands": [] for kind in COMMANDS},
    }


def alive(resource: str) -> int:
    """How many nodes that have a resource are up."""
    return sum(bool(n["Alive"]) and resource in n["Resources"] for n in ray.nodes())


def take_away(worker: int) -> None:
    """End the node that a worker process runs on as losing its machine would: raylet and workers at once, without a word."""
    raylet = psutil.Process(worker).parent()
    assert raylet is not None and "raylet" in raylet.name(), raylet
    end([raylet, *raylet.children(recursive=True)])


def running(pids: Iterable[int]) -> set[int]:
    """Of these processes, those that have not ended."""
    there = set()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                there.add(pid)
    return there


def told(module: str, *arguments: str, timeout_s: float) -> dict[str, Any]:
    """Run a module that prints a line `SEEN {json}`; one that takes too long is asked to end, so that it ends its nodes."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            said, problems = started.communicate(timeout=timeout_s)
        except BaseException:
            started.terminate()
            with suppress(subprocess.TimeoutExpired):
                started.wait(60)
            started.kill()
            raise
    assert started.returncode == 0, said[-2000:] + problems[-4000:]
    line = next(x for x in said.splitlines() if x.startswith("SEEN "))
    found: dict[str, Any] = json.loads(line.removeprefix("SEEN "))
    return found


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it ended by itself, as what it belonged to did
            process.kill()
    psutil.wait_procs(processes, timeout=20)


def wait_until(holds: Any, timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.3)
    return True
