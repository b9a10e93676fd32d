"""Placement: sums and memory by hand, packing as a property, and advice that fits when it is followed."""

import random
import re

import pytest

from ctrlray import config
from ctrlray.memory import Shape, learner
from ctrlray.placement import Group, Node, bundles, misfit, of_stage, packs, phases, plan

# SmolLM2-135M's config, without its control tokens
SMOLLM2 = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}


def worker_gib(train, shape, dtype="auto"):
    return learner(train, shape, dtype).total


def load(*overrides):
    return config.load_job("quickstart", overrides)


def test_parameters_by_hand():
    shape = Shape.of(SMOLLM2)
    # the model card's 134,515,008, and the table that the prepared base unties
    assert shape.parameters == 134_515_008 + 49152 * 576
    # q and o: 576 + 576, k and v: 576 + 192, three sides of the MLP: 576 + 1536
    assert shape.linear == 2 * 1152 + 2 * 768 + 3 * 2112


def test_worker_memory_by_hand():
    train = config.Train(lora=None, micro_batch_tokens=64, workers=2, zero_stage=2)
    shape = Shape(parameters=2**28, layers=1, hidden=64, linear=0)
    # float32 weights 1 GiB; Adam's 8 bytes and the gradients' 4 halved over two ranks: 1 + 0.5 GiB; process 1.2
    activations = 2 * 34 * 64 * 64 * 2  # 34 bytes at 2 a value, 68 at 4; twice for what the allocator keeps
    logits = 2**23 * (4 + 4 + 4)  # in float32: logits, chances, and these again in the weights' dtype
    assert worker_gib(train, shape) == pytest.approx(1.2 + 1 + 1 + 0.5 + (activations + logits) / 2**30)
    spared = train.model_copy(update={"activation_checkpointing": True, "micro_batch_tokens": 4096})
    # four blocks' inputs and one block's activations, 17 values each, instead of four times 17
    assert worker_gib(spared, Shape(2**28, 4, 64, 0)) == pytest.approx(3.7 + (2 * 21 * 4096 * 64 * 4 + logits) / 2**30)
    sharded = worker_gib(train.model_copy(update={"zero_stage": 3}), shape)
    assert sharded == pytest.approx(worker_gib(train, shape) - 0.5)


def test_the_quickstart_fits_on_two_cores():
    shape = Shape.of(SMOLLM2)
    assert misfit(load(), plan(load(), shape), [Node(2, 0, 8)], shape) is None
    assert misfit(load(), plan(load()), [Node(2, 0, 0.9)]) is not None  # processes alone need more
    # 8 GiB are free, of which Ray keeps 30% for its object store; the reward's 135M weights and its second table are float32
    counted = plan(load(), shape, {"embedded": shape.parameters})
    assert misfit(load(), counted, [Node(2, 0, 8 * 0.7)], shape, {"embedded": shape.parameters}) is None


def actors(operator, *overrides):
    groups = [g for g in plan(load(*overrides)) if g.operator == operator]
    assert len({g.actors for g in groups}) <= 1  # as many beside the engines as for the grid, when these are gone
    return groups[0].actors if groups else 0


def test_more_prompts_than_one_part_take_actors_that_render_them():
    assert actors("request writer", "prompts.train=4000", "prompts.eval=96") == 0
    assert actors("request writer", "prompts.train=4000", "prompts.eval=97") == 1
    assert actors("request writer", "prompts.train=5000", "generate.pool.max_size=64") == 3


def test_many_engines_take_more_actors_that_write_scores():
    assert actors("score writer") == actors("score writer", "generate.pool.max_size=31") == 1
    assert actors("score writer", "generate.pool.max_size=64") == 3


TENSOR_PARALLEL = ["generate.pool.gpus=1", "generate.engine.tensor_parallel=4"]
THREE_ENGINES = ["generate.pool.min_size=3", "generate.pool.max_size=3", "generate.pool.cpus=1"]
BIG_WORKERS = ["train.workers=3", "train.cpus_per_worker=1.5"]


@pytest.mark.parametrize(
    "overrides, nodes, expected",
    [
        (["train.workers=3"], [Node(2, 0, 16)], "train needs 3 CPUs, the cluster has 2: 1 too few.*fits: train.workers=2. Or"),
        (TENSOR_PARALLEL, [Node(8, 2, 64)], "needs 4 GPUs, the cluster has 2: 2 too few.*No smaller pool fits: add a node with"),
        (THREE_ENGINES, [Node(2, 0, 16)], "score needs 3.3 CPUs.*; evaluate needs.*max_size=1, generate.pool.min_size=1"),
        (THREE_ENGINES, [Node(2.9, 0, 32)], "fits: generate.pool.max_size=2, generate.pool.min_size=2. Or"),
        (["train.cpus_per_worker=3"], [Node(2, 0, 16)] * 2, "has worker actors of 3 CPUs.*fits: train.cpus_per_worker=1.5"),
        (["train.workers=2"], [Node(4, 0, 6)], r"GiB of memory, the cluster has 6: .*fits: train.workers=1"),
        (["train.micro_batch_tokens=4000"], [Node(2, 0, 6)], "GiB of memory, the cluster has 6: .*micro_batch_tokens=1000. Or"),
        (BIG_WORKERS, [Node(2, 0, 16)] * 2, "needs 4.5 CPUs.*train.workers=2"),
        (["train.cpus_per_worker=1.5"], [Node(1, 0, 9)] * 3, "more than any node has.*worker=0.75"),
        (BIG_WORKERS, [Node(2.9, 0, 16)] * 2, "does not pack onto the 2 nodes.*train.workers=2"),
    ],
)
def test_a_refusal_names_the_amount_and_the_smallest_change(overrides, nodes, expected):
    job, shape = load(*overrides), Shape.of(SMOLLM2)
    found = misfit(job, plan(job, shape), nodes, shape)
    assert found is not None
    assert re.search(expected, found), found


@pytest.mark.parametrize("seed", range(20))
def test_following_the_advice_fits(seed):
    rng = random.Random(seed)
    job = load(f"train.workers={rng.randint(1, 6)}", f"score.pool.min_size={rng.randint(1, 3)}", "score.pool.max_size=3")
    nodes = [Node(rng.choice([1, 2, 4]), 0, rng.choice([6, 8, 16])) for _ in range(rng.randint(1, 3))]
    shape = Shape.of(SMOLLM2)
    for _ in range(5):  # one phase after the other
        found = misfit(job, plan(job, shape), nodes, shape)
        if found is None or "No smaller pool" in found:
            break
        changes = found.split("fits: ")[1].split(". Or")[0].split(", ")
        job = load(f"score.pool.max_size={job.score.pool.max_size}", *_settings(job), *changes)
    assert found is None or "No smaller pool" in found


def _settings(job):
    return [f"train.workers={job.train.workers}", f"score.pool.min_size={job.score.pool.min_size}"]


@pytest.mark.parametrize("seed", range(20))
def test_what_packs_still_packs_on_more_nodes(seed):
    rng = random.Random(seed)
    groups = [Group("p", "o", rng.randint(1, 3), rng.random() * 2, rng.choice([0, 1]), rng.random() * 4) for _ in range(3)]
    nodes = [Node(rng.randint(1, 4), rng.randint(0, 2), rng.randint(2, 8)) for _ in range(3)]
    totals = [sum(g.actors * amount for g in groups for amount in [g[3 + i]]) for i in range(3)]
    if packs(groups, nodes):
        assert packs(groups, [*nodes, Node(1, 1, 1)])
        assert all(t <= sum(n[i] for n in nodes) + 1e-6 for i, t in enumerate(totals))


def test_bundles_are_those_of_the_largest_phase():
    job = load("train.workers=4", "train.gpus_per_worker=1")
    assert bundles(plan(job)) == [{"CPU": 1.0, "GPU": 1.0}] * 4


@pytest.mark.parametrize("seed", range(20))
def test_where_each_phase_fits_what_is_asked_for_fits(seed):
    """An autoscaler that cannot hold all of a request starts no node at all."""
    rng = random.Random(seed)
    groups = [
        Group(f"phase {p}", "o", rng.randint(1, 8), 1, rng.choice([0, 0.5, 1]), 1, nodes=rng.choice([None, "a", "b"]))
        for p in range(3)
        for _ in range(2)
    ]
    made = bundles(groups)
    for room in (None, "a", "b"):
        asked = [b for b in made if {*b} - {"CPU", "GPU"} == ({room} if room else set())]
        gpus = [sum(g.actors * g.gpus for g in mine if g.nodes == room) for mine in phases(groups).values()]
        assert sum(b.get("GPU", 0) for b in asked) == max(gpus)


def test_judges_are_waited_for_with_the_engines_and_a_merge_needs_no_engine():
    job = load("generate.pool.gpus=1", "generate.pool.nodes=generation", "score.pool.nodes=reward")
    judge = config.FunctionReward(type="function", target="m:f", attributes=("helpfulness", "safety"), judge=True)
    groups = plan(job.model_copy(update={"rewards": (*job.rewards, judge)}))
    asked = bundles(of_stage(groups, "evaluate"))
    assert {"generation", "reward"} <= {name for b in asked for name in b}
    # the grid's own rewards were there beside generation, and may take the engines' place
    assert {g.operator for g in of_stage(plan(job), "evaluate")} == {"engine", "adapter merge"}
    assert [g.operator for g in of_stage(groups, "export")] == ["adapter merge"]
    assert misfit(job, of_stage(groups, "export"), [Node(1, 0, 8)]) is None
    refused = misfit(job, of_stage(groups, "export"), [Node(0, 0, 8)])
    assert refused is not None and "add a node with at least 0.1 CPUs, 0 GPUs and" in refused


def test_worker_memory_by_stage_and_what_trains():
    shape = Shape(parameters=2**28, layers=2, hidden=0, linear=2**22)
    full = config.Train(lora=None, micro_batch_tokens=64, workers=2)
    gib = [worker_gib(full.model_copy(update={"zero_stage": stage}), shape) - 1.2 - 0.09375 for stage in range(4)]
    # a chunk of 2^23 logits takes 12 bytes each, 0.09375 GiB, in bfloat16 8
    # float32: weights 1 GiB, gradients 1, Adam 2; halved over two ranks: Adam from stage 1, gradients from 2, weights from 3
    assert gib == pytest.approx([4, 3, 2.5, 2])
    # bfloat16 weights 0.5 GiB; rank 16 on 2 x 2^22 trains 2^27 values: Adam 8 bytes, gradients 4, masters 4
    lora = config.Train(lora=config.LoRA(rank=16), micro_batch_tokens=64)
    assert worker_gib(lora, shape, "bfloat16") - 1.2 == pytest.approx(0.5 + 2 + 0.0625)
    assert worker_gib(full, shape, "bfloat16") == worker_gib(full, shape)  # full fine-tuning is float32


def test_heads_may_be_wider_than_the_channels_they_share():
    shape = Shape.of(SMOLLM2 | {"head_dim": 128})
    assert shape.linear == (576 + 9 * 128) * 2 + (576 + 3 * 128) * 2 + 3 * 2112


def test_every_reward_reserves_a_pool_and_gpu_engines_keep_their_cache_there():
    rewards = "rewards=[{type: embedded}, {type: function, target: 'm:f', attributes: [x]}]"
    small, large = (load("generate.engine.kv_cache_gib=" + size, rewards, "model.dtype=float32") for size in ("1", "3"))
    shape = Shape.of(SMOLLM2)
    groups = plan(small, shape)
    rewarding = [(g.operator, g.memory_gib) for g in groups if "reward" in g.operator and g.phase == "generate and score"]
    assert rewarding == [("reward embedded", 1.0), ("reward function", 0.3)]
    assert plan(large, shape)[0].memory_gib == pytest.approx(groups[0].memory_gib + 2)
    on_gpu = [plan(load(rewards, "generate.pool.gpus=1", f"generate.engine.kv_cache_gib={s}"), shape)[0] for s in (1, 3)]
    assert on_gpu[0].memory_gib == on_gpu[1].memory_gib


def test_large_actors_are_placed_before_small_ones():
    assert packs([Group("p", "small", 1, 1.0, 0, 0), Group("p", "large", 1, 2.0, 0, 0)], [Node(2, 0, 1), Node(1, 0, 1)])


def test_a_shortage_of_a_thousandth_is_not_called_none():
    job = load("train.cpus_per_worker=2.001")
    assert "needs 2.01 CPUs, the cluster has 2: 0.01 too few" in misfit(job, plan(job), [Node(2, 0, 99)])


def test_the_node_that_is_advised_holds_the_largest_actor():
    job = load("train.cpus_per_worker=64", "train.gpus_per_worker=2", "generate.pool.cpus=3")
    assert "No smaller pool fits: add a node with at least 64 CPUs, 2 GPUs" in misfit(job, plan(job), [Node(2, 0, 99)])


def test_judges_score_when_the_engines_are_gone():
    plain, judged = plan(load()), plan(load("rewards=[{type: embedded}, {type: tfidf, judge: true}]"))
    assert [g for g in judged if g.phase != "evaluate: judges"] == plain
    assert [(g.operator, g.actors) for g in judged if g.phase == "evaluate: judges"] == [("judge tfidf", 1), ("score writer", 1)]
