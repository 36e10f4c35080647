"""Parts of tools/gpu_check.py: their order, commands, needs and times.

The tiny parts come first, the parts that need most libraries last. `expected` is a guess from what
one H100 measured (docs/results/gpu.md). A part starts only if so many seconds are left.
"""

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL_3B = ROOT / "configs" / "models" / "qwen2.5-vl-3b.json"
TESTS = ("pytest", "hypothesis", "psutil")  # that tests/conftest.py imports
SMALL = (  # sizes of a tiny update
    *("--frames", "4", "--height", "112", "--width", "112"),
    *("--answer-tokens", "8", "--group", "2"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One subprocess of the check."""

    command: tuple[str, ...]  # arguments of Python, which runs in tools/
    expected: float  # seconds that it takes
    limit: float  # seconds after which it is ended
    needs: tuple[str, ...] = ()  # modules
    files: tuple[Path, ...] = ()  # that must be there
    gpu_only: str = ""  # reason why a CPU has no tiny form


def parts_of(model: str, replay: Path, folder: Path, *, tiny: bool) -> dict[str, Part]:
    """Return name -> part, in order. `folder` takes the files that parts make.

    `replay`: a folder of gpu_checks/record.py. `tiny`: small sizes and one round.
    """
    model = str(_tiny_model(folder)) if tiny else model
    return {
        **_training(model, replay, tiny=tiny),
        **_benches(model, tiny=tiny),
        **_libraries(str(folder / "clip.mp4"), tiny=tiny),
    }


def environment() -> dict[str, str]:
    """Return this environment with the repository on the path of imports."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) in paths:
        return dict(os.environ)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *paths]))}


def _training(model: str, replay: Path, *, tiny: bool) -> dict[str, Part]:
    """Return the parts that update, save and resume."""
    large = ("-m", "gpu_checks.large_update", "--model", model)
    against = "equal_transformers" + (" and mixed-False" if tiny else "")
    return {
        "tiny": Part(command=("-m", "gpu_checks.tiny_update"), expected=30, limit=90),
        "transformers": Part(
            command=_pytest(f"{ROOT}/tests/models/qwen2_5_vl/test_against_hf.py", "-k", against),
            expected=30,
            limit=90,
            needs=(*TESTS, "transformers"),
        ),
        "job": Part(
            command=("-m", "gpu_checks.replay_job", str(replay)),
            expected=60,
            limit=180,
            needs=("av", "transformers"),
            files=(replay / "rollouts",),
        ),
        "large": Part(command=(*large, *(SMALL if tiny else ())), expected=90, limit=200),
    }


def _benches(model: str, *, tiny: bool) -> dict[str, Part]:
    """Return the benches of update and head, and the transfer between two processes."""
    sizes = (*SMALL, "--rounds", "1") if tiny else ("--rounds", "3")
    update = ("update", "--model", model, "--micro-batch", "12000", *sizes)
    te = find_spec("transformer_engine") is not None and not tiny
    formats = ("--formats", "bfloat16,delayed,current,blockwise", "--layouts", "shared")
    head = ("--tokens", "256", "--vocab", "2048", "--hidden", "64") if tiny else ()
    parts = {
        "update-full": _bench(*update, "--recompute", "full", expected=50, limit=150),
        "update-none": _bench(
            *update, "--recompute", "none", "--layouts", "shared", expected=40, limit=120
        ),
        "head": _bench("head", *head, *sizes[-2:], expected=30, limit=90),
        "ipc": Part(
            command=_pytest(f"{ROOT}/tests/rollout/test_buckets.py", "-m", "gpu"),
            expected=20,
            limit=60,
            needs=TESTS,
            gpu_only="CUDA IPC; tests/rollout/test_buckets.py runs it over shared memory",
        ),
    }
    if te:
        layers = ("--layers", "transformer_engine", "--recompute", "full")
        parts["update-fp8"] = _bench(*update, *formats, *layers, expected=60, limit=150)
    return parts


def _libraries(clip: str, *, tiny: bool) -> dict[str, Part]:
    """Return the parts that need vLLM, DALI or the tests' libraries."""
    sizes = ("--hidden", "256", "--layers", "1") if tiny else ("--hidden", "2048", "--layers", "24")
    once = ("--rounds", "1") if tiny else ("--rounds", "3")
    few = ("--prompts", "2", "--group", "2", "--prompt-tokens", "16", "--answer-tokens", "4")
    small = ("--hidden", "512", "--layers", "1", *few)  # vLLM has no CPU kernel for smaller heads
    generate = ("generate", *(small if tiny else (*sizes, "--dtype", "bfloat16")), *once)
    paths = "ours-pyav,ours-dali" if tiny else "ours-pyav,ours-dali,ours-nvdec"
    decode = ("decode", clip, "--paths", paths, *once, *(("--frames", "4") if tiny else ()))
    frames = "60" if tiny else "1350"
    return {
        "generate": _bench(*generate, expected=90, limit=240, needs=("vllm",)),
        "sync": _bench("sync", *sizes, *once, expected=90, limit=240, needs=("vllm",)),
        "clip": Part(command=("-c", _CLIP, clip, frames), expected=20, limit=60, needs=("av",)),
        "decode": _bench(*decode, expected=40, limit=120, needs=("av", "nvidia.dali")),
        "tests": Part(
            command=_pytest("-m", "gpu", f"{ROOT}/tests"),
            expected=120,
            limit=300,
            needs=(*TESTS, "nvidia.dali"),
            gpu_only="the tests marked gpu",
        ),
    }


def _bench(*argv: str, expected: float, limit: float, needs: tuple[str, ...] = ()) -> Part:
    command = (f"{ROOT}/tools/bench.py", *argv, "--json")
    return Part(command=command, expected=expected, limit=limit, needs=needs)


def _pytest(*argv: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-p", "no:warnings", "-p", "no:cacheprovider", *argv)


def _tiny_model(folder: Path) -> Path:
    """Write the 3B model's config.json with small sizes, and return its path."""
    config = json.loads(MODEL_3B.read_text())
    config |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 2048}
    config |= {"vision_start_token_id": 2040, "image_token_id": 2041, "video_token_id": 2042}
    config |= {"bos_token_id": 2043, "eos_token_id": 2044, "vision_end_token_id": 2045}
    config["vision_config"] |= {"depth": 2, "hidden_size": 160, "num_heads": 2}
    config["vision_config"] |= {"intermediate_size": 428, "out_hidden_size": 256}
    config["vision_config"]["fullatt_block_indexes"] = [1]
    path = folder / "tiny.json"
    path.write_text(json.dumps(config))
    return path


_CLIP = """
import sys, av, numpy as np
y, x = np.mgrid[0:720, 0:1280]
with av.open(sys.argv[1], "w") as file:
    stream = file.add_stream("libx264", rate=30, options={"g": "30", "preset": "veryfast"})
    stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
    for i in range(int(sys.argv[2])):
        picture = np.stack([x + 3 * i, y + 2 * i, (x + y) // 2 + i], -1).astype(np.uint8)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
    file.mux(stream.encode())
"""  # 720p in H.264 at 30 frames a second, a key frame a second
