"""Memory by hand: shapes against published counts, engines on GPUs, ZeRO's shards, what loading takes."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources

import pytest

from ctrlray import config, memory
from ctrlray.memory import Shape, learner

KNOWN = json.loads((resources.files("ctrlray") / "assets" / "models.json").read_text())
GIB = 2**30
SMALL = Shape(parameters=2**30, layers=4, hidden=0, linear=2**20, values=256)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496),
        ("Ray2333/gpt2-large-helpful-reward_model", 774_030_080),
        ("embedded", 134_515_008 + 49152 * 576),  # the card's, and the table that the prepared base unties
    ],
)
def test_known_models_have_their_published_parameters(name, published):
    assert memory.parameters_of(KNOWN[name]) == pytest.approx(published, rel=2e-6)  # Qwen's query and key norms are left out


def job(*overrides):
    return config.load_job("quickstart", ["generate.pool.gpus=1", "train.gpus_per_worker=1", *overrides])


def test_cache_of_a_token_by_hand():
    # Llama 2 7B: keys and values of 32 blocks, 4096 channels, 2 bytes: half a MiB a token
    assert Shape.of(KNOWN["meta-llama/Llama-2-7b-chat-hf"]).cache_bytes(2) == 512 * 1024
    # grouped attention: 8 of 64 heads of 128 channels
    assert Shape.of(KNOWN["meta-llama/Llama-3.3-70B-Instruct"]).cache_bytes(2) == 2 * 80 * 8 * 128 * 2


def test_an_engine_s_gpu_by_hand():
    made = job("model.max_context=1024", "generate.engine.tensor_parallel=2")
    held = memory.engine(made, SMALL)
    assert held.weights == pytest.approx(1)  # 2^30 weights of 2 bytes over two GPUs
    assert held.cache == pytest.approx(1024 * (2 * 4 * 256 * 2) / 2 / GIB)
    assert held.total == pytest.approx(held.weights + held.cache + memory.CONTEXT_GIB)
    assert memory.engine_gpu_gib(made, SMALL) == pytest.approx(held.total / 0.9)
    # 0.9 of 10 GiB, less weights and context, of both GPUs
    assert memory.engine_room(made, SMALL, 10) == pytest.approx(2 * (9 - 1 - memory.CONTEXT_GIB))
    assert memory.engine_room(made, SMALL, 2) == 0


def test_an_engine_on_processors_holds_the_logits_of_the_longest_row():
    made = config.load_job("quickstart", ["model.max_context=1000", "model.dtype=bfloat16", "generate.engine.kv_cache_gib=1"])
    held = memory.engine(made, replace(SMALL, vocabulary=50_000))
    # 2 bytes as the model gives them, 4 in float32, 4 as log-probs
    assert held.activations == pytest.approx(1000 * 50_000 * 10 / GIB)
    assert held.total == pytest.approx(2 + 1 + held.activations + memory.ENGINE_PROCESS_GIB)
    assert Shape.of(KNOWN["embedded"]).vocabulary == 49152


def test_a_training_worker_holds_a_row_as_long_as_the_context():
    short, long = (config.load_job("quickstart", [f"model.max_context={n}", "train.micro_batch_tokens=768"]) for n in (512, 1536))
    wide = Shape.of(KNOWN["embedded"])
    by_tokens = [memory.worker(j, wide).activations - memory.LOGITS_AT_ONCE * 12 / GIB for j in (short, long)]
    assert by_tokens[1] == pytest.approx(2 * by_tokens[0])


def test_what_an_engine_prefills_counts_by_width():
    wide = SMALL.__class__(2**30, 4, 4096, 2**20, 256)
    more = memory.engine(job(), wide).activations
    assert more == pytest.approx(8 * 8192 * 4096 * 2 / GIB)  # eight bfloat16 values per token and channel: half a GiB


def gpu(**settings):
    return config.Train(micro_batch_tokens=64, gpus_per_worker=1, **settings)


def states(train):
    held = learner(train, SMALL)
    return pytest.approx([held.weights, held.gradients, held.optimizer])


def test_all_weights_on_a_gpu_take_sixteen_bytes_each_sharded_by_stage():
    # Rajbhandari et al., figure 1: 2 + 2 + 12 bytes; over 4 ranks the optimizer from stage 1, gradients from 2, weights from 3
    full = {"lora": None, "workers": 4}
    assert states(gpu(**full)) == [2, 2, 12]
    assert states(gpu(**full, zero_stage=1)) == [2, 2, 3]
    assert states(gpu(**full, zero_stage=2)) == [2, 0.5, 3]
    gathered = memory.LIVE_PARAMETERS * 2 / GIB
    assert [0.5 + gathered, 0.5, 3] == states(gpu(**full, zero_stage=3))


def test_an_adapter_on_a_gpu_by_hand():
    # rank 16 on 4 blocks of 2^20: 2^26 weights; float32 gradients 4 bytes, Adam 8 and the adapter itself 4
    held = learner(gpu(lora=config.LoRA(rank=16)), SMALL)
    assert (held.weights, held.gradients, held.optimizer) == pytest.approx((2, 0.25, 0.75))


def test_offloading_moves_states_to_the_host_and_nothing_disappears():
    made = config.load_job("quickstart", ["train.lora=null", "train.gpus_per_worker=1", "train.zero_stage=1", "train.workers=2"])
    kept = memory.worker(made, SMALL)
    moved = made.model_copy(update={"train": made.train.model_copy(update={"offload": "optimizer"})})
    assert memory.worker(moved, SMALL).optimizer == 0
    host = memory.worker_host_gib(moved, SMALL) - memory.worker_host_gib(made, SMALL)
    assert host == pytest.approx(kept.optimizer) and host == pytest.approx(6)


def test_weights_load_whole_before_they_are_sharded():
    sharded = learner(gpu(workers=8, zero_stage=3), SMALL)
    assert sharded.loading == pytest.approx(2) and sharded.total >= 2 + memory.CONTEXT_GIB
    assert learner(gpu(lora=None, workers=8, zero_stage=3), SMALL).loading == pytest.approx(4)  # float32 until DeepSpeed casts


def test_ppo_keeps_a_reference_and_a_critic_where_lora_does_not_share_the_network():
    def held(lora, advantage, start="base"):
        chain = f"[{{type: exmate}}, {{type: ppo, advantage: {advantage}, start: {start}}}]"
        raw = ["train.gpus_per_worker=1", f"train.lora={lora}", f"train.objectives={chain}"]
        return memory.worker(config.load_job("quickstart", raw), SMALL)

    adapter = held("{rank: 16}", "rloo")
    assert held("{rank: 16}", "gae").optimizer == pytest.approx(2 * adapter.optimizer)  # the critic is a second adapter
    assert held("null", "rloo").weights == pytest.approx(4) and held("null", "gae").weights == pytest.approx(6)
    assert held("null", "rloo", "exmate").weights == pytest.approx(6)  # the base that the start was trained from
    assert held("{rank: 16}", "rloo", "exmate") == adapter


def test_the_host_holds_the_weights_while_gpus_load_them():
    made = job("generate.engine.tensor_parallel=2")
    assert memory.engine_host_gib(made, SMALL) == pytest.approx(2 * memory.ENGINE_PROCESS_GIB + 2)
    assert memory.worker_host_gib(made, SMALL) == pytest.approx(memory.WORKER_PROCESS_GIB + 2)
    assert memory.preparing_gib(made, SMALL) == pytest.approx(memory.WORKER_PROCESS_GIB + 2)
