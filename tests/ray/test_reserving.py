"""What every job asks for, reserved by Ray itself on fake nodes of the types in each cluster file."""

from __future__ import annotations

import pytest

from tests.ray.fake_nodes import ROOT, told

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
FILES = ["aws.yaml", "gcp.yaml", "local.yaml", "kuberay/raycluster.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_ray_finds_nodes_for_every_phase_of_every_job(name, tmp_path):
    seen = told("tests.ray.reserving", str(tmp_path), str(ROOT / "cluster" / name), timeout_s=800)
    assert len(seen["phases"]) > 5
    for phase, placed in seen["phases"].items():
        assert placed is not None, f"{phase}: not placed"
        for bundle, kind in placed:
            assert set(bundle) - {"CPU", "GPU"} <= set(seen["groups"][kind]), f"{phase}: {bundle} on {kind}"
    assert seen["beyond"] is None, "more than the file's nodes hold was placed, so these nodes are not the file's"
