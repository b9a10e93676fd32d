"""Every metric on the endpoint of a real Ray, as Prometheus reads it, from a driver and from an actor that was restarted."""

from __future__ import annotations

import contextlib
import os
import re
import time
import urllib.request
from typing import Any

import pytest
import ray

from ctrlray import telemetry
from ctrlray.actors import ActorPool, Words
from ctrlray.config import Pool
from ctrlray.ledger import Silent
from ctrlray.telemetry import METRICS, Metered, Where, at, exported, record

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]
WORDS = Words("reward actor", "a", "answers", "score.pool.max_restarts", "score.batch_size")


class Mortal:
    """Ends its process on its first row."""

    def ready(self) -> bool:
        return True

    def work(self, marker: str) -> None:
        if not os.path.exists(marker):
            open(marker, "x").close()
            os._exit(1)


@ray.remote(max_restarts=1, max_task_retries=1, num_cpus=0)
class Restarted:
    """As Ray Data's actors are restarted: by Ray, in a process that knows of it."""

    def __init__(self, marker: str, where: Where) -> None:
        self._marker = marker
        telemetry.record_if_restarted(where, "engine")

    def work(self) -> int:
        if not os.path.exists(self._marker):
            open(self._marker, "x").close()
            os._exit(1)
        return os.getpid()


def scraped(wanted: set[str]) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Labels and value of each series of the run r7 on this node, once all that are wanted are there, restarts of both actors.

    Other tests on this Ray have left series of their own.
    """
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    end = time.monotonic() + 90
    while True:
        text = ""
        with contextlib.suppress(OSError):  # one look of many
            text = urllib.request.urlopen(url, timeout=20).read().decode()
        lines = re.findall(r"^(ray_ctrlray_\w+){(.*)} (\S+)$", text, re.M)
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for name, labels, value in (line for line in lines if 'run="r7"' in line[1]):
            found.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
        both = len(found.get(exported("ctrlray_actor_restarts"), [])) >= 2
        if (both and wanted <= found.keys()) or time.monotonic() > end:
            return found
        time.sleep(1)


def test_all_of_them_are_there_with_their_labels(tmp_path: Any) -> None:
    with at(str(tmp_path / "r7"), "score"):
        meter = Metered(Silent())
        meter.total(5)
        meter.advance(2, 30)
        meter.advance(2, 12)
        pool = Pool(cpus=0.1, max_restarts=1)
        with ActorPool(Mortal, (), pool, "t-telemetry", WORDS, 120.0) as actors:
            left_out = actors.run(1, 1, lambda a, rows: a.work.remote(str(tmp_path / "one")), lambda rows, made: None)
        assert not left_out
    ray.get(Restarted.remote(str(tmp_path / "two"), Where("r7", "generate")).work.remote(), timeout=120)
    by_hand = METRICS.keys() - {"ctrlray_rows_wanted", "ctrlray_rows_done", "ctrlray_tokens", "ctrlray_actor_restarts"}
    for i, name in enumerate(sorted(by_hand)):
        record(Where("r7", "hand"), name, i + 0.5, **{label: f"a-{label}" for label in METRICS[name].labels})
    found = scraped({exported(name) for name in METRICS})

    def mine(name: str) -> list[tuple[dict[str, str], float]]:
        labels = ("run", "stage", *METRICS[name].labels)
        return sorted(
            (({k: tags[k] for k in labels}, value) for tags, value in found.get(exported(name), []) if tags["run"] == "r7"),
            key=lambda pair: pair[0]["stage"],
        )

    for i, name in enumerate(sorted(by_hand)):
        labels = {"run": "r7", "stage": "hand"} | {label: f"a-{label}" for label in METRICS[name].labels}
        assert mine(name) == [(labels, i + 0.5)]
    here = {"run": "r7", "stage": "score"}
    assert mine("ctrlray_rows_wanted") == [(here, 5.0)] and mine("ctrlray_rows_done") == [(here, 4.0)]
    assert mine("ctrlray_tokens") == [(here, 42.0)]
    assert mine("ctrlray_actor_restarts") == [
        ({"run": "r7", "stage": "generate", "actor": "engine"}, 1.0),
        (here | {"actor": "reward actor"}, 1.0),
    ]
