"""tools/gpu_check.py keeps what it has measured."""

import json
from pathlib import Path

import gpu_check
import pytest


def test_finished_parts_are_written_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    row = {"bench": "first", "median_s": 0.5}
    stops = "import os, signal; os.kill(os.getppid(), signal.SIGINT)"
    parts = {
        "first": ((), 60, ["-c", f"print('{json.dumps(row)}')"]),
        "absent": (("no_such_library",), 60, []),
        "second": ((), 60, ["-c", f"{stops}; import time; time.sleep(60)"]),
    }
    monkeypatch.setattr(gpu_check, "_parts", lambda model, folder: parts)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--out", str(out)])
    report = json.loads((out / "gpu-check.json").read_text())
    assert report["rows"] == [
        {"part": "first", "status": "ok", **row},
        {"part": "absent", "status": "absent", "message": "no no_such_library here"},
    ]
    assert "| first | ok | median_s 0.5 |" in (out / "gpu-check.md").read_text()
