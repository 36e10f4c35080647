"""The main job on rows of any media, on two ranks: warm-up, GRPO with the engine, evaluation."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image
from pyarrow import parquet

from tests.running import ENVIRONMENT, SHORT, train_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PROMPTS = (  # text, videos, images
    ("<video>Which shape is shown?", 1, 0),
    ("Is <image> or <image> red?", 0, 2),
    ("Which colour has <image> at the end of <video>?", 1, 1),
    ("What is 12 * 12?", 0, 0),
)
MIXED = (
    "sft.steps=2",
    "sft.batch_size=4",
    "sft.stop_metric=''",
    "grpo.steps=2",
    "rollout.prompts_per_step=4",
    "rollout.max_response_tokens=16",
    "evaluation.max_response_tokens=16",
    "algorithm.kl=0.01",
    "algorithm.drop_zero_variance_groups=false",
    "data.system_prompt=think_text",
    "data.max_prompt_tokens=256",
    "data.image_max_pixels=3136",
    "observe.wandb=disabled",
)


def make_rows(folder: Path, videos: Path) -> Path:
    """Return a table of 16 rows in a folder with their files."""
    rng = np.random.default_rng(0)
    clips = sorted(videos.glob("train_*.mp4"))
    rows: dict[str, list[object]] = {"prompt": [], "videos": [], "images": [], "answer": []}
    for number in range(16):
        text, shown, pictures = PROMPTS[number % len(PROMPTS)]
        names = [f"picture-{number}-{index}.png" for index in range(pictures)]
        for name in names:
            pixels = rng.integers(0, 255, (40, 60, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name)
        for clip in clips[:shown]:
            shutil.copy(clip, folder / clip.name)
        rows["prompt"].append(text)
        rows["videos"].append([clip.name for clip in clips[:shown]])
        rows["images"].append(names)
        rows["answer"].append("144")
    parquet.write_table(pa.table(rows), folder / "mixed.parquet")
    return folder / "mixed.parquet"


def test_a_short_run_on_mixed_media(quickstart: Path, tmp_path: Path) -> None:
    table = make_rows(tmp_path, quickstart / "runs/quickstart/data/videos")
    source = {"json_path": str(table), "data_folder": str(tmp_path), "format": "hf"}
    data = yaml.safe_dump([source], default_flow_style=True).strip()
    sources = [f"data.sft={data}", f"data.train={data}", f"data.evaluation={{heldout: {data}}}"]
    command = train_command(*SHORT, *MIXED, *sources, "run.out_dir=runs/mixed", ranks=2)
    run = subprocess.run(command, cwd=quickstart, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    out = quickstart / "runs" / "mixed"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["phase"] == "grpo"]
    assert len(steps) == 2
    assert all(row["rollout/logprob_gap_max"] < 1e-4 for row in steps)  # every form of prompt
    assert all(row["data/bad_samples"] == 0 for row in steps)
    summary = json.loads((out / "summary.json").read_text())["results"]["grpo"]["heldout"]
    assert summary["num_samples"] == 16
    assert (out / "report.html").stat().st_size > 10_000
