"""tools/gpu_check.py keeps what it has measured, and stays within its time."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import bench
import gpu_check
import psutil
import pytest
from gpu_checks.parts import Part, parts_of

from megatron_vrl.errors import UserError

ROW = {"bench": "first", "median_s": 0.5}
PRINTS = f"print('{json.dumps(ROW)}', flush=True)"


def part(code: str, *, expected: float = 0, limit: float = 60, **rest: Any) -> Part:
    return Part(command=("-c", code), expected=expected, limit=limit, **rest)


def test_finished_parts_are_written_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stops = "import os, signal; os.kill(os.getppid(), signal.SIGINT)"
    parts = {
        "first": part(PRINTS),
        "absent": part("", needs=("no_such_library",)),
        "second": part(f"{stops}; import time; time.sleep(60)"),
    }
    monkeypatch.setattr(gpu_check, "parts_of", lambda *arguments, tiny: parts)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--tiny", "--out", str(out)])
    report = json.loads((out / "gpu-check.json").read_text())
    assert report["rows"] == [
        {"part": "first", "status": "ok", **ROW},
        {"part": "absent", "status": "absent", "message": "no no_such_library here"},
    ]
    assert "| first | ok | median_s 0.5 |" in (out / "gpu-check.md").read_text()


def test_a_part_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    begun = part(f"open('{tmp_path}/begun', 'w')", expected=30)
    (row,) = gpu_check.run_part(begun, left=20, tiny=False)
    assert row == {"status": "not run", "message": "20 s left, about 30 needed"}
    assert not (tmp_path / "begun").exists()


def test_a_part_that_takes_more_than_what_is_left_is_ended() -> None:
    (row,) = gpu_check.run_part(part("import time; time.sleep(600)"), left=0.2, tiny=False)
    assert row == {"status": "too slow", "message": "more than 0 s"}


def test_processes_of_a_part_end_with_it() -> None:
    started = "import json, subprocess; child = subprocess.Popen(['sleep', '600']); "
    code = started + "print(json.dumps({'bench': 'first', 'pid': child.pid}))"
    (row,) = gpu_check.run_part(part(code), left=60, tiny=False)
    deadline = time.monotonic() + 30
    with suppress(psutil.NoSuchProcess):  # whoever inherits it may not have read its end
        while psutil.Process(row["pid"]).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_rows_before_a_failure_are_kept() -> None:
    rows = gpu_check.run_part(part(f"{PRINTS}; raise KeyError('step')"), left=60, tiny=False)
    assert rows == [{"status": "ok", **ROW}, {"status": "failed", "message": "KeyError: 'step'"}]


def test_absent_files_and_parts_for_a_gpu_alone_say_so(tmp_path: Path) -> None:
    missing = part("", files=(tmp_path / "rollouts",))
    assert gpu_check.run_part(missing, left=60, tiny=True) == [
        {"status": "absent", "message": f"no {tmp_path}/rollouts here"}
    ]
    (row,) = gpu_check.run_part(part("", gpu_only="CUDA IPC"), left=60, tiny=True)
    assert row == {"status": "not run", "message": "needs a GPU: CUDA IPC"}


def test_without_a_gpu_only_the_tiny_form_runs() -> None:
    with pytest.raises(UserError, match="torch sees no GPU here"):
        gpu_check.main([])


@pytest.mark.slow  # benches import Megatron
@pytest.mark.parametrize("tiny", [False, True])
def test_every_bench_knows_its_options_and_all_parts_have_a_place(
    tmp_path: Path, tiny: bool
) -> None:
    parts = parts_of("model.json", tmp_path, tmp_path, tiny=tiny)
    assert list(parts)[:4] == ["tiny", "transformers", "job", "large"]
    assert sum(each.expected for each in list(parts.values())[:8]) < 400  # before vLLM
    for each in parts.values():
        assert each.expected < each.limit
        if each.command[0].endswith("/bench.py"):
            bench.make_parser([each.command[1]]).parse_args(each.command[1:])
