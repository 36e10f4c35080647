"""Start rollout workers, talk to them through a pool, and find or fake their processes."""

import asyncio
import socket
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from megatron_vrl.config import load_config
from megatron_vrl.models.qwen2_5_vl.prompt import PROMPT
from megatron_vrl.rollout.interfaces import RolloutFuture
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.rollout.vllm.special_tokens import banned_token_ids
from megatron_vrl.rollout.workers.discovery import TOKEN_VARIABLE
from megatron_vrl.rollout.workers.pool import WorkerPool
from megatron_vrl.rollout.workers.worker_info import WorkerInfo, served_model
from megatron_vrl.types import Prompt, Rollout
from tests.rollout.conftest import Weights
from tests.running import ENVIRONMENT, ROOT

TOKEN = "open sesame"


def start_worker(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    script = ROOT / "launch" / "rollout_worker.sh"
    return subprocess.Popen(
        ["bash", str(script), "--config", str(folder / "config.yaml"), *options],
        env=ENVIRONMENT | {TOKEN_VARIABLE: TOKEN},
        start_new_session=True,
    )


@contextmanager
def made_pool(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str = "float32",
    **rollout: object,
) -> Iterator[WorkerPool]:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    cfg = load_config(folder / "config.yaml")
    served = served_model(cfg, cfg.model.checkpoint, banned_token_ids(tokenizer, PROMPT, 512))
    cfg_of_pool = cfg.rollout.model_copy(update=rollout)
    pool = WorkerPool(cfg_of_pool, replace(served, dtype=dtype), torch.device("cpu"))
    yield pool
    pool.close()


def sync_weights(
    pool: WorkerPool, weights: Weights, version: int, at_least: int = 2
) -> list[WorkerInfo]:
    ready = pool.wait_ready(at_least)
    pool.begin_sync(ready)
    for layer in layers_of(weights):
        pool.push(ready, layer)
    pool.flush()
    pool.commit(ready, version)
    pool.activate([w for w in ready if w.address not in pool.failed], version)
    return ready


def layers_of(weights: Weights) -> Collection[list[tuple[str, torch.Tensor]]]:
    """Return one list of (name, tensor) for each layer."""
    layers: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in weights.items():
        layers.setdefault(name.rpartition(".")[0].rpartition(".")[0], []).append((name, tensor))
    return layers.values()


def process_of(address: str) -> int:
    """Return the id of the process that listens at the address."""
    port = int(address.rpartition(":")[2])
    (connection,) = [
        c
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid
    ]
    pid: int = connection.pid
    return pid


def ask(pool: WorkerPool, prompts: Sequence[Prompt], spec: SamplingSpec) -> Sequence[RolloutFuture]:
    return pool.submit(prompts, [spec.for_prompt(index) for index in range(len(prompts))])


def answered(pool: WorkerPool, asked: Sequence[RolloutFuture]) -> bool:
    """Wait until all are done or no worker is left; return True if all are done."""
    while not all(one.done() for one in asked) and not pool.no_live_workers:
        time.sleep(0.01)
    return all(one.done() for one in asked)


def results(asked: Sequence[RolloutFuture]) -> list[list[Rollout]]:
    return [one.result() for one in asked]


def tokens(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[rollout.token_ids.tolist() for rollout in group] for group in groups]


@contextmanager
def proxy_with_invalid_rollouts(address: str) -> Iterator[str]:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def forward(request: Request) -> Response:
        if request.url.path == "/generate":
            return Response(b"\x93\x01\x02\x03")
        if request.url.path.startswith("/weights"):
            return Response(b"\xc0")  # the worker gets the weights directly
        async with httpx.AsyncClient(trust_env=False, headers=dict(request.headers)) as client:
            answer = await client.get(f"http://{address}{request.url.path}")
        return Response(answer.content, answer.status_code)

    routes = [Route("/{path:path}", forward, methods=["GET", "POST"])]
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
