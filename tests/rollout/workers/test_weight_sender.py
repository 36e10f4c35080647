"""Choice of the transport to a worker, by the GPUs that worker and trainer see."""

from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_vrl.config.rollout import Transport
from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.workers import weight_sender
from megatron_vrl.rollout.workers.client import WorkerClient
from megatron_vrl.rollout.workers.weight_sender import WeightSender
from megatron_vrl.rollout.workers.worker_info import WorkerInfo, machine

HERE = machine()
MakeSender = Callable[[Transport], WeightSender]


@pytest.fixture
def client() -> Iterator[WorkerClient]:
    client = WorkerClient()
    yield client
    client.close()


@pytest.fixture
def sender(client: WorkerClient, monkeypatch: pytest.MonkeyPatch) -> MakeSender:
    """Sender of a trainer on the second of two GPUs. No memory of a GPU is touched."""
    monkeypatch.setattr(weight_sender, "visible_gpus", lambda: ("GPU-0", "GPU-1"))

    def make(transport: Transport) -> WeightSender:
        return WeightSender(transport, torch.float32, torch.device("cuda", 1), client)

    return make


def worker(gpus: tuple[str, ...], where: str = HERE) -> WorkerInfo:
    return WorkerInfo("127.0.0.1:80", "instance", where, gpus)


@pytest.mark.parametrize(
    ("gpus", "where", "expected"),
    [
        (("GPU-1",), HERE, "cuda_ipc"),
        (("GPU-0",), HERE, "shared_memory"),
        ((), HERE, "shared_memory"),
        (("GPU-9",), "elsewhere", "broadcast"),
    ],
)
def test_auto_takes_the_first_that_both_share(
    sender: MakeSender, gpus: tuple[str, ...], where: str, expected: str
) -> None:
    assert sender("auto")._transport_to(worker(gpus, where)) == expected


def test_broadcast_to_the_trainers_own_gpu_is_refused(sender: MakeSender) -> None:
    """NCCL refuses two ranks on one GPU; the sync would go by http under another name."""
    assert sender("broadcast")._transport_to(worker(("GPU-0",))) == "broadcast"
    with pytest.raises(RolloutError, match=r"rollout\.transport=broadcast: .* one GPU: set"):
        sender("broadcast").serialize_stages([worker(("GPU-0", "GPU-1"))])


def test_without_gpus_broadcast_reaches_a_worker_of_the_same_machine(client: WorkerClient) -> None:
    sender = WeightSender("broadcast", torch.float32, torch.device("cpu"), client)
    assert sender._transport_to(worker(())) == "broadcast"
