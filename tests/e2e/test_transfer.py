"""vLLM's own end of a weight transfer: what its calls take, which rank each process gets, and real engines over gloo."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from inspect import signature
from types import SimpleNamespace

import pytest
import ray
import torch

from ctrlray import config, models
from ctrlray.engine import pool as pools
from ctrlray.engine.engine import EngineSpec
from ctrlray.engine.transfer import BACKEND, Offer, Ranks
from ctrlray.errors import ClusterError
from ctrlray.tables import Storage
from ctrlray.train.ppo.handover import Incoming, Outgoing
from tests.e2e.test_weights import GREEDY, SCALE, SPACE, assert_computes_as, questions, random_adapter, reference
from tests.gloo import Gloo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
OFFER = Offer(3, Ranks(engines=2, width=2), "10.0.0.7", 4711, "bfloat16", ["a", "b"], [[2, 3], [5]])


def test_vllm_s_calls_take_what_they_are_given():
    """Signatures of what the engine and the trainer call; a vLLM of another API fails here and not on a cluster."""
    from vllm import LLM
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory, nccl_common, nccl_engine

    made = WeightTransferEngineFactory._registry[WeightTransferConfig(backend=BACKEND).backend]()
    assert made is nccl_engine.NCCLWeightTransferEngine
    assert not made.init_info_cls(**OFFER.joining(0)).packed and made.update_info_cls(**OFFER.contents()).names == ["a", "b"]
    calls = [
        (LLM.shutdown_weight_transfer_engine, {}),
        (LLM.init_weight_transfer_engine, {"request": {"init_info": OFFER.joining(0)}}),
        (LLM.start_weight_update, {}),
        (LLM.update_weights, {"request": {"update_info": OFFER.contents()}}),
        (LLM.finish_weight_update, {"weight_version": "3"}),
        (LLM.get_weight_version, {}),
        (PyNcclCommunicator.broadcast, {"tensor": None, "src": 0, "stream": None}),
        (PyNcclCommunicator.destroy, {}),
    ]
    for call, given in calls:
        assert list(signature(call).bind(None, **given).arguments) == ["self", *given]
    signature(nccl_common.trainer_init).bind({})


def test_vllm_gives_every_process_the_rank_that_was_planned(monkeypatch):
    from vllm.distributed.weight_transfer import nccl_common

    joined = []
    note = lambda address, port, rank, size, device: joined.append((address, port, rank, size))  # noqa: E731
    monkeypatch.setattr(nccl_common, "stateless_init_process_group", note)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    nccl_common.trainer_init({"master_address": OFFER.address, "master_port": OFFER.port, "world_size": OFFER.ranks.world_size})
    for engine in range(2):
        for process in range(2):
            mine = SimpleNamespace(data_parallel_index=0, world_size=2, rank=process)
            nccl_common.worker_init_process_group(nccl_common.NCCLWeightTransferInitInfo(**OFFER.joining(engine)), mine)
    assert joined == [("10.0.0.7", 4711, rank, 5) for rank in range(5)]


class Communicator:
    """In the place of vLLM's."""

    disabled = False
    device = torch.device("cpu")

    def __init__(self):
        self.sent = []

    def broadcast(self, tensor, src, stream):
        assert src == 0 and stream == "the trainer's" and tensor.is_contiguous()
        self.sent.append(tensor)


def test_the_trainer_sends_in_its_own_stream_and_never_into_the_void(monkeypatch):
    from vllm.distributed.weight_transfer import nccl_common

    from ctrlray.train.ppo.transfer import Group

    made, streams = Communicator(), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the trainer's")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(nccl_common, "trainer_init", lambda place: made)
    group = Group("10.0.0.7", 4711, 5)
    group.send(torch.arange(6.0).reshape(2, 3).T)
    assert streams == ["the trainer's"] and made.sent[0].tolist() == [[0, 3], [1, 4], [2, 5]]
    made.disabled = True
    with pytest.raises(ClusterError, match="no NCCL in the trainer"):
        Group("10.0.0.7", 4711, 5)


class GlooHost(pools.EngineHost):
    """An engine whose backend `gloo` is vLLM's `nccl` but for the communicator and CUDA's streams."""

    def __init__(self, spec):
        os.environ.update(spec.environment())
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        class GlooTransfer(NCCLWeightTransferEngine):
            def init_transfer_engine(self, init_info):
                rank = init_info.rank_offset + self.parallel_config.rank
                self.model_update_group = Gloo(init_info.master_address, init_info.master_port, init_info.world_size, rank)

        WeightTransferEngineFactory.register_engine("gloo", GlooTransfer)
        torch.cuda.current_stream = torch.accelerator.synchronize = lambda: None
        super().__init__(spec)


@pytest.fixture(scope="module")
def base(tiny, private_cache):
    return models.prepare(config.Model(name=str(tiny)), SPACE, ["hello there", "what is this"])


@pytest.fixture(scope="module")
def engines(base, local_ray):
    settings = config.EngineSettings(block_size=32, max_num_seqs=16)
    recipe = {"log_stats": True, "processed_logprobs": True, "transfer": "gloo"}
    spec = EngineSpec(base.folder, "float32", 512, settings, masked_ids=base.control_ids, **recipe)
    patch = pytest.MonkeyPatch()
    patch.setattr(pools, "EngineHost", GlooHost)
    with pools.EnginePool(spec, config.Pool(min_size=2, max_size=2, cpus=0.5), "transfer", 300) as made:
        yield made
    patch.undo()


class Trainer:
    """A network with LoRA in a thread that sends its weights when it is asked, as the loop does while it waits.

    `form(address, port, world_size)` makes its end of a group.
    """

    def __init__(self, base, out, form=Gloo, device="cpu"):
        from ctrlray.train.models import adapter_card, load_network
        from ctrlray.train.ppo.transfer import Layers

        lora = config.LoRA(rank=4, alpha=round(4 * SCALE))
        self.network, _ = load_network(base.folder, config.Train(lora=lora), base.control_ids, "float32", device)
        task = SimpleNamespace(out=out, folder=base.folder, control_ids=base.control_ids, objective=config.PPO(steps=99))
        layers = Layers(self.network, adapter_card(lora, base.control_ids), sharded=False)
        self.outgoing = Outgoing(task, layers, 0, 1, self.group)
        self.form, self.device = form, device
        self.version, self.formed, self.over = 0, [], threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def group(self, address, port, world_size):
        self.formed.append(world_size)
        return self.form(address, port, world_size)

    def learn(self, adapter):
        from ctrlray.train.models import stored_name

        with torch.no_grad():
            changed = [p.copy_(adapter[stored_name(n)]) for n, p in self.network.named_parameters() if p.requires_grad]
        assert len(changed) == len(adapter)
        self.version += 1

    def run(self):
        if self.device != "cpu":
            torch.cuda.set_device(self.device)
        while not self.over.is_set():
            self.outgoing.meet(self.version, False)
            time.sleep(0.02)


def until(there, what):
    end = time.monotonic() + 300
    while not there():
        assert time.monotonic() < end, str(what)
        time.sleep(0.02)


@pytest.mark.soak
def test_real_engines_compute_with_what_a_trainer_sends(engines, base, tmp_path):
    """Two of them, twice in place; then one is killed at work, and its successor gets the weights in force."""
    prompts = questions(base, ["hi", "what is the matter with you?"])
    trainer = Trainer(base, Storage(str(tmp_path)))
    incoming = Incoming(Storage(str(tmp_path)), engines, "float32", until)
    trainer.thread.start()
    before = [a.token_ids for a in engines.generate(prompts, GREEDY, batch_size=2)]
    for version in (1, 2):
        adapter, _ = random_adapter(base, seed=version, size=0.3)
        trainer.learn(adapter)
        engines.renew = partial(incoming.bring, version, version)
        engines.renew()
        assert engines.weights_version == version and trainer.formed == [3]
        answers = engines.generate(prompts, GREEDY, batch_size=2)  # both engines work
        assert {a.weights_version for a in answers} == {version} and [a.token_ids for a in answers] != before
        assert_computes_as(engines, reference(base, adapter), prompts)
    pids = ray.get([a.ready.remote() for a in engines._engines.actors])
    os.kill(pids[1], 9)
    answers = engines.generate(prompts * 4, GREEDY, batch_size=2)
    assert all(a is not None and a.weights_version == 2 for a in answers) and trainer.formed == [3, 3]
    assert ray.get([a.ready.remote() for a in engines._engines.actors])[1] != pids[1]
    assert_computes_as(engines, reference(base, adapter), prompts)
    trainer.over.set()
    trainer.thread.join()
