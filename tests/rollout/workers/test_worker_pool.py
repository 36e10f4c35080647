"""Rollout workers in processes of their own: used, killed, stopped, restarted."""

import asyncio
import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import psutil
import pytest
import torch
import yaml

from megatron_vrl.config import load_config
from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.buckets import BucketWriter
from megatron_vrl.rollout.checksums import tensor_checksums
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.rollout.vllm.special_tokens import banned_token_ids
from megatron_vrl.rollout.workers.discovery import TOKEN_VARIABLE
from megatron_vrl.rollout.workers.pool import WorkerPool
from megatron_vrl.rollout.workers.protocol import LoadBucket, framed
from megatron_vrl.rollout.workers.worker_info import served_model
from tests.running import ENVIRONMENT, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TOKEN = "open sesame"
SPEC = SamplingSpec(n=4, temperature=1.0, top_p=1.0, max_tokens=24, seed=7)
LONG = replace(SPEC, max_tokens=150)  # takes seconds: time enough to kill a worker


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """Directory with a config of the tiny checkpoint; its workers are announced there."""
    folder = tmp_path_factory.mktemp("workers")
    tree = {
        "run": {"out_dir": str(folder / "run")},
        "model": {"checkpoint": str(checkpoint), "dtype": "float32"},
        "data": {"max_prompt_tokens": 100},
        "rollout": {
            "placement": "workers",
            "discovery_dir": str(folder / "found"),
            "max_response_tokens": 156,
            "max_num_seqs": 16,
            "kv_cache_mib": 64,
            "heartbeat_timeout_s": 3.0,
            "worker_wait_timeout_s": 200.0,
        },
        "evaluation": {"max_response_tokens": 8},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


def start_worker(folder, *options):
    script = ROOT / "launch" / "rollout_worker.sh"
    return subprocess.Popen(
        ["bash", str(script), "--config", str(folder / "config.yaml"), *options],
        env=ENVIRONMENT | {TOKEN_VARIABLE: TOKEN},
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def workers(folder):
    """Two workers, each under the script that restarts it."""
    scripts = [start_worker(folder) for _ in range(2)]
    yield scripts
    for script in scripts:
        os.killpg(script.pid, signal.SIGKILL)
        script.wait()


@pytest.fixture
def pool(folder, workers, tokenizer, monkeypatch):
    with made_pool(folder, tokenizer, monkeypatch) as pool:
        yield pool


@contextmanager
def made_pool(folder, tokenizer, monkeypatch, dtype="float32", **rollout):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    cfg = load_config(folder / "config.yaml")
    served = served_model(cfg, cfg.model.checkpoint, banned_token_ids(tokenizer, 512))
    cfg_of_pool = cfg.rollout.model_copy(update=rollout)
    pool = WorkerPool(cfg_of_pool, replace(served, dtype=dtype), torch.device("cpu"))
    yield pool
    pool.close()


def sync_weights(pool, weights, version, at_least=2):
    ready = pool.wait_ready(at_least)
    pool.begin_sync(ready)
    for layer in layers_of(weights):
        pool.push(ready, layer)
    pool.flush()
    pool.commit(ready, version)
    pool.activate([w for w in ready if w.address not in pool.failed], version)
    return ready


def layers_of(weights):
    """Return one list of (name, tensor) for each layer."""
    layers = {}
    for name, tensor in weights.items():
        layers.setdefault(name.rpartition(".")[0].rpartition(".")[0], []).append((name, tensor))
    return layers.values()


def process_of(address):
    """Return the id of the process that listens at the address."""
    port = int(address.rpartition(":")[2])
    (connection,) = [
        c
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid
    ]
    return connection.pid


def ask(pool, prompts, spec):
    return pool.submit(prompts, [spec.for_prompt(index) for index in range(len(prompts))])


def answered(pool, asked):
    """Wait until all are done or no worker is left; return True if all are done."""
    while not all(one.done() for one in asked) and not pool.no_live_workers:
        time.sleep(0.01)
    return all(one.done() for one in asked)


def results(asked):
    return [one.result() for one in asked]


def tokens(groups):
    return [[rollout.token_ids.tolist() for rollout in group] for group in groups]


def test_workers_equal_an_engine_in_this_process(pool, engine, weights, make_prompt):
    sync_weights(pool, weights, version=1)
    prompts = [make_prompt(seed) for seed in range(6)]
    asked = ask(pool, prompts, SPEC)
    assert answered(pool, asked)
    groups, ours = results(asked), engine.generate(prompts, SPEC)
    assert tokens(groups) == tokens(ours)
    for group, own in zip(groups, ours, strict=True):
        for rollout, expected in zip(group, own, strict=True):
            assert (rollout.text, rollout.seed) == (expected.text, expected.seed)
            gap = torch.tensor(rollout.logprobs) - torch.tensor(expected.logprobs)
            assert gap.abs().max() < 1e-5
    expected_sums = tensor_checksums(weights.items(), torch.float32)
    assert list(pool.checksums().values()) == [expected_sums, expected_sums]


@pytest.mark.parametrize("transport", ["shared_memory", "broadcast", "http"])
def test_every_transport_delivers_the_same_weights(
    folder, workers, tokenizer, weights, monkeypatch, transport
):
    with made_pool(folder, tokenizer, monkeypatch, transport=transport) as pool:
        for version in (1, 2):
            changed = {name: tensor * (1 + version / 8) for name, tensor in weights.items()}
            sync_weights(pool, changed, version)
            sums = tensor_checksums(changed.items(), torch.float32)
            assert list(pool.checksums().values()) == [sums, sums]
            assert not pool.failed


def test_a_broadcast_that_loses_a_worker_falls_back_to_http(
    folder, workers, tokenizer, weights, monkeypatch, capfd
):
    with made_pool(folder, tokenizer, monkeypatch, transport="broadcast") as pool:
        ready = pool.wait_ready(2)
        layers = list(layers_of(weights))
        pool.begin_sync(ready)
        for layer in layers[:3]:
            pool.push(ready, layer)
        pool.flush()
        os.kill(process_of(ready[0].address), signal.SIGKILL)
        for layer in layers[3:]:
            pool.push(ready, layer)
        pool.flush()
        assert pool.failed == {ready[0].address}
        pool.commit(ready, 3)
        pool.activate(ready[1:], 3)
        sums = tensor_checksums(weights.items(), torch.float32)
        assert pool.checksums() == {ready[1].address: sums}
        assert (
            "weight broadcast failed, the rest of this sync goes by http" in capfd.readouterr().err
        )
        sync_weights(pool, weights, version=4)  # the restarted worker takes part, by broadcast
        assert list(pool.checksums().values()) == [sums, sums]
        assert "broadcast failed" not in capfd.readouterr().err


def test_a_request_during_a_weight_sync_waits_for_its_end(pool, weights, make_prompt, capfd):
    sync_weights(pool, weights, version=1)
    capfd.readouterr()
    ready, changed = pool.wait_ready(2), {name: tensor * 1.05 for name, tensor in weights.items()}
    pool.begin_sync(ready)
    during = ask(pool, [make_prompt(seed) for seed in range(6)], SPEC)
    time.sleep(0.5)
    for layer in layers_of(changed):
        pool.push(ready, layer)
    pool.flush()
    assert not any(one.done() for one in during)
    pool.commit(ready, 2)
    pool.activate(ready, 2)
    assert answered(pool, during)
    assert "lost" not in capfd.readouterr().err
    assert {r.weight_version for group in results(during) for r in group} == {2}
    after = ask(pool, [make_prompt(seed) for seed in range(6)], SPEC)
    assert answered(pool, after)
    assert tokens(results(during)) == tokens(results(after))


def test_a_connection_may_be_idle_between_steps(pool):
    """A worker that closed a connection just when the trainer reuses it would seem lost."""
    host, port = pool.wait_ready(2)[0].address.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.auto_open = 0  # otherwise it would reconnect
    connection.connect()
    for _ in range(2):
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {TOKEN}"})
        assert connection.getresponse().read()
        time.sleep(8)


def test_a_truncated_bucket_is_refused_and_the_next_one_is_loaded(pool, weights):
    ready = pool.wait_ready(2)
    writer = BucketWriter(torch.float32)
    bucket = writer.write(weights.items())
    contents = bytes(writer.contents(bucket))
    with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        for wrong in (contents[:-1], contents + b"!", b""):
            body = framed(LoadBucket(bucket=bucket, follows=True)) + wrong
            answer = client.post(f"http://{ready[0].address}/weights/load", content=body)
            assert answer.status_code == 422
            size = len(contents)
            assert answer.text == f"a bucket of {size} bytes arrived with {len(wrong)} bytes"
    sync_weights(pool, weights, version=5)
    sums = tensor_checksums(weights.items(), torch.float32)
    assert list(pool.checksums().values()) == [sums, sums]


def test_a_transport_that_cannot_reach_the_worker_is_refused(
    folder, workers, tokenizer, weights, monkeypatch
):
    with (
        made_pool(folder, tokenizer, monkeypatch, transport="cuda_ipc") as pool,
        pytest.raises(RolloutError, match=r"rollout.transport=cuda_ipc: the worker at 127.0.0.1:"),
    ):
        pool.serialize_stages(pool.wait_ready(1))


def test_requests_of_a_killed_worker_move_to_the_other_and_it_rejoins(pool, weights, make_prompt):
    ready = sync_weights(pool, weights, version=1)
    prompts = [make_prompt(seed) for seed in range(8)]
    undisturbed = ask(pool, prompts, LONG)
    assert answered(pool, undisturbed)
    asked = ask(pool, prompts, LONG)
    time.sleep(0.3)
    os.kill(process_of(ready[0].address), signal.SIGKILL)
    assert answered(pool, asked)
    assert tokens(results(asked)) == tokens(
        results(undisturbed)
    )  # each request once, with the same tokens
    changed = {name: tensor * 1.05 for name, tensor in weights.items()}
    back = sync_weights(pool, changed, version=2)
    assert {w.instance for w in back}.isdisjoint({ready[0].instance})
    asked = ask(pool, prompts, SPEC)
    assert answered(pool, asked)
    assert {r.weight_version for group in results(asked) for r in group} == {2}


def test_a_stopped_worker_is_lost_and_rejoins(pool, weights, make_prompt):
    ready = sync_weights(pool, weights, version=3)
    stopped = process_of(ready[0].address)
    asked = ask(pool, [make_prompt(seed) for seed in range(8)], LONG)
    time.sleep(0.3)
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert answered(pool, asked)
        versions = {r.weight_version for group in results(asked) for r in group}
        assert versions == {3} and len(results(asked)) == 8
    finally:
        os.kill(stopped, signal.SIGCONT)
    again = sync_weights(pool, weights, version=4)
    assert {w.address for w in again} == {w.address for w in ready}


def test_without_workers_requests_wait_for_the_next_weight_sync(pool, weights, make_prompt):
    ready = sync_weights(pool, weights, version=5)
    asked = ask(pool, [make_prompt(seed) for seed in range(4)], LONG)
    for worker in ready:
        os.kill(process_of(worker.address), signal.SIGKILL)
    assert not answered(pool, asked)
    sync_weights(pool, weights, version=5, at_least=1)
    assert answered(pool, asked)
    assert [len(group) for group in results(asked)] == [4] * 4


def test_a_worker_with_old_weights_gets_no_requests(pool, weights, make_prompt):
    ready = sync_weights(pool, weights, version=6)
    pool.activate(ready, version=7)  # as if they had taken part in a sync
    asked = ask(pool, [make_prompt(0)], SPEC)
    assert not answered(pool, asked)
    sync_weights(pool, weights, version=7)
    assert answered(pool, asked)
    assert {r.weight_version for r in results(asked)[0]} == {7}


def test_invalid_responses_lose_the_worker(
    folder, workers, tokenizer, weights, make_prompt, monkeypatch
):
    """A proxy before a worker forwards health checks and returns invalid rollouts."""
    with made_pool(folder, tokenizer, monkeypatch) as pool:
        real = pool.wait_ready(2)[0].address
    with (
        proxy_with_invalid_rollouts(real) as address,
        made_pool(
            folder, tokenizer, monkeypatch, discovery_dir="", workers=[address, real]
        ) as pool,
    ):
        sync_weights(pool, weights, version=8)
        asked = ask(pool, [make_prompt(seed) for seed in range(4)], SPEC)
        assert answered(pool, asked)
        assert len(results(asked)) == 4


@contextmanager
def proxy_with_invalid_rollouts(address):
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    async def forward(request):
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


def test_prompts_that_do_not_fit_or_are_read_differently_are_refused(
    folder, pool, weights, tokenizer, make_prompt, monkeypatch
):
    sync_weights(pool, weights, version=9)
    with pytest.raises(RolloutError, match=r"clip_0: \d+ prompt tokens"):
        ask(pool, [make_prompt(0)], replace(SPEC, max_tokens=250))
    prompt = make_prompt(0)
    prompt.token_ids[-1] += 1
    asked = ask(pool, [prompt], SPEC)
    assert answered(pool, asked)
    with pytest.raises(RolloutError, match="clip_0: vLLM read"):
        results(asked)
    with (
        made_pool(folder, tokenizer, monkeypatch, dtype="bfloat16") as other,
        pytest.raises(RolloutError, match="serves dtype float32, the trainer bfloat16"),
    ):
        other.wait_ready(1)
    with (
        made_pool(folder, tokenizer, monkeypatch, worker_wait_timeout_s=1.0) as other,
        pytest.raises(RolloutError, match=r"2 of at least 3 rollout workers were ready within"),
    ):
        other.wait_ready(3)
    address = pool.wait_ready(1)[0].address
    for headers in ({}, {"Authorization": "Bearer guess"}):
        answer = httpx.get(f"http://{address}/health", trust_env=False, headers=headers)
        assert (answer.status_code, answer.text) == (
            401,
            f"The worker needs the token of {TOKEN_VARIABLE}.",
        )


def test_a_worker_open_to_other_machines_needs_a_token(folder):
    done = subprocess.run(
        ["bash", "launch/rollout_worker.sh", "--config", folder / "config.yaml", "--host", "::"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "error: --host :: is open to other machines: set MEGATRON_VRL_ROLLOUT_TOKEN" in (
        done.stderr
    )
