"""Weight syncs that no worker takes: the run ends with a sentence and does not retry forever."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from megatron_vrl.checkpoint.hf_export import WeightExport
from megatron_vrl.config import Model, Parallel, RolloutConfig
from megatron_vrl.errors import RolloutError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.qwen2_5_vl.weight_map import WEIGHTS
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.policy.policy import Policy
from megatron_vrl.rollout.manager import RolloutManager
from megatron_vrl.rollout.weight_sync import WorkerSync, transform_of
from megatron_vrl.rollout.workers.pool import WorkerPool
from megatron_vrl.rollout.workers.protocol import encode
from megatron_vrl.rollout.workers.worker_info import Health, ServedModel, machine
from tests.tiny_models import hf_model, save

SERVED = ServedModel(architecture="a", dtype="float32", max_model_len=64, banned_tokens="b")


@contextmanager
def worker_that_takes_no_weights() -> Iterator[tuple[str, list[str]]]:
    """A worker with good health that refuses every call: its address and the paths called."""
    asked = []

    async def answer(request: Request) -> Response:
        asked.append(request.url.path)
        if request.url.path == "/health":
            health = Health(
                instance="i", machine=machine(), gpus=(), served_model=SERVED, version=None
            )
            return Response(encode(health))
        return Response(b"no", 500)

    routes = [Route("/{path:path}", answer, methods=["GET", "POST"])]
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}", asked
    server.should_exit = True
    thread.join()


def test_a_weight_sync_without_workers_ends_the_run(tmp_path: Path) -> None:
    checkpoint = save(hf_model(), tmp_path / "hf")
    mesh = init_mesh(Parallel(), seed=1)
    cfg = Model(checkpoint=str(checkpoint), dtype="float32")
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    with worker_that_takes_no_weights() as (address, asked):
        rollout = RolloutConfig(placement="workers", workers=[address], worker_wait_timeout_s=1.0)
        pool = WorkerPool(rollout, SERVED, torch.device("cpu"))
        sync = WorkerSync(mesh, WeightExport(policy.chunks), pool, transform_of("none", WEIGHTS))
        rollouts = RolloutManager(rollout, mesh, pool, sync, None, ())
        with pytest.raises(RolloutError, match=r"No rollout worker loaded the weights within"):
            rollouts.sync_weights(0)
        assert asked.count("/weights/begin") > 1 and rollouts.version is None
        pool.close()
    close_mesh()
