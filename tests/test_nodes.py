"""Two nodes, as two calls of launch/train.sh that meet on loopback: a rank is killed, the run is
asked to stop and goes on, and its curve is that of one node left alone."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import CONFIG, ENVIRONMENT, ROOT

SMALL = (
    "sft.stop_metric=''",
    "sft.steps=20",
    "sft.batch_size=20",
    "grpo.steps=2",
    "rollout.prompts_per_step=4",
    "algorithm.drop_uniform_groups=false",
    "checkpoint.every_steps=5",
    "observe.wandb=disabled",
    "data.evaluation={}",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


class Nodes:
    """Calls of launch/train.sh, one for each node, in sessions of their own."""

    def __init__(self, folder: Path, name: str, nodes: int, ranks: int = 1) -> None:
        self.metrics = folder / "runs" / name / "metrics.jsonl"
        self.logs = [folder / f"{name}-{node}.log" for node in range(nodes)]
        where = {
            "NNODES": str(nodes),
            "NPROC": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "LOCAL_ADDR": "127.0.0.1",
            "RESTARTS": "3",
        }
        command = ["bash", ROOT / "launch" / "train.sh", "--config", CONFIG, *SMALL]
        self.scripts = []
        for node, log in enumerate(self.logs):
            with log.open("a") as output:
                self.scripts.append(
                    subprocess.Popen(
                        [*command, f"run.out_dir=runs/{name}"],
                        cwd=folder,
                        env=ENVIRONMENT | where | {"NODE_RANK": str(node)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        for script in self.scripts:
            if script.poll() is None:
                os.killpg(script.pid, signal.SIGKILL)

    def words(self) -> str:
        return "".join(log.read_text()[-2000:] for log in self.logs)

    def wait_for(self, step: int) -> None:
        while not any(row["step"] >= step for row in rows(self.metrics)):
            assert all(script.poll() is None for script in self.scripts), self.words()
            time.sleep(0.2)

    def rank_of(self, node: int) -> int:
        """Process id of the node's rank: the child of the launcher that train.sh started."""
        (launcher,) = children(self.scripts[node].pid, "torchrun.py")
        (rank,) = children(launcher, "megatron_vrl.train")
        return rank

    def finish(self) -> None:
        for script in self.scripts:
            assert script.wait() == 0, self.words()


def children(pid: int, named: str) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(pid), "-f", named], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def rows(metrics: Path) -> list[dict]:
    if not metrics.exists():
        return []
    return [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]


def curve(metrics: Path) -> list[tuple]:
    names = ("loss", "grad_norm", "reward", "policy_loss")
    return [
        (row["phase"], row["step"], *(row.get(name) for name in names)) for row in rows(metrics)
    ]


def test_nodes_that_lose_a_rank_and_are_stopped_give_the_curve_of_one(quickstart):
    with Nodes(quickstart, "one-node", nodes=1, ranks=2) as alone:
        alone.finish()
    with Nodes(quickstart, "two-nodes", nodes=2) as nodes:
        nodes.wait_for(step=7)
        os.kill(nodes.rank_of(1), signal.SIGKILL)  # the launchers start both again
        nodes.wait_for(step=12)
        nodes.scripts[0].send_signal(signal.SIGUSR1)
        nodes.finish()
    assert "as asked; the same command goes on from its checkpoint." in nodes.words()
    stopped_at = max(row["step"] for row in rows(nodes.metrics))
    assert 12 <= stopped_at < 20
    with Nodes(quickstart, "two-nodes", nodes=2) as again:
        again.finish()
    assert curve(again.metrics) == curve(alone.metrics)
    assert [(phase, step) for phase, step, *_ in curve(again.metrics)] == [
        *(("sft", step) for step in range(1, 21)),
        ("grpo", 1),
        ("grpo", 2),
    ]
