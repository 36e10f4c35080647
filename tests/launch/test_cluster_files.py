"""launch/kubernetes.yaml and launch/skypilot.yaml: the schema, and the command of each node."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = ("train.sh", "rollout_worker.sh")


def lost(written: Any, read: Any, path: str = "") -> list[str]:
    """Return the paths in `written` that `read` lacks or has with another value."""
    if isinstance(written, dict):
        return [
            found
            for key, value in written.items()
            for found in (
                lost(value, read[key], f"{path}.{key}") if key in read else [f"{path}.{key}"]
            )
        ]
    if isinstance(written, list):
        pairs = enumerate(zip(written, read, strict=True))
        return [found for i, (a, b) in pairs for found in lost(a, b, f"{path}[{i}]")]
    return [] if written == read else [path]


def commands(folder: Path, script: str, environment: dict[str, str]) -> str:
    """Run `script` in bash with launch scripts that print their settings and arguments."""
    (folder / "launch").mkdir(exist_ok=True)
    for name in SCRIPTS:
        printer = folder / "launch" / name
        printer.write_text(
            f'#!/usr/bin/env bash\necho {name} "${{NNODES:-}}" "${{NODE_RANK:-}}" '
            '"${MASTER_ADDR:-}:${MASTER_PORT:-}" "$@"\n'
        )
        printer.chmod(0o755)
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def job_set() -> dict[str, Any]:
    """Return launch/kubernetes.yaml."""
    loaded: dict[str, Any] = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    return loaded


def test_the_job_set_is_one_by_its_schema() -> None:
    written = job_set()
    read = JobsetV1alpha2JobSet.from_dict(written)
    assert read is not None
    assert lost(written, read.to_dict()) == []
    assert lost(written | {"kindd": "JobSet"}, read.to_dict()) == [".kindd"]


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("trainer", "train.sh 2 1 megatron-vrl-trainer-0-0.megatron-vrl:29500 --config "),
        ("worker", "rollout_worker.sh 2  megatron-vrl-trainer-0-0.megatron-vrl:29500 --config "),
    ],
)
def test_a_pod_of_the_job_set_starts_its_script(tmp_path: Path, job: str, expected: str) -> None:
    (spec,) = [j for j in job_set()["spec"]["replicatedJobs"] if j["name"] == job]
    indexed = spec["template"]["spec"]
    assert indexed["parallelism"] == indexed["completions"]
    (container,) = indexed["template"]["spec"]["containers"]
    environment = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    if job == "trainer":
        assert environment["NNODES"] == str(indexed["completions"])
    environment |= {"JOB_COMPLETION_INDEX": "1", "POD_IP": "10.0.0.7"}
    (script,) = container["args"]
    printed = commands(tmp_path, script, environment)
    assert printed.startswith(expected)
    assert "rollout.placement=workers rollout.discovery_dir=/shared/workers" in printed
    assert ("--host 10.0.0.7" in printed) == (job == "worker")


@pytest.mark.parametrize(
    ("rank", "rollout_nodes", "expected"),
    [
        (0, 1, "train.sh 2 0 10.0.0.1:29500 --config c.yaml"),
        (1, 1, "train.sh 2 1 10.0.0.1:29500 --config c.yaml"),
        (2, 1, "rollout_worker.sh   : --config c.yaml"),
        (2, 0, "train.sh 3 2 10.0.0.1:29500 --config c.yaml"),
    ],
)
def test_a_node_of_the_skypilot_task_starts_its_script(
    tmp_path: Path, rank: int, rollout_nodes: int, expected: str
) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    script = task["run"].replace("/opt/megatron_vrl", str(tmp_path))
    environment = {
        "CONFIG": "c.yaml",
        "ROLLOUT_NODES": str(rollout_nodes),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3",
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_NODES": "3",
    }
    printed = commands(tmp_path, script, environment)
    assert printed.startswith(expected)
    assert ("rollout.placement=workers" in printed) == (rollout_nodes > 0)
    assert printed.endswith("--host 10.0.0.3") == (rank == 2 and rollout_nodes == 1)
