from __future__ import annotations

import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ctrlray.config import EngineSettings
from ctrlray.engine.engine import Completion, Engine, EngineSpec, ends_sentence
from ctrlray.engine.transfer import BACKEND, Offer, Ranks
from ctrlray.errors import ClusterError, ConfigError


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
    logprobs = [-0.1 * i for i in range(len(text))]
    cut = engine._to_sentence(Completion(text, [ord(c) for c in text], -3.0, "length", logprobs))
    assert cut.text == "One two. Three.\n" and cut.finish_reason == "sentence"
    assert cut.token_ids == [*map(ord, "One two. Three.\n"), 0]
    assert cut.logprobs == logprobs[:16] and cut.logprob_sum == -3.0  # none for the 0, which was not sampled
    whole = Completion("no end", [ord(c) for c in "no end"], -3.0, "length", logprobs[:6])
    assert engine._to_sentence(whole) == whole


def test_spec_is_small_and_says_how_it_runs():
    spec = EngineSpec("/model", "float32", 512, EngineSettings(), masked_ids=(7, 8))
    assert pickle.loads(pickle.dumps(spec)) == spec and len(pickle.dumps(spec)) < 2000
    assert spec.environment()["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "gpu_memory_utilization" not in spec.arguments()
    placed = EngineSpec("/model", "bfloat16", 512, EngineSettings(tensor_parallel=4), gpus=1)
    assert placed.arguments()["tensor_parallel_size"] == 4 and placed.arguments()["gpu_memory_utilization"] == 0.9
    assert "VLLM_CPU_OMP_THREADS_BIND" not in placed.environment()


def test_what_is_counted_and_which_log_probs_come_back_are_the_recipe_s():
    plain = EngineSpec("/model", "float32", 512, EngineSettings()).arguments()
    assert plain["disable_log_stats"] and plain["logprobs_mode"] == "raw_logprobs"
    spec = EngineSpec("/model", "float32", 512, EngineSettings(), log_stats=True, processed_logprobs=True)
    assert not spec.arguments()["disable_log_stats"] and spec.arguments()["logprobs_mode"] == "processed_logprobs"


class QKVParallelLinear(nn.Module):
    """As much of vLLM's as the proof reads."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2), requires_grad=False)
        self.output_partition_sizes, self.num_kv_head_replicas = [2, 1, 1], 1


class LLM:
    """vLLM with one layer: loads what it is handed, up to its `limit`, and counts."""

    def __init__(self, limit=99):
        self.network, self.limit, self.cached, self.running = QKVParallelLinear(), limit, True, False

    def collective_rpc(self, call):
        return [call(self)]

    def reload_weights(self, weights_iterator):
        parts = dict(itertools.islice(weights_iterator, self.limit))
        if len(parts) == 3:
            self.network.weight.data = torch.cat([parts[f"l.0.{n}_proj.weight"] for n in "qkv"])

    def reset_prefix_cache(self):
        self.cached = self.running
        return not self.running

    def apply_model(self, call):
        return [call(self.network)]

    def get_metrics(self):
        pairs = [("vllm:prefix_cache_queries", 30), ("vllm:prefix_cache_hits", 12), ("vllm:other", 5)]
        return [SimpleNamespace(name=n, value=v) for n, v in pairs]


def engine(tmp_path, llm, **recipe):
    sizes = {"q": 2, "k": 1, "v": 1}
    save_file({f"l.0.{n}_proj.weight": torch.ones(s, 2) for n, s in sizes.items()}, tmp_path / "model.safetensors")
    made = object.__new__(Engine)
    made.spec, made.weights_version, made._llm = EngineSpec(str(tmp_path), "float32", 64, EngineSettings(), **recipe), 0, llm
    return made


ADAPTER = {"l.0.q_proj.weight.lora_A": torch.ones(1, 2), "l.0.q_proj.weight.lora_B": torch.ones(2, 1)}
CARD = {"lora_scale": 0.5, "control_ids": []}


def test_an_adapter_is_merged_into_the_engine_s_own_checkpoint(tmp_path):
    """8 ones, and half a one more on each of q's four."""
    llm = LLM()
    made = engine(tmp_path, llm).load_adapter(ADAPTER, CARD, 7)
    assert made.version == 7 and made.checksums == {"first qkv": 10.0, "last qkv": 10.0}
    assert all(p.holds for p in made.probes.values()) and not llm.cached and made.merge_s > 0 and made.reload_s > 0
    assert engine(tmp_path, llm).load_adapter(ADAPTER, CARD, 8).checksums["first qkv"] == 10.0  # on the base, not on the last


def test_an_adapter_that_does_not_fit_leaves_the_engine_as_it_was(tmp_path):
    untouched = engine(tmp_path, None)
    with pytest.raises(ConfigError, match=r"l\.5\.q_proj\.weight\.rows"):
        untouched.load_adapter({"l.5.q_proj.weight.rows": torch.ones(1, 2)}, CARD, 1)
    assert untouched.weights_version == 0


def test_weights_that_the_engine_did_not_take_or_still_has_prefixes_of_are_errors(tmp_path):
    deaf = engine(tmp_path, LLM(limit=2))
    with pytest.raises(ClusterError, match=r"took no new weights for \['l\.0\.v_proj\.weight'\]"):
        deaf.load_adapter(ADAPTER, CARD, 1)
    busy = LLM()
    busy.running = True
    with pytest.raises(ClusterError, match="kept cached prefixes"):
        engine(tmp_path, busy).load_adapter(ADAPTER, CARD, 1)
    assert deaf.weights_version == 0


def test_an_engine_that_keeps_its_old_weights_is_found_out(tmp_path):
    llm = LLM()
    llm.reload_weights = lambda weights_iterator: list(weights_iterator)
    probes = engine(tmp_path, llm).load_adapter(ADAPTER, CARD, 1).probes
    assert probes["first qkv"].found == 0.0 and probes["first qkv"].expected == 10.0 and not probes["first qkv"].holds


def test_a_folder_s_weights_must_have_the_engine_s_names(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "base").mkdir()
    save_file({f"l.0.{n}_proj.weight": torch.full((s, 2), 2.0) for n, s in {"q": 2, "k": 1, "v": 1}.items()},
              tmp_path / "other" / "m.safetensors")  # fmt: skip
    made = engine(tmp_path / "base", LLM())
    held = made.load_weights(str(tmp_path / "other"), 3)
    assert held.checksums["last qkv"] == 16.0 and made.weights_version == 3
    save_file({"l.0.q_proj.weight": torch.ones(2, 2)}, tmp_path / "other" / "m.safetensors")
    with pytest.raises(ConfigError, match=r"'l\.0\.k_proj\.weight'.*on one side only"):
        made.load_weights(str(tmp_path / "other"), 4)


def test_cache_hits_are_counted_when_the_recipe_says_so(tmp_path):
    assert engine(tmp_path, LLM(), log_stats=True).cache_hits() == (30, 12)
    assert engine(tmp_path, None).cache_hits() == (0, 0)


class Receiver(LLM):
    """Takes what a trainer sends: the tensors that it was built with."""

    def __init__(self, sent):
        super().__init__()
        self.sent, self.calls, self.version = sent, [], "default"

    def shutdown_weight_transfer_engine(self):
        self.calls.append("leave")

    def init_weight_transfer_engine(self, request):
        self.calls.append(("join", request["init_info"]))

    def start_weight_update(self):
        self.calls.append("start")

    def update_weights(self, request):
        self.calls.append(("take", request["update_info"]))
        self.reload_weights(iter(self.sent.items()))

    def finish_weight_update(self, weight_version):
        self.calls.append("finish")
        self.version = weight_version

    def get_weight_version(self):
        return self.version


SENT = {f"l.0.{n}_proj.weight": torch.full((s, 2), 2.0) for n, s in {"q": 2, "k": 1, "v": 1}.items()}
OFFER = Offer(5, Ranks(2, 1), "10.0.0.7", 4711, "float32", list(SENT), [list(t.shape) for t in SENT.values()])


def test_an_engine_takes_weights_from_a_trainer(tmp_path):
    llm = Receiver(SENT)
    made = engine(tmp_path, llm)
    found = made.receive_weights(OFFER, 1)
    assert (found.version, found.sums, made.weights_version) == (5, [{"first qkv": 16.0, "last qkv": 16.0}], 5)
    assert llm.calls == ["leave", ("join", OFFER.joining(1)), "start", ("take", OFFER.contents()), "finish"]
    assert not llm.cached and found.seconds > 0
    llm.calls.clear()
    made.receive_weights(OFFER._replace(version=6, port=0), 1)
    assert llm.calls == ["start", ("take", OFFER.contents()), "finish"] and made.weights_version == 6  # in the group that stands


@pytest.mark.parametrize("names", [list(SENT)[:2], [*SENT, "l.1.q_proj.weight"]])
def test_weights_of_other_names_are_refused_before_anything_is_replaced(tmp_path, names):
    llm = Receiver(SENT)
    with pytest.raises(ConfigError, match=r"trainer's weights are not those of .*on one side only"):
        engine(tmp_path, llm).receive_weights(OFFER._replace(names=names), 0)
    assert llm.calls == [] and llm.cached


def test_a_recipe_names_the_backend_that_weights_come_by():
    assert "weight_transfer_config" not in EngineSpec("/model", "bfloat16", 512, EngineSettings(), gpus=1).arguments()
    spec = EngineSpec("/model", "bfloat16", 512, EngineSettings(), gpus=1, transfer=BACKEND)
    assert spec.arguments()["weight_transfer_config"] == {"backend": "nccl"}
