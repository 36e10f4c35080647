"""Rollout workers in processes of their own: used, killed, stopped, restarted."""

import http.client
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.buckets import BucketWriter
from megatron_vrl.rollout.checksums import tensor_checksums
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.rollout.vllm.engine import VllmEngine
from megatron_vrl.rollout.workers.discovery import TOKEN_VARIABLE
from megatron_vrl.rollout.workers.pool import WorkerPool
from megatron_vrl.rollout.workers.protocol import LoadBucket, framed
from tests.rollout.conftest import MakePrompt, Weights
from tests.rollout.workers.pool_helpers import (
    TOKEN,
    answered,
    ask,
    layers_of,
    made_pool,
    process_of,
    proxy_with_invalid_rollouts,
    results,
    start_worker,
    sync_weights,
    tokens,
)
from tests.running import ENVIRONMENT, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SPEC = SamplingSpec(n=4, temperature=1.0, top_p=1.0, max_tokens=24, seed=7)
LONG = replace(SPEC, max_tokens=150)  # takes seconds: time enough to kill a worker


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
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


@pytest.fixture(scope="module")
def workers(folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two workers, each under the script that restarts it."""
    scripts = [start_worker(folder) for _ in range(2)]
    yield scripts
    for script in scripts:
        os.killpg(script.pid, signal.SIGKILL)
        script.wait()


@pytest.fixture
def pool(
    folder: Path,
    workers: list[subprocess.Popen[bytes]],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[WorkerPool]:
    with made_pool(folder, tokenizer, monkeypatch) as pool:
        yield pool


def test_workers_equal_an_engine_in_this_process(
    pool: WorkerPool,
    engine: VllmEngine,
    weights: Weights,
    make_prompt: MakePrompt,
) -> None:
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

    counted: dict[str, float] = {}
    for worker in pool.wait_ready(2):
        for name, value in metrics_of(worker.address).items():
            counted[name] = counted.get(name, 0.0) + value
    generated = sum(len(rollout.token_ids) for group in groups for rollout in group)
    # Other tests may have used the same workers before.
    assert counted["mvrl_worker_response_tokens_total"] >= generated
    assert counted["mvrl_worker_request_seconds_count"] >= len(prompts)
    assert counted['mvrl_worker_calls_total{path="/generate",status="200"}'] >= len(prompts)
    assert counted["mvrl_worker_requests_running"] == 0
    assert counted["mvrl_worker_weight_version"] == 2  # version 1 of two workers
    assert counted["mvrl_worker_weight_sync_seconds_count"] >= 2


def metrics_of(address: str) -> dict[str, float]:
    """Return the worker's metrics by name and labels, as Prometheus would read them."""
    authorization = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx.get(f"http://{address}/metrics", trust_env=False, headers=authorization)
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@pytest.mark.parametrize("transport", ["shared_memory", "broadcast", "http"])
def test_every_transport_delivers_the_same_weights(
    folder: Path,
    workers: list[subprocess.Popen[bytes]],
    tokenizer: PreTrainedTokenizerBase,
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
) -> None:
    with made_pool(folder, tokenizer, monkeypatch, transport=transport) as pool:
        for version in (1, 2):
            changed = {name: tensor * (1 + version / 8) for name, tensor in weights.items()}
            sync_weights(pool, changed, version)
            sums = tensor_checksums(changed.items(), torch.float32)
            assert list(pool.checksums().values()) == [sums, sums]
            assert not pool.failed


def test_a_broadcast_that_loses_a_worker_falls_back_to_http(
    folder: Path,
    workers: list[subprocess.Popen[bytes]],
    tokenizer: PreTrainedTokenizerBase,
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
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


def test_a_request_during_a_weight_sync_waits_for_its_end(
    pool: WorkerPool,
    weights: Weights,
    make_prompt: MakePrompt,
    capfd: pytest.CaptureFixture[str],
) -> None:
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


def test_a_connection_may_be_idle_between_steps(pool: WorkerPool) -> None:
    """A worker that closed a connection just when the trainer reuses it would seem lost."""
    host, port = pool.wait_ready(2)[0].address.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.auto_open = 0  # otherwise it would reconnect
    connection.connect()
    for _ in range(2):
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {TOKEN}"})
        assert connection.getresponse().read()
        time.sleep(8)


def test_a_truncated_bucket_is_refused_and_the_next_one_is_loaded(
    pool: WorkerPool, weights: Weights
) -> None:
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
    folder: Path,
    workers: list[subprocess.Popen[bytes]],
    tokenizer: PreTrainedTokenizerBase,
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        made_pool(folder, tokenizer, monkeypatch, transport="cuda_ipc") as pool,
        pytest.raises(RolloutError, match=r"rollout.transport=cuda_ipc: the worker at 127.0.0.1:"),
    ):
        pool.serialize_stages(pool.wait_ready(1))


def test_requests_of_a_killed_worker_move_to_the_other_and_it_rejoins(
    pool: WorkerPool, weights: Weights, make_prompt: MakePrompt
) -> None:
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


def test_a_stopped_worker_is_lost_and_rejoins(
    pool: WorkerPool, weights: Weights, make_prompt: MakePrompt
) -> None:
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


def test_without_workers_requests_wait_for_the_next_weight_sync(
    pool: WorkerPool, weights: Weights, make_prompt: MakePrompt
) -> None:
    ready = sync_weights(pool, weights, version=5)
    asked = ask(pool, [make_prompt(seed) for seed in range(4)], LONG)
    for worker in ready:
        os.kill(process_of(worker.address), signal.SIGKILL)
    assert not answered(pool, asked)
    sync_weights(pool, weights, version=5, at_least=1)
    assert answered(pool, asked)
    assert [len(group) for group in results(asked)] == [4] * 4


def test_a_worker_with_old_weights_gets_no_requests(
    pool: WorkerPool, weights: Weights, make_prompt: MakePrompt
) -> None:
    ready = sync_weights(pool, weights, version=6)
    pool.activate(ready, version=7)  # as if they had taken part in a sync
    asked = ask(pool, [make_prompt(0)], SPEC)
    assert not answered(pool, asked)
    sync_weights(pool, weights, version=7)
    assert answered(pool, asked)
    assert {r.weight_version for r in results(asked)[0]} == {7}


def test_invalid_responses_lose_the_worker(
    folder: Path,
    workers: list[subprocess.Popen[bytes]],
    tokenizer: PreTrainedTokenizerBase,
    weights: Weights,
    make_prompt: MakePrompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


def test_prompts_that_do_not_fit_or_are_read_differently_are_refused(
    folder: Path,
    pool: WorkerPool,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    make_prompt: MakePrompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


def test_a_worker_open_to_other_machines_needs_a_token(folder: Path) -> None:
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
