"""Run by test_reserving in a process of its own: what every phase of every job asks for, reserved with Ray on a file's nodes.

The nodes are fake, of the types that the cluster file names, and come up as Ray's autoscaler sees what is asked for; Ray's own
scheduler places it. A phase is reserved as one placement group of a bundle per actor, so that all of it is there at once.
What was seen is printed as one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group

from ctrlray import config, models, placement
from ctrlray.clusters import Cluster, NodeType, read_cluster, read_prices
from ctrlray.quiet import quiet_ray
from tests.ray.fake_nodes import ROOT, fake_nodes, wait_until

PATIENCE_S = 120
PRESTART = "RAY_prestart_worker_first_driver"
TYPE = "type_"
"""Begins the resource by which a fake node tells of which type it is."""
Bundle = dict[str, float]


def resources(t: NodeType) -> dict[str, int]:
    return {"CPU": int(t.node.cpus), "GPU": int(t.node.gpus), TYPE + t.name: 1} | dict.fromkeys(t.node.groups, 1)


def node_type(t: NodeType) -> dict[str, object]:
    room = {"object_store_memory": 80 * 2**20}
    return {"resources": resources(t) | room, "node_config": {}, "min_workers": t.least, "max_workers": t.most}


def asked(cluster_is_fixed: bool) -> dict[str, list[Bundle]]:
    """Bundles by the job and phase that asks for them first."""
    found: dict[str, list[Bundle]] = {}
    for path in sorted(p for p in ROOT.glob("jobs/**/job.yaml") if "\nmethod:" not in p.read_text()):
        job = config.load_job(path)
        shape, rewards = models.shape_from_hub(job.model), models.reward_parameters(job.rewards)
        for least in (True,) if cluster_is_fixed else (True, False):
            for name, groups in placement.phases(placement.plan(job, shape, rewards, least=least)).items():
                made = [placement.bundle(g) for g in groups for _ in range(g.actors)]
                if made not in found.values():
                    found[f"{path.parent.name}: {name}, {'least' if least else 'most'}"] = made
    return found


def reserve(bundles: list[Bundle], timeout_s: float) -> list[tuple[Bundle, str]] | None:
    """Each bundle with the type of the node that Ray gave it; None where it was not placed in time."""
    group = placement_group(bundles, strategy="PACK")
    try:
        if not group.wait(timeout_s):
            return None
        places = placement_group_table(group)["bundles_to_node_id"]
        types = {n["NodeID"]: next(r for r in n["Resources"] if r.startswith(TYPE)) for n in ray.nodes() if n["Alive"]}
        return [(bundle, types[places[i]].removeprefix(TYPE)) for i, bundle in enumerate(bundles)]
    finally:
        remove_placement_group(group)


def too_much(cluster: Cluster) -> list[Bundle]:
    """One actor more than the nodes of a type hold: all CPUs of each."""
    largest = max(cluster.workers, key=lambda t: t.node.cpus)
    return [{"CPU": largest.node.cpus, TYPE + largest.name: 0.5} for _ in range(largest.most + 1)]


def main(folder: Path, path: Path) -> None:
    quiet_ray()
    os.environ[PRESTART] = "0"  # nothing runs on the nodes, whose CPUs are many
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the nodes are ended too
    cluster = read_cluster(path, read_prices(ROOT / "cluster" / "prices.yaml"))
    with fake_nodes(folder, {t.name: node_type(t) for t in cluster.workers}, resources(cluster.head)):
        wait_until(lambda: len(ray.nodes()) > sum(t.least for t in cluster.workers), PATIENCE_S)
        phases = asked(cluster_is_fixed=path.stem == "local")
        seen = {name: reserve(bundles, PATIENCE_S) for name, bundles in phases.items()}
        beyond = reserve(too_much(cluster), PATIENCE_S / 4)  # what can be placed took seconds
    groups = {t.name: sorted(t.node.groups) for t in (cluster.head, *cluster.workers)}
    print("SEEN " + json.dumps({"phases": seen, "beyond": beyond, "groups": groups}), flush=True)
    print(Counter(kind for placed in seen.values() if placed for _, kind in placed), file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
