"""A Ray cluster of three nodes on this machine, each with a raylet of its own, until stdin closes.

Prints its address and the process ids of the raylets beside the head's, which all of a job's actors are kept on.
"""

from __future__ import annotations

import json
import sys

GROUP = "chaos_nodes"


def main() -> None:
    """Start, say where, wait."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    others = [cluster.add_node(num_cpus=2, resources={GROUP: 1}) for _ in range(2)]
    raylets = [node.all_processes["raylet"][0].process.pid for node in others]
    print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
