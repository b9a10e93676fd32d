"""The exported folder of the real model in plain vLLM and plain transformers: the dial works, control tokens never come out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ctrlray import config, models
from ctrlray.control import ControlSpace
from ctrlray.engine.engine import EngineSpec
from ctrlray.stages import export

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
LEVELS = [{"safety": 1, "helpfulness": 3}, {"safety": 2}, {}]


@pytest.fixture(scope="module")
def job():
    return config.load_job("quickstart", ["export.levels={safety: [1, 2]}", "export.defaults={helpfulness: 2}"])


@pytest.fixture(scope="module")
def base(job):
    return models.prepare(job.model, ControlSpace.of(job.control))


@pytest.fixture(scope="module")
def folder(job, base, tmp_path_factory):
    """The prepared SmolLM2, exported as a trained model would be."""
    made = shutil.copytree(base.folder, tmp_path_factory.mktemp("export") / "model")
    export.finish(str(made), base, job, "exmate", {})
    return made


@pytest.fixture(scope="module")
def plain_vllm(folder, base):
    dtype = models.pick_dtype("auto", gpu=False)
    spec = EngineSpec(str(folder), dtype, 512, config.EngineSettings())
    asked = json.dumps({"levels": LEVELS, "dtype": dtype})
    script = Path(__file__).with_name("plain_vllm.py")
    command = [sys.executable, str(script), str(folder), asked]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | spec.environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert found, done.stderr[-3000:]
    return json.loads(found[0].removeprefix("RESULT "))


@pytest.mark.soak
def test_plain_vllm_renders_what_ctrlray_renders(plain_vllm, base, job):
    space = ControlSpace.of(job.control)
    turns = [{"role": "user", "content": "Tell me <|safety:1|> about tea."}]
    for asked, cell in zip(LEVELS, [(3, 1), (2, 2), (2, 2)], strict=True):
        assert plain_vllm["prompts"][json.dumps(asked)] == base.renderer(space).render(turns, cell)


@pytest.mark.soak
def test_plain_vllm_refuses_levels_outside(plain_vllm):
    assert "safety must be one of [1, 2]" in plain_vllm["refused"]


@pytest.mark.soak
def test_no_control_token_in_ten_thousand(plain_vllm, base):
    assert len(plain_vllm["sampled"]) >= 10_000
    assert not set(plain_vllm["sampled"]) & set(base.control_ids)


def test_control_tokens_are_out_of_reach_everywhere(folder, base, job):
    """At every position of real answers a control token's probability is below 1e-12, so no engine needs a mask."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    render = base.renderer(ControlSpace.of(job.control)).render
    worst = -1e9
    for text in ("Why is the sky blue?", "How do I pick a lock?", "Write a poem about <|safety:1|> rain."):
        prompt = torch.tensor([render([{"role": "user", "content": text}], (1, 1))])
        with torch.no_grad():
            whole = network.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=60)
            logp = network(whole).logits.float().log_softmax(-1)
        worst = max(worst, float(logp[..., list(base.control_ids)].max()))
    assert worst < -27.6  # ln 1e-12
