"""Two and four nodes, as calls of launch/train.sh that meet on loopback: a rank is killed, a whole
node is lost and started again, the run is asked to stop and goes on, and its curve is that of one
node left alone."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import warm
from tests.running import CONFIG, ENVIRONMENT, ROOT

SMALL = (
    "sft.stop_metric=''",
    "sft.steps=20",
    "sft.batch_size=20",
    "grpo.steps=2",
    "rollout.prompts_per_step=4",
    "algorithm.drop_zero_variance_groups=false",
    "checkpoint.every_steps=5",
    "observe.wandb=disabled",
    "data.evaluation={}",
)
SFT_ALONE = ("sft.steps=6", "grpo.steps=0", "checkpoint.every_steps=2")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])


class Nodes:
    """Calls of launch/train.sh, one for each node, in sessions of their own."""

    def __init__(
        self, folder: Path, name: str, nodes: int, ranks: int = 1, more: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self.metrics = folder / "runs" / name / "metrics.jsonl"
        self.logs = [folder / f"{name}-{node}.log" for node in range(nodes)]
        self.where = {
            "NNODES": str(nodes),
            "NPROC": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "LOCAL_ADDR": "127.0.0.1",
            "RESTARTS": "3",
        }
        train = ROOT / "launch" / "train.sh"
        self.command = [
            "bash",
            str(train),
            "--config",
            str(CONFIG),
            *SMALL,
            *more,
            f"run.out_dir=runs/{name}",
        ]
        self.scripts = [self.start(node) for node in range(nodes)]

    def start(self, node: int) -> subprocess.Popen[bytes]:
        with self.logs[node].open("a") as output:
            return subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=ENVIRONMENT | self.where | {"NODE_RANK": str(node)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def lose(self, node: int) -> None:
        """Everything of the node ends at once: script, launcher, ranks, which have sessions of
        their own, and their children. A node that is gone says no word to the others."""
        script = psutil.Process(self.scripts[node].pid)
        for process in [script, *script.children(recursive=True)]:
            process.kill()
        self.scripts[node].wait()

    def start_again(self, node: int) -> None:
        """Make the same call again, as a cluster's scheduler does."""
        self.scripts[node] = self.start(node)

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        for node, script in enumerate(self.scripts):
            if script.poll() is None:
                self.lose(node)

    def output(self) -> str:
        return "".join(log.read_text()[-2000:] for log in self.logs)

    def wait_for(self, step: int) -> None:
        while not any(row["step"] >= step for row in rows(self.metrics)):
            assert all(script.poll() is None for script in self.scripts), self.output()
            time.sleep(0.2)

    def rank_of(self, node: int) -> int:
        """Process id of the node's rank: the child of the launcher that train.sh became."""
        (rank,) = children(self.scripts[node].pid, "megatron_vrl.cli.train")
        return rank

    def finish(self) -> None:
        for script in self.scripts:
            assert script.wait() == 0, self.output()


def children(pid: int, named: str) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(pid), "-f", named], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def rows(metrics: Path) -> list[dict[str, Any]]:
    if not metrics.exists():
        return []
    return [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]


def curve(metrics: Path) -> list[tuple[Any, ...]]:
    update = ("loss", "grad_norm")
    names = [f"{phase}/{name}" for phase in ("sft", "actor") for name in update]
    names += ["actor/policy_loss", "reward/mean"]
    return [
        (row["phase"], row["step"], *(row.get(name) for name in names)) for row in rows(metrics)
    ]


@pytest.fixture(scope="module")
def undisturbed(quickstart: Path) -> list[tuple[Any, ...]]:
    """The curve of one node with two ranks."""
    with Nodes(quickstart, "one-node", nodes=1, ranks=2) as alone:
        alone.finish()
    return curve(alone.metrics)


def test_two_nodes_with_a_lost_rank_and_a_stop_equal_one_node(
    quickstart: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    with Nodes(quickstart, "two-nodes", nodes=2) as nodes:
        nodes.wait_for(step=7)
        os.kill(nodes.rank_of(1), signal.SIGKILL)  # the launchers start both again
        nodes.wait_for(step=12)
        for process in warm.family(nodes.scripts[0].pid):  # as Slurm does: to all, helpers too
            process.send_signal(signal.SIGUSR1)
        nodes.finish()
    assert "as asked; the same command goes on from its checkpoint." in nodes.output()
    stopped_at = max(row["step"] for row in rows(nodes.metrics))
    assert 12 <= stopped_at < 20
    with Nodes(quickstart, "two-nodes", nodes=2) as again:
        again.finish()
    assert curve(again.metrics) == undisturbed
    assert [(phase, step) for phase, step, *_ in curve(again.metrics)] == [
        *(("sft", step) for step in range(1, 21)),
        ("grpo", 1),
        ("grpo", 2),
    ]


def test_a_restarted_node_does_not_change_the_metrics(
    quickstart: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    with Nodes(quickstart, "lost-node", nodes=2) as nodes:
        nodes.wait_for(step=7)
        nodes.lose(1)
        seen = len(rows(nodes.metrics))
        nodes.start_again(1)
        nodes.finish()
    assert seen < len(undisturbed)  # it was in the middle
    assert curve(nodes.metrics) == undisturbed


def test_four_nodes_that_lose_one_equal_one_node_with_four_ranks(
    quickstart: Path,
) -> None:
    with Nodes(quickstart, "four-ranks", nodes=1, ranks=4, more=SFT_ALONE) as alone:
        alone.finish()
    with Nodes(quickstart, "four-nodes", nodes=4, more=SFT_ALONE) as nodes:
        nodes.wait_for(step=3)
        nodes.lose(2)
        nodes.start_again(2)
        nodes.finish()
    assert curve(nodes.metrics) == curve(alone.metrics)
    assert [step for _, step, *_ in curve(alone.metrics)] == list(range(1, 7))
