"""tools/score_responses.py: transformers' numbers in every layout; mistakes are one sentence."""

import json
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from megatron_vrl.config import Video
from megatron_vrl.errors import EXIT_CODE, UserError
from megatron_vrl.evaluation.logprobs import SAMPLES_AT_A_TIME, score_config, score_file
from megatron_vrl.models.patchify import patchify
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.parallel.mesh import close_mesh
from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops
from megatron_vrl.types import EncodedVideo
from megatron_vrl.video import VideoReader
from megatron_vrl.video.image import read_image, read_image_rules
from tests.running import ROOT, run_python

TOOL = ROOT / "tools" / "score_responses.py"
VIDEO = ("video.decoder=pyav", "video.min_pixels=784", "video.max_pixels=6272")
SAMPLES = [  # id, videos, images, response
    ("text", [], [], "red"),
    ("image", [], ["i.png"], "a blue square"),
    ("video", ["a.mp4"], [], '{"start": 1, "end": 3}'),
    ("two videos", ["a.mp4", "b.mp4"], [], ""),
    ("video and image", ["b.mp4"], ["i.png"], "the second one"),
]


def clip(path: Path, frames: int, height: int, width: int, rate: int) -> None:
    rng = np.random.default_rng(frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(frames):
            blocks = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            picture = blocks.repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, two clips, an image and `samples.jsonl` that asks about them."""
    folder = tmp_path_factory.mktemp("scoring")
    made = run_python(ROOT / "tools/make_tiny_model.py", "--out", folder / "hf", "--layers", 4,
                      "--max-pixels", 6272)  # fmt: skip
    assert made.returncode == 0, made.stderr
    clip(folder / "a.mp4", 40, 56, 112, 8)
    clip(folder / "b.mp4", 21, 112, 56, 6)  # 7 frames: seconds per step that float32 rounds
    noise = np.random.default_rng(0).integers(0, 256, (84, 56, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "i.png")
    write(folder / "samples.jsonl", [sample(folder, *asked) for asked in SAMPLES])
    return folder


def sample(
    folder: Path, name: str, videos: list[str], images: list[str], response: str
) -> dict[str, Any]:
    return {
        "id": name,
        "system": None if images else "Look well.",
        "videos": [str(folder / file) for file in videos],
        "images": [str(folder / file) for file in images],
        "question": f"which colour is the {name}?",
        "response": response,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(folder: Path, samples: Path, out: Path, *overrides: str) -> list[dict[str, Any]]:
    """Return the scorer of this process."""
    try:
        score_file(score_config(str(folder / "hf"), [*VIDEO, *overrides]), samples, out)
    finally:
        if dist.is_initialized():
            close_mesh()
    return read(out)


@pytest.fixture(scope="module")
def one(folder: Path) -> list[dict[str, Any]]:
    """The rows of one process."""
    return score(folder, folder / "samples.jsonl", folder / "one.jsonl")


def launched(
    folder: Path, out: Path, samples: Path, *overrides: str
) -> subprocess.CompletedProcess[str]:
    return run_python(
        *("launch/torchrun.py", "--standalone", "--nproc-per-node", 2, TOOL),
        *("--checkpoint", folder / "hf", "--samples", samples, "--out", out, *VIDEO, *overrides),
    )


# ---- the numbers


def pixels(folder: Path, asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    """transformers' arguments for the visuals of a sample."""
    given: dict[str, list[Any]] = {}
    if asked["videos"]:
        cfg = Video(decoder="pyav", min_pixels=784, max_pixels=6272)
        found = VideoReader(cfg, PIXELS).encode(asked["videos"])
        videos = [video for video in found if isinstance(video, EncodedVideo)]
        assert len(videos) == len(found)
        given["pixel_values_videos"] = [patchify(video.frames, PIXELS) for video in videos]
        given["video_grid_thw"] = [video.grid_thw for video in videos]
    if asked["images"]:
        rules = read_image_rules(folder / "hf", PIXELS)
        images = [read_image(path, rules) for path in asked["images"]]
        given["pixel_values"] = [patchify(image.frames, PIXELS) for image in images]
        given["image_grid_thw"] = [image.grid_thw for image in images]
    return {
        name: torch.cat(value) if "pixel" in name else torch.tensor(value)
        for name, value in given.items()
    }


@torch.no_grad()
@pytest.mark.slow
def test_log_probs_equal_transformers(folder: Path, one: list[dict[str, Any]]) -> None:
    declare_missing_ops()
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "hf").eval()
    for asked, row in zip(read(folder / "samples.jsonl"), one, strict=True):
        assert row["id"] == asked["id"]
        ids = torch.tensor(row["prompt_token_ids"] + row["response_token_ids"])
        response = torch.tensor(row["response_token_ids"])
        is_video, is_image = ids == model.config.video_token_id, ids == model.config.image_token_id
        logits = model(
            input_ids=ids[None],
            position_ids=torch.tensor(row["positions"])[:, None],
            mm_token_type_ids=(is_video * 2 + is_image * 1)[None],
            **pixels(folder, asked),
        ).logits[0]
        wanted = torch.log_softmax(logits[-len(response) - 1 : -1].double(), -1)
        wanted = wanted.gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(row["logprobs"], dtype=torch.float64), wanted, rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
def test_a_row_says_what_was_scored(folder: Path, one: list[dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    for asked, row in zip(read(folder / "samples.jsonl"), one, strict=True):
        prompt = tokenizer.decode(row["prompt_token_ids"])
        assert isinstance(prompt, str)
        assert ("You are a helpful assistant." in prompt) == (asked["system"] is None)
        assert ("Look well." in prompt) == (asked["system"] is not None)
        shown = [prompt.rfind(part) for part in ("<|video_pad|>", "<|image_pad|>", "which colour")]
        assert [place for place in shown if place >= 0] == sorted(p for p in shown if p >= 0)
        assert tokenizer.decode(row["response_token_ids"]) == asked["response"] + "<|im_end|>"
        length = len(row["prompt_token_ids"]) + len(row["response_token_ids"])
        assert [len(axis) for axis in row["positions"]] == [length] * 3
        assert len(row["logprobs"]) == len(row["response_token_ids"])


@pytest.mark.slow
def test_several_blocks_keep_the_order(
    folder: Path, one: list[dict[str, Any]], tmp_path: Path
) -> None:
    asked = read(folder / "samples.jsonl")
    many = [{**asked[i % 5], "id": f"{i}"} for i in range(2 * SAMPLES_AT_A_TIME + 3)]
    rows = score(
        folder, write(tmp_path / "many.jsonl", many), tmp_path / "out.jsonl", "batch.tokens=100"
    )
    assert [row["id"] for row in rows] == [row["id"] for row in many]
    for i, row in enumerate(rows):
        assert row["prompt_token_ids"] == one[i % 5]["prompt_token_ids"]
        np.testing.assert_allclose(row["logprobs"], one[i % 5]["logprobs"], rtol=1e-5)


@pytest.mark.slow
def test_a_megatron_checkpoint_gives_the_same(
    folder: Path, one: list[dict[str, Any]], tmp_path: Path
) -> None:
    convert = ROOT / "tools" / "convert_checkpoint.py"
    made = run_python(convert, "hf-to-megatron", folder / "hf", tmp_path / "hf")
    assert made.returncode == 0, made.stderr
    assert score(tmp_path, folder / "samples.jsonl", tmp_path / "out.jsonl") == one


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.pipeline=2", "parallel.virtual=2", "batch.tokens=100"],
        ["parallel.context=2"],
        ["batch.tokens=100"],  # two replicas, five samples
    ],
    ids=["tensor", "virtual", "context", "data"],
)
def test_every_layout_equals_one_process(
    folder: Path, one: list[dict[str, Any]], tmp_path: Path, layout: list[str]
) -> None:
    out = tmp_path / "out.jsonl"
    done = launched(folder, out, folder / "samples.jsonl", *layout)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read(out)
    for row, wanted in zip(rows, one, strict=True):
        np.testing.assert_allclose(row.pop("logprobs"), wanted["logprobs"], rtol=1e-5)
        assert row == {name: value for name, value in wanted.items() if name != "logprobs"}
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_special_tokens_in_a_text_are_text(folder: Path, tmp_path: Path) -> None:
    """Special tokens in texts score as the letters they are spelled with, and show no video."""
    from transformers import AutoTokenizer

    asked = {"id": "a", "question": "is <|video_pad|> red<|im_end|>?", "response": "<|im_end|> no"}
    (row,) = score(folder, write(tmp_path / "samples.jsonl", [asked]), tmp_path / "out.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    spelled = tokenizer(asked["response"], split_special_tokens=True)["input_ids"]
    assert row["response_token_ids"] == [*spelled, tokenizer.eos_token_id]
    prompt = row["prompt_token_ids"]
    assert asked["question"] in tokenizer.decode(prompt, skip_special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") not in prompt
    assert prompt.count(tokenizer.eos_token_id) == 2  # of the system's turn and of the user's
    assert len(row["positions"][0]) == len(prompt) + len(row["response_token_ids"])
    assert np.isfinite(row["logprobs"]).all()


# ---- what a user can get wrong


GOOD = {"id": "a", "question": "which?", "response": "red"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"id": "b"', "samples.jsonl, line 2 is not JSON"),
        ("[1]", "samples.jsonl, line 2 holds list; write one object a line."),
        ('{"id": "b", "question": "?"}', "line 2: 'response' is missing; every sample has one."),
        (GOOD | {"video": []}, "line 2: unknown key 'video'; did you mean 'videos'?"),
        (GOOD | {"id": 3}, "line 2: id=3 is refused: Input should be a valid string."),
        (GOOD | {"videos": ["no.mp4"]}, "line 2: there is no file no.mp4; correct 'videos'"),
        (GOOD | {"images": ["no.png"]}, "line 2: there is no file no.png; correct 'images'"),
        (GOOD | {"question": "\ud800"}, "line 2) holds '\\ud800', half of a surrogate pair"),
        (GOOD | {"question": "why " * 4096}, "over data.max_prompt_tokens=4096: raise it"),
        (GOOD | {"videos": [__file__]}, f"Sample a: {__file__} "),
        (GOOD | {"images": [__file__]}, f"Sample a: {__file__} cannot be read as an"),
    ],
)
def test_a_bad_sample_is_named_and_nothing_is_written(
    folder: Path, tmp_path: Path, line: dict[str, Any] | str, sentence: str
) -> None:
    samples = tmp_path / "samples.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    samples.write_text(f"{json.dumps(GOOD)}\n{text}\n")
    (tmp_path / "out.jsonl").write_text("old")
    with pytest.raises(UserError) as error:
        score(folder, samples, tmp_path / "out.jsonl", "data.max_prompt_tokens=4096")
    assert sentence in str(error.value)
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_files_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    samples = folder / "samples.jsonl"
    empty = write(tmp_path / "empty.jsonl", [])
    for asked, out, sentence in (
        (tmp_path / "absent.jsonl", tmp_path / "out", "cannot be read (No such file or directory)"),
        (empty, tmp_path / "out", "holds no samples; write one JSON object a line."),
        (samples, tmp_path / "no" / "out", "cannot be written (No such file or directory); give"),
        (samples, tmp_path, "is a directory; give the name of a file."),
    ):
        with pytest.raises(UserError) as error:
            score(folder, asked, out)
        assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("paralel.tensor=2", "Command line: unknown key 'paralel'; did you mean 'parallel'?"),
        (
            "parallel.tensr=2",
            "Command line: unknown key 'parallel.tensr'; did you mean 'parallel.tensor'?",
        ),
        (
            "data.train=[]",
            "unknown key 'data.train'; known: image_max_pixels, image_min_pixels, "
            "max_prompt_tokens, timestamps.",
        ),
        ("rollout.temperature=2", "unknown key 'rollout'; known: batch, data, model, parallel"),
        ("batch.tokens=0", "Command line: batch.tokens must be more than 0, not 0."),
        ("model.checkpoint=b", "model.checkpoint=b is not --checkpoint"),
        ("parallel.tensor=2", "needs a multiple of 2 processes, not 1"),
    ],
)
def test_a_bad_override_is_named(
    folder: Path, tmp_path: Path, override: str, sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        score(folder, folder / "samples.jsonl", tmp_path / "out.jsonl", override)
    assert sentence in str(error.value)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Give a checkpoint"):
        score_config(str(tmp_path), [])


@pytest.mark.slow
def test_ranks_fail_together(folder: Path, tmp_path: Path) -> None:
    """One rank alone meets the broken clip, in the middle of the job."""
    asked: list[dict[str, Any]] = [GOOD | {"id": f"{i}"} for i in range(40)]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    asked[35]["videos"] = [str(tmp_path / "broken.mp4")]
    done = launched(folder, tmp_path / "out.jsonl", write(tmp_path / "bad.jsonl", asked))
    assert done.returncode == EXIT_CODE, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: Sample 35: ") and "broken.mp4" in line
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))
