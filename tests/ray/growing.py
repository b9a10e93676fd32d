"""Run by test_growth in a process of its own: a cluster of one CPU that grows, or does not, to the two that a job needs."""

import sys

import ray
from ray.cluster_utils import Cluster

from ctrlray import config, pipeline
from ctrlray.patience import Background
from ctrlray.quiet import quiet_ray


class Said:
    def note(self, text):
        print(f"note: {text}", flush=True)


def main(model, grows, timeout_s):
    quiet_ray()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    raw = {
        "name": "t",
        "model": {"name": model},
        "control": {"attributes": [{"name": "a"}]},
        "rewards": [{"type": "function", "target": "tests.fakes:length_reward", "attributes": ["a"]}],
        "train": {"workers": 2},
        "cluster": {"autoscale_timeout_s": float(timeout_s)},
    }
    job = config.parse(config.Job, raw, where="t")
    waiting = Background(lambda: pipeline._await_fit(job, Said(), "train"))
    try:
        if grows == "grows" and not waiting.over(3):
            cluster.add_node(num_cpus=1)
        while not waiting.over(1):
            pass
        print("fits")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
