"""report.html: built from the files of finished, running, stopped and failed runs."""

import json
import os
import re
import socket
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vrl.config import Observe
from megatron_vrl.errors import UserError
from megatron_vrl.observe.metrics import StepMetrics
from megatron_vrl.observe.report import MAX_SAMPLES, build_report
from megatron_vrl.observe.samples import CELL_PX, CELLS, Answer, LoggedSample, picture_of, strip
from megatron_vrl.observe.sinks import open_sinks
from megatron_vrl.observe.summary import write_summary
from megatron_vrl.process.run_lock import Owner
from megatron_vrl.storage.files import write_error
from tests.tiny import image, video

CLIP = replace(
    video((4, 2, 2), 4.0, 0),
    frames=np.zeros((8, 12, 16, 3), np.uint8),
    timestamps_s=np.arange(8, dtype=np.float64) * 2,
)
HOSTILE = "<script>alert(1)</script> & more"


def answer(start_s: float, text: str = "an answer") -> Answer:
    return Answer(
        text=text,
        intervals_s=((start_s, start_s + 4.0),),
        option="",
        components={"format": 1.0, "temporal_iou": 0.25},
        reward=0.625,
        advantage=-1.5,
        tokens=17,
    )


def logged_sample(step: int, text: str = "an answer") -> LoggedSample:
    return LoggedSample(
        phase="grpo",
        step=step,
        sample_id="clip_1/0",
        task="temporal_grounding",
        question=f"question of step {step}",
        options=(),
        option="",
        intervals_s=((4.0, 8.0),),
        duration_s=16.0,
        answers=(answer(2.0, text), answer(14.0)),
    )


def made_run(out_dir: Path, samples: int = 2) -> Path:
    cfg = Observe(wandb="disabled")
    sinks = open_sinks(out_dir, cfg, {"run": {"seed": 3}}, "run", rank=0)
    for step in range(1, 31):
        values = {"reward/mean": step / 30, "reward/format": 1.0, "response_length/mean": 40 + step}
        values |= {"rollout/zero_variance_groups": 0.5, "rollout/zero_iou_groups": 1 / step}
        seconds = {"rollout": 3.0, "sync": 1.0}
        sinks.write(StepMetrics(phase="grpo", step=step, values=values, seconds=seconds))
    for step in range(1, samples + 1):
        sinks.log_sample(logged_sample(step, HOSTILE), [CLIP])
    sinks.close()
    return out_dir


def summarise(out_dir: Path) -> None:
    write_summary(
        out_dir,
        results={
            "base": {"test": {"temporal_grounding/miou": 0.123, "reward/mean": 0.25}},
            "grpo": {
                "test": {"temporal_grounding/miou": 0.456, "reward/mean": 0.75, "new/metric": 2}
            },
        },
        trivial={"test": {"whole video": {"temporal_grounding/miou": 0.311}}},
        seconds={"grpo": 120.0},
        seed=3,
        peak_rss_bytes=2**30,
    )


class Outline(HTMLParser):
    """Collects unclosed tags and every address that the page loads."""

    VOID = frozenset({"meta", "img", "path", "use", "line"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_well_formed_and_self_contained(tmp_path: Path) -> None:
    made_run(tmp_path)
    summarise(tmp_path)
    outline = Outline()
    outline.feed(build_report(tmp_path).read_text())
    assert outline.open == []
    assert outline.addresses
    assert all(address.startswith(("data:", "#")) for address in outline.addresses)


def test_tables_have_every_stage_and_the_trivial_baseline(tmp_path: Path) -> None:
    made_run(tmp_path)
    summarise(tmp_path)
    page = build_report(tmp_path).read_text()
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("<tr")[1:]]
    assert rows == [
        ["whole video", "31.1", ""],
        ["before training", "12.3", "0.250"],
        ["after GRPO", "45.6", "0.750"],  # "new/metric" is in summary.json alone
    ]
    for shown in ("mIoU", "30 GRPO steps", "seed 3", "2.0 minutes", "1024 MiB"):
        assert shown in page


def test_groups_without_a_signal_have_curves(tmp_path: Path) -> None:
    page = build_report(made_run(tmp_path)).read_text()
    for title in ("groups without a policy gradient", "groups in which no answer overlaps"):
        assert title in page


def test_intervals_are_drawn_on_the_time_axis(tmp_path: Path) -> None:
    page = build_report(made_run(tmp_path, samples=1)).read_text()
    bars = re.findall(r"left:([\d.]+)%;width:([\d.]+)%", page)
    # 4-8 s of 16 s; 2-6 s; 14-18 s, cut at the video's end
    assert bars == [("25.00", "25.00"), ("12.50", "25.00"), ("87.50", "12.50")]
    assert "advantage -1.50" in page and "temporal iou 0.25" in page


def test_best_middle_and_worst_answers_are_first(tmp_path: Path) -> None:
    made_run(tmp_path, samples=0)
    rewards = [0.3, 0.9, 0.1, 0.7, 0.5]
    answers = tuple(replace(answer(2.0, f"earned {r}"), reward=r) for r in rewards)
    sinks = open_sinks(tmp_path, Observe(wandb="disabled"), {}, "run", rank=0, resume=("grpo", 31))
    sinks.log_sample(replace(logged_sample(1), answers=answers), [CLIP])
    sinks.close()
    shown = re.findall(r"earned ([\d.]+)", build_report(tmp_path).read_text())
    assert shown == ["0.9", "0.5", "0.1", "0.7", "0.3"]


def test_text_of_a_model_cannot_become_markup(tmp_path: Path) -> None:
    page = build_report(made_run(tmp_path)).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page


def test_a_run_that_stopped_early_still_has_a_page(tmp_path: Path) -> None:
    page = build_report(made_run(tmp_path)).read_text()
    assert "running (last row" in page
    assert "<table" not in page and "<svg" in page
    assert "rollout 90.0 s" in page and "sync 30.0 s" in page


def test_a_run_that_an_error_ended_shows_it_and_its_results(tmp_path: Path) -> None:
    made_run(tmp_path)
    row = {"phase": "eval", "during": "base", "split": "test", "step": 0, "timing_s": {}}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row | {"temporal_grounding/miou": 0.123}) + "\n")
    write_error(tmp_path, "The disk is <full>.")
    page = build_report(tmp_path).read_text()
    assert "ended by an error" in page and "The disk is &lt;full&gt;." in page
    assert "before training" in page and "12.3" in page
    write_error(tmp_path, "")
    os.utime(tmp_path / "metrics.jsonl", (0, 0))
    assert "stopped early" in build_report(tmp_path).read_text()


def test_many_samples_are_thinned_from_first_to_last(tmp_path: Path) -> None:
    page = build_report(made_run(tmp_path, samples=40)).read_text()
    shown = [int(step) for step in re.findall(r"question of step (\d+)<", page)]
    assert len(shown) == MAX_SAMPLES and shown[0] == 1 and shown[-1] == 40
    assert shown == sorted(set(shown))


def test_a_run_with_metrics_by_their_earlier_names_is_refused(tmp_path: Path) -> None:
    made_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"phase": "grpo", "step": 1, "seconds": {}}\n')
    with pytest.raises(UserError, match=r"no `timing_s`: an earlier version wrote it"):
        build_report(tmp_path)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        build_report(tmp_path)


def test_strip_cells_show_the_frame_of_their_time() -> None:
    grey = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None, None] * 10, (16, 12, 16, 3))
    uneven_s = np.sort(np.random.default_rng(0).uniform(0, 32, 16))
    image = strip(grey, uneven_s, 32.0)
    assert image.size == (CELL_PX * CELLS, CELL_PX * 12 // 16)
    for cell in range(CELLS):
        middle_s = (cell + 0.5) * 32 / CELLS
        expected = min(range(16), key=lambda i: abs(uneven_s[i] - middle_s))
        assert image.getpixel((cell * CELL_PX + CELL_PX // 2, 5)) == (expected * 10,) * 3


def test_sample_rows_point_to_their_strip(tmp_path: Path) -> None:
    made_run(tmp_path, samples=1)
    row = json.loads((tmp_path / "samples.jsonl").read_text())
    assert Image.open(tmp_path / row["strip"]).size[0] == CELL_PX * CELLS
    assert row["answers"][0]["text"] == HOSTILE


def test_summary_names_the_versions_it_ran_with(tmp_path: Path) -> None:
    summarise(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["versions"]["numpy"] == np.__version__
    assert not list(tmp_path.glob("*.tmp"))


def test_run_state_follows_the_lock(tmp_path: Path) -> None:
    made_run(tmp_path)
    os.utime(tmp_path / "metrics.jsonl", (0, 0))  # a long step
    owner = Owner(tmp_path, 0, 0)
    write_error(tmp_path, "left by an earlier start")
    assert f"running (host {socket.gethostname()}, process {os.getpid()}, " in page_of(tmp_path)
    assert "left by an earlier start" not in page_of(tmp_path)
    lease = (tmp_path / "lock" / "holder.json").read_text()
    owner.close()
    assert "ended by an error" in page_of(tmp_path)
    write_error(tmp_path, "")
    os.utime(tmp_path / "metrics.jsonl")
    assert "stopped early (last row 0 s ago)" in page_of(tmp_path)
    (tmp_path / "lock" / "holder.json").write_text(lease)  # as of a process that was killed
    assert "crashed: its process ended without releasing the run directory" in page_of(tmp_path)


def page_of(out_dir: Path) -> str:
    return build_report(out_dir).read_text()


def test_media_are_shown_below_each_other_and_text_alone_without_a_picture(tmp_path: Path) -> None:
    tall, flat = image((4, 2), 1), image((2, 4), 2)
    picture = picture_of([flat, tall, CLIP, *[flat] * 9])
    # images in one row, 320 px for the tall one; a strip of 120 px; nine images in two rows
    assert picture.size == (8 * 160, 320 + 120 + 2 * 80)
    alone = strip(CLIP.frames, CLIP.timestamps_s, 16.0)
    assert picture_of([CLIP], 16.0).tobytes() == alone.tobytes()
    made_run(tmp_path, samples=0)
    sinks = open_sinks(tmp_path, Observe(wandb="disabled"), {}, "run", rank=0, resume=("grpo", 31))
    text = replace(logged_sample(1), duration_s=0.0, intervals_s=(), question="by text alone")
    sinks.log_sample(text, ())
    sinks.close()
    page = build_report(tmp_path).read_text()
    assert "by text alone" in page and 'class="ruler' not in page and 'class="strip"' not in page
