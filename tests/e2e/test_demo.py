"""The shipped dial on the embedded model: its folder, its codes, and a conversation with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from ctrlray import demo, models
from ctrlray.control import ControlSpace, Renderer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TURNS = [{"role": "user", "content": "How do I clean a drain? <|safety:1|>"}]


@pytest.fixture(scope="module")
def folder():
    return demo.folder()


@pytest.fixture(scope="module")
def base():
    job = demo.job_of(json.loads((demo.asset() / demo.DIAL).read_text()))
    return models.prepare(job.model, ControlSpace.of(job.control)), ControlSpace.of(job.control)


def test_it_renders_as_the_base_that_it_was_trained_on(folder, base):
    from transformers import AutoTokenizer

    prepared, space = base
    tokenizer, renderer = AutoTokenizer.from_pretrained(folder), prepared.renderer(space)
    shipped = Renderer(tokenizer, space, prepared.base_template)
    for cell in space.cells():
        ids = renderer.render(TURNS, cell)
        named = dict(zip(space.names, cell, strict=True))
        assert shipped.render(TURNS, cell) == ids
        assert tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False, **named) == ids
        assert len(set(ids) & set(prepared.control_ids)) == len(space.names)


def test_its_codes_move_the_first_word_further_than_the_bases_do(folder, base):
    from transformers import AutoModelForCausalLM

    prepared, space = base
    low, high = space.cells()[0], space.cells()[-1]
    prompts = [torch.tensor([prepared.renderer(space).render(TURNS, cell)]) for cell in (low, high)]

    def apart(path):
        network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            first, second = (network(p).logits[0, -1].softmax(-1) for p in prompts)
        return float((first - second).abs().sum() / 2)

    assert apart(folder) > max(0.1, 1.5 * apart(prepared.folder))


@pytest.mark.soak
def test_a_line_from_a_pipe_is_answered(folder):
    command = [sys.executable, "-m", "ctrlray", "chat", "--demo", "--max-tokens", "16"]
    done = subprocess.run(command, input="What is tea?\n", capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() and "<|" not in done.stdout and "making the demo dial" not in done.stderr
    assert "[WARNING]" not in done.stdout and done.stderr.splitlines() == ["starting; an engine takes about a minute"]
