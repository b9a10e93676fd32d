from __future__ import annotations

import pickle

import pytest

from ctrlray.config import EngineSettings
from ctrlray.engine.engine import Completion, Engine, EngineSpec, ends_sentence


@pytest.mark.parametrize("text", ["Go home.", 'He said "Why?"', "Stop!", "(Yes.)", "Done.\n"])
def test_sentences_end(text):
    assert ends_sentence(text)


@pytest.mark.parametrize("text", ["", "Go", "1.", "First:\n2.", "for e.g.", "ask Dr.", "in the U.S.", "a, b,"])
def test_these_are_not_ends(text):
    assert not ends_sentence(text)


class Letters:
    """A tokenizer whose ids are code points."""

    eos_token_id = 0

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


def test_cut_answer_goes_back_to_its_last_sentence():
    engine = object.__new__(Engine)
    engine._llm = type("LLM", (), {"get_tokenizer": lambda self: Letters()})()
    text = "One two. Three.\nFour fi"
    cut = engine._to_sentence(Completion(text, [ord(c) for c in text], -3.0, "length"))
    assert cut.text == "One two. Three.\n" and cut.finish_reason == "sentence"
    assert cut.token_ids == [*map(ord, "One two. Three.\n"), 0]
    whole = Completion("no end", [ord(c) for c in "no end"], -3.0, "length")
    assert engine._to_sentence(whole) == whole


def test_spec_is_small_and_says_how_it_runs():
    spec = EngineSpec("/model", "float32", 512, EngineSettings(), masked_ids=(7, 8))
    assert pickle.loads(pickle.dumps(spec)) == spec and len(pickle.dumps(spec)) < 2000
    assert spec.environment()["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "gpu_memory_utilization" not in spec.arguments()
    placed = EngineSpec("/model", "bfloat16", 512, EngineSettings(tensor_parallel=4), gpus=1)
    assert placed.arguments()["tensor_parallel_size"] == 4 and placed.arguments()["gpu_memory_utilization"] == 0.9
    assert "VLLM_CPU_OMP_THREADS_BIND" not in placed.environment()
