"""Rows that end a real vLLM engine: found, set aside with their error, and the rest goes on."""

from __future__ import annotations

import pyarrow as pa
import pytest

from ctrlray import config, pipeline, schema
from ctrlray.control import ControlSpace
from ctrlray.engine.pool import EnginePool
from ctrlray.ledger import Silent
from ctrlray.stages import generate
from ctrlray.tables import Storage, from_rows
from tests.e2e.tiny_job import tiny_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NO_SUCH_TOKEN = -7
"""vLLM lets it through to the embedding, where the forward pass breaks; what it was doing is lost."""


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory):
    root, few_at_once = tmp_path_factory.mktemp("run"), {"generate.batch_size": 8}  # so few that the row is soon alone
    return config.parse(config.Job, tiny_job(tiny, root, few_at_once), where="t")


@pytest.fixture(scope="module")
def prepared(job, private_cache, local_ray):
    current = pipeline.Run(job)
    return current.engine_spec(), current.base.renderer(ControlSpace.of(job.control))


def poisoned(ids):
    return [*ids[:-1], NO_SUCH_TOKEN, ids[-1]]


@pytest.mark.soak
def test_generation_sets_the_row_aside(job, prepared, tmp_path, monkeypatch):
    spec, renderer = prepared
    turns = [[{"role": "user", "content": f"question {i}"}] for i in range(8)]
    rows = [{"prompt_id": schema.prompt_id(t), "messages": t, "source": "s", "split": "train"} for t in turns]
    guilty = []
    expand = generate.expand_requests

    def expand_poisoned(*args):
        requests, refused = expand(*args)
        made = requests.to_pylist()
        made[5]["prompt_token_ids"] = poisoned(made[5]["prompt_token_ids"])
        guilty.append(made[5]["response_id"])
        return from_rows(made, schema.REQUESTS), refused

    monkeypatch.setattr(generate, "expand_requests", expand_poisoned)
    out = Storage(str(tmp_path))
    prompts = pa.Table.from_pylist(rows, schema=schema.PROMPTS)
    patience = generate.patience("generate", 300, generate.journals(out))
    result = generate.run(prompts, job.generate, spec, renderer, "f", out, Silent(), patience).check("generate")
    assert result.rows_in == 32 and result.rows_out == 31 and result.quarantined == {"process_died": 1}
    (bad,) = out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    assert bad["row_id"] == guilty[0]
    assert "alone with it the engine ended: " in bad["detail"] and "Error" in bad["detail"]


@pytest.mark.soak
def test_a_persistent_pool_replaces_its_engine(job, prepared):
    spec, renderer = prepared
    prompts = [renderer.render([{"role": "user", "content": f"question {i}"}]) for i in range(10)]
    prompts[3] = poisoned(prompts[3])
    with EnginePool(spec, job.generate.pool, "dying", 300) as pool:
        pool.load_weights(spec.model)
        answers = pool.generate(prompts, config.Sampling(max_tokens=4), batch_size=10)
        assert [i for i, a in enumerate(answers) if a is None] == [3]
        assert pool.generate(prompts[:3], config.Sampling(max_tokens=4), batch_size=10)
