"""A Ray cluster of three nodes on this machine, each with a raylet of its own, until stdin closes.

Prints its address and the process ids of the raylets beside the head's, which all of a job's actors are kept on.
"""

from __future__ import annotations

import json
import select
import sys

GROUP = "chaos_nodes"
_POLL_S = 0.1


def main() -> None:
    """Start, say where, wait."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    raylets = [cluster.add_node(num_cpus=2, resources={GROUP: 1}).all_processes["raylet"][0].process for _ in range(2)]
    print(json.dumps({"address": cluster.address, "raylets": [r.pid for r in raylets]}), flush=True)
    while not select.select([sys.stdin], [], [], _POLL_S)[0]:
        for raylet in raylets:
            raylet.poll()  # one that was killed is a zombie until then, and its workers take a zombie for alive


if __name__ == "__main__":
    main()
