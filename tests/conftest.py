from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# a busy machine may take long over one example
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# for the S3 server that tests start; Ray's workers inherit them
os.environ.setdefault("AWS_ACCESS_KEY_ID", "testing")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "testing")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# a private cache would have DeepSpeed's small C++ extension compiled again for every session
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
_PYTHON = f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_CACHE / "torch_extensions" / _PYTHON))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model folder."""
    from tests.fakes import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own for what is made of tiny models."""
    before, made = os.environ.get("XDG_CACHE_HOME"), tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(made)
    yield made
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium. Of one module: while its driver runs, this thread has an event loop, and `asyncio.run` refuses."""
    from tests.browser import chromium

    with chromium() as started:
        yield started


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """`s3://runs/{}?...` of an S3 server in this process."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    where = {"endpoint_override": f"{host}:{port}", "scheme": "http", "region": "us-east-1"}
    fs.S3FileSystem(allow_bucket_creation=True, **where).create_dir("runs")
    yield "s3://runs/{}?allow_bucket_creation=true&" + "&".join(f"{k}={v}" for k, v in where.items())
    server.stop()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of two CPUs for the whole test session."""
    import ray

    from ctrlray.quiet import quiet_ray

    quiet_ray()
    root = str(Path(__file__).parent.parent)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}},
    )
    yield
    ray.shutdown()
