"""tools/check_data.py: every kind of problem is found once and named."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from megatron_vrl.cli import check_data
from megatron_vrl.config import Source, load_config
from megatron_vrl.data.dataset_check import DatasetCheck, num_records
from megatron_vrl.errors import DataError
from tests.running import CONFIG, ROOT, run_here, run_python
from tests.video.conftest import write_clip
from tests.video.oddities import mux, packets

GQA = {
    "question": "what is shown",
    "options": ["(A) a square", "(B) a circle"],
    "duration": 4.0,
    "glue": [[1.0, 2.0]],
    "answer": "(B)",
}


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, Path]:
    """Two annotation files over three clips; every record but the first has a problem."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, frames in {"a.mp4": 64, "b.mp4": 64, "short.mp4": 16}.items():
        write_clip(str(videos / name), num_frames=frames, fps=16, size=(56, 56))
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "link.mp4").symlink_to("/etc/hostname")
    records: list[dict[str, Any]] = [
        {"id": "good", "video": "a.mp4"},
        {"id": "again", "video": "a.mp4"},
        {"id": "short", "video": "short.mp4", "glue": [[1.0, 3.5]]},
        {"id": "empty", "video": "empty.mp4"},
        {"id": "gone", "video": "gone.mp4"},
        {"id": "link", "video": "link.mp4"},
        {"id": "wrong", "video": "b.mp4", "answer": "(F)"},
    ]
    qa, grounding = tmp_path / "qa.json", tmp_path / "grounding.json"
    qa.write_text(json.dumps([GQA | record for record in records]))
    span = {"duration": 4.0, "sentences": ["a square"]}
    grounding.write_text(
        json.dumps({"b": span | {"timestamps": [[0, 1]]}, "a": span | {"timestamps": [[3, 9]]}})
    )
    return qa, grounding


@pytest.mark.slow
def test_every_problem_is_found(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    qa, grounding = dataset
    folder = str(tmp_path / "videos")
    sources = [
        {"json_path": str(qa), "data_folder": folder, "format": "next_gqa"},
        {"json_path": str(grounding), "data_folder": folder, "format": "charades_sta"},
    ]
    out = tmp_path / "problems.jsonl"
    tool = (ROOT / "tools" / "check_data.py", "--config", CONFIG, "--out", out)
    others = ("data.evaluation={}", "data.sft=[]")
    done = run_python(*tool, *others, f"data.train={json.dumps(sources)}")
    assert done.returncode == 1, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = [(Path(row["video"]).name, row["sample"], row["kind"]) for row in rows]
    assert found == [
        ("a.mp4", "again", "duplicate"),
        ("short.mp4", "short", "duration"),
        ("short.mp4", "short", "interval"),
        ("empty.mp4", "empty", "empty"),
        ("gone.mp4", "gone", "missing"),
        ("link.mp4", "link", "outside"),
        ("", "", "annotation"),
        ("a.mp4", "a/0", "interval"),
    ]
    assert all(list(row) == ["phase", "step", "sample", "video", "kind", "reason"] for row in rows)
    assert "8 samples, 3 videos that can be read" in done.stdout
    assert "2 interval (first " in done.stdout
    assert done.stderr.splitlines()[-1] == f"Written: {out}"
    assert "qa.json" in done.stderr  # the progress bar

    sound_source = sources[1] | {"json_path": str(_only_first(grounding))}
    sound = run_python(*tool, "--decode", *others, f"data.train={json.dumps([sound_source])}")
    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert "No problems in 1 sample." in sound.stdout
    assert "Written" not in sound.stderr and not out.exists()


def _check(
    tmp_path: Path,
    records: bytes | dict[str, Any] | list[dict[str, Any]],
    form: str,
    name: str = "a.json",
) -> tuple[int, list[dict[str, Any]], str]:
    """Return (exit code, report rows, stderr) of check_data.py on one file about clips of 4 s."""
    videos = tmp_path / "videos"
    if not videos.exists():
        videos.mkdir()
        write_clip(str(videos / "a.mp4"), num_frames=64, fps=16, size=(56, 56))
    path = tmp_path / name
    path.write_bytes(records if isinstance(records, bytes) else json.dumps(records).encode())
    source = {"json_path": str(path), "data_folder": str(videos), "format": form}
    out = tmp_path / "problems.jsonl"
    options = ("--config", CONFIG, "--out", out, "data.evaluation={}", "data.sft=[]")
    done = run_here(check_data.main, *options, f"data.train={json.dumps([source])}")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return done.returncode, rows, done.stdout + done.stderr


@pytest.mark.parametrize("content", ["null", "{}", "[]", "false", '""'])
def test_a_file_without_records_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    for form in ("charades_sta", "temporal_r1"):
        source = Source(json_path=str(path), data_folder="/data", format=form)
        with pytest.raises(DataError, match=r"a\.json holds no sample\."):
            num_records(source)


def test_times_in_another_unit_are_reported(tmp_path: Path) -> None:
    shares = [
        {"dataset": "x", "video": "a.mp4", "problem": str(i), "solution": [0.5, 3.0 + i / 10]}
        | {"video_length": 4.0}
        for i in range(5)
    ]
    code, rows, screen = _check(tmp_path, shares, "temporal_r1")
    assert code == 1
    assert [row["kind"] for row in rows] == ["interval"] * 5 + ["unit"]
    assert "5 of 5 intervals end past their video's end (first 'a.mp4/0', 'a.mp4/1', " in screen
    assert "5 interval (first a.mp4/0, a.mp4/1, a.mp4/2), 1 unit" in screen
    tvg = [{"path": "x/a.mp4", "question": "q", "answer": "3.5-1.0", "duration": 4.0}]
    code, rows, _ = _check(tmp_path, tvg, "tvgbench")
    assert (code, [row["kind"] for row in rows]) == (1, ["interval", "reversed"])


def test_records_are_accepted_and_rejected_as_in_training(tmp_path: Path) -> None:
    record = GQA | {"id": "1", "video": "a.mp4"}
    line = json.dumps(record).encode()
    code, rows, screen = _check(tmp_path, line + b"\n" + line[:-20], "next_gqa", "a.jsonl")
    assert (code, rows) == (2, []) and "a.jsonl, line 2 is not JSON: " in screen
    code, rows, screen = _check(tmp_path, {"a": {"duration": 4.0}}, "next_gqa")
    assert (code, rows) == (2, [])
    assert "a.json does not look like next_gqa (a list): it holds an object." in screen
    odd = json.dumps(record | {"question": "a\u2028b"}, ensure_ascii=False).encode()
    same_id = json.dumps(record | {"question": "another"}).encode()
    blank = json.dumps(record | {"id": "2", "question": " "}).encode()
    content = b"\xef\xbb\xbf" + b"\r\n".join([odd, b"null", same_id, blank])
    code, rows, _ = _check(tmp_path, content, "next_gqa", "a.jsonl")
    assert code == 1 and [row["kind"] for row in rows] == ["annotation", "duplicate", "annotation"]
    assert rows[0]["reason"].endswith("a.jsonl, line 2 is null, expected an object.")
    assert rows[1]["reason"] == "1: an earlier question of the file has the same id."


def test_rows_of_a_table_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    prompts = [[{"role": "user", "content": "what is shown"}]] * 3 + [turns]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images = [["a.png"], [], ["gone.png"], []]
    columns = {"prompt": prompts, "images": images, "answer": ["a square"] * 4}
    parquet.write_table(pa.table(columns), path)
    source = {"json_path": str(path), "data_folder": str(tmp_path), "format": "hf"}
    out = tmp_path / "problems.jsonl"
    options = ("--config", CONFIG, "--out", out, "data.evaluation={}", "data.sft=[]")
    done = run_here(check_data.main, *options, f"data.train={json.dumps([source])}")
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert (done.returncode, [row["kind"] for row in found]) == (1, ["missing", "annotation"])
    assert found[0]["video"] == str(tmp_path / "gone.png")
    assert (
        "record 3: field 'prompt' has the turns ['user', 'assistant', 'user']" in found[1]["reason"]
    )
    assert "3 samples, 0 videos and 1 image that can be read" in done.stdout
    assert "1 sample without a video or an image" in done.stdout

    path.write_bytes(path.read_bytes()[:-20])
    done = run_here(check_data.main, *options, f"data.train={json.dumps([source])}")
    assert done.returncode == 2 and "rows.parquet is no readable table (" in done.stderr


def test_pictures_that_start_late_are_reported_once(tmp_path: Path) -> None:
    mux(str(tmp_path / "late.mp4"), ["audio", list(packets("libx264"))], seconds=2.0)
    record = {"duration": 2.5, "timestamps": [[0, 1], [1, 2]], "sentences": ["a", "b"]}
    (tmp_path / "late.json").write_text(json.dumps({"late": record}))
    source = {
        "json_path": str(tmp_path / "late.json"),
        "data_folder": str(tmp_path),
        "format": "charades_sta",
    }
    cfg = load_config(str(CONFIG), [f"data.train={json.dumps([source])}"])
    problems = [p for of in DatasetCheck(cfg, False).problems(cfg.data.train[0]) for p in of]
    assert [(p.sample, p.kind) for p in problems] == [("late/0", "times")]
    assert "late.mp4: its first picture is shown 2." in problems[0].reason


def _only_first(path: Path) -> Path:
    records = json.loads(path.read_text())
    path.write_text(json.dumps(dict(list(records.items())[:1])))
    return path
