"""Contract of a model family, for every row of the registry, on the files of configs/models/."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vrl.config import Model
from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.activations import Kernels
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.models.chunk import Chunk, whole_model
from megatron_vrl.models.families import FAMILIES, family_named, family_of
from megatron_vrl.models.family import prompt_form, released_name
from megatron_vrl.models.matrices import head_weights, language_layer_weights
from megatron_vrl.models.patchify import patchify
from megatron_vrl.models.vision_tower import MERGER
from megatron_vrl.models.weight_map import chunk_rows, hf_shapes, megatron_shape
from megatron_vrl.types import VisualInput
from megatron_vrl.video.rules import TEMPORAL
from tests.tiny import image, video

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "models").glob("*.json"))


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def arch(request: pytest.FixtureRequest) -> Architecture:
    return read_architecture(request.param)


def test_every_family_has_a_config() -> None:
    assert {read_architecture(path).family for path in CONFIGS} == set(FAMILIES)
    for name in FAMILIES:
        assert family_named(name).name == name


def test_sizes_agree_with_the_pixel_rules(arch: Architecture) -> None:
    pixels, tower = family_of(arch).pixels, arch.vision
    assert (pixels.patch, pixels.merge, TEMPORAL) == (
        tower.patch,
        tower.merge,
        tower.temporal_patch,
    )
    assert 2 * sum(arch.mrope_section) == arch.head_dim
    frames = np.zeros((TEMPORAL, 2 * pixels.cell, pixels.cell, 3), np.uint8)
    assert patchify(frames, pixels).shape == (2 * pixels.merge**2, tower.patch_values)
    assert pixels.cell**2 <= pixels.image_min_pixels < pixels.image_max_pixels


def test_a_missing_key_is_named(arch: Architecture, tmp_path: Path) -> None:
    path = next(path for path in CONFIGS if read_architecture(path) == arch)
    raw = json.loads(path.read_text())
    del raw["vision_config"]["depth"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="lacks the key 'depth'"):
        read_architecture(tmp_path)


def test_the_weight_map_covers_every_tensor_once(arch: Architecture) -> None:
    shapes, rows = hf_shapes(arch), chunk_rows(arch, whole_model(arch))
    names = [name for row in rows for name in row.hf_names]
    assert sorted(names) == sorted(shapes)
    assert len({row.megatron for row in rows}) == len(rows)
    for row in rows:
        assert prod(megatron_shape(row, shapes)) == sum(prod(shapes[n]) for n in row.hf_names)
    middle = arch.layers // 2
    first = Chunk(range(middle), pre_process=True, post_process=False)
    last = Chunk(range(middle, arch.layers), pre_process=False, post_process=True)
    split = [row for chunk in (first, last) for row in chunk_rows(arch, chunk)]
    assert sorted(n for row in split if row.exported for n in row.hf_names) == sorted(shapes)


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_restore_the_tensors_of_shards(name: str) -> None:
    large = next(a for a in map(read_architecture, CONFIGS) if a.family == name)
    tower = replace(large.vision, hidden=16, mlp=24, layers=1, heads=2)
    sizes: dict[str, Any] = {
        "hidden": 32,
        "mlp": 48,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "vocab": 64,
    }
    arch = replace(large, **sizes, vision=tower)
    shapes = hf_shapes(arch)
    for row in chunk_rows(arch, Chunk(range(1), pre_process=True, post_process=True)):
        given = [torch.arange(prod(shapes[n])).view(shapes[n]) for n in row.hf_names]
        whole = row.layout.join(given)
        shards = [row.layout.shard(whole, rank, 2) for rank in range(2)]
        back = row.layout.part(row.layout.unshard(shards))
        assert all(map(torch.equal, back, given)), row.megatron


def test_names(arch: Architecture) -> None:
    weights, shapes = family_of(arch).weights, hf_shapes(arch)
    assert weights.embedding in shapes
    assert (weights.head in shapes) is not arch.tied_head
    assert all(released_name(weights, name) == name for name in shapes)
    for prefix, released in weights.released_prefixes.items():
        assert released_name(weights, prefix + "x") == released + "x"
    matrices = [name for name in shapes if weights.language_matrices.fullmatch(name)]
    assert len(matrices) == 7 * arch.layers  # q, k, v, o, gate, up, down
    elements = sum(prod(shapes[name]) for name in matrices)
    assert elements == arch.layers * language_layer_weights(arch)
    assert head_weights(arch) == prod(shapes[weights.embedding])


def test_the_tower_arithmetic_counts_the_matrices(arch: Architecture) -> None:
    tower, shapes = family_of(arch).tower, hf_shapes(arch)
    rows = chunk_rows(arch, Chunk(range(0), pre_process=True, post_process=False))
    found = {True: 0, False: 0}
    for row in rows:
        name = row.megatron.removeprefix("vision.")
        is_matrix = name.endswith(".weight") and "norm" not in name and "position" not in name
        if name != row.megatron and is_matrix:  # learned positions are a look-up
            found[name.startswith(MERGER)] += sum(prod(shapes[n]) for n in row.hf_names)
    assert found[False] == tower.tower_weights(arch.vision)
    assert found[True] == tower.merger_weights(arch)
    pairs = tower.attention_pairs(arch.vision, 8, 12)
    assert arch.vision.layers * 96 <= pairs <= arch.vision.layers * 96**2
    block = tower.block(arch, Model(checkpoint=""), 96, Kernels())
    assert (block.rows, block.channels) == (96, arch.vision.hidden)
    assert tower.merger_saved(arch, block) > 0


def _tokenize(text: str) -> list[int]:
    return [ord(character) for character in text]


@pytest.mark.parametrize("timestamps", ["none", "interleaved"])
def test_a_prompt_is_expanded_and_has_positions(arch: Architecture, timestamps: str) -> None:
    form, merge = prompt_form(family_of(arch), timestamps), arch.vision.merge
    visuals = (video((3, 4, 6), 1.0, 0), image((4, 4), 1))
    start, end = arch.vision_start_token, arch.vision_end_token
    rendered = [1]
    for part in (part for visual in visuals for part in form.parts(visual)):
        pad = arch.video_token if part["type"] == "video" else arch.image_token
        rendered += [2] if part["type"] == "text" else [start, pad, end]
    rendered.append(3)
    ids = np.array(form.expand(rendered, visuals, arch, _tokenize))
    assert (ids == arch.video_token).sum() == 3 * 4 * 6 // merge**2
    assert (ids == arch.image_token).sum() == 4 * 4 // merge**2
    assert ids[0] == 1 and ids[-1] == 3
    at = form.positions(ids, visuals, arch)
    assert at.shape == (3, len(ids)) and at.dtype == np.int64
    is_pad = np.isin(ids, (arch.video_token, arch.image_token))
    assert (at[0] == at[1])[~is_pad].all() and (at[1] == at[2])[~is_pad].all()  # of text
    assert (np.diff(at[0]) >= 0).all() and at[:, 0].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="differ in number"):
        form.positions(ids, visuals[:1], arch)
    assert set(form.stop_tokens) <= set(form.structure_tokens)
    assert form.expand([1, 2], (), arch, _tokenize) == [1, 2]


def test_an_engine_gets_every_frame(arch: Architecture) -> None:
    inputs = family_of(arch).engine
    shown = video((3, 4, 6), 1.0, 0)
    given = VisualInput(
        kind="video",
        frames=shown.frames,
        grid_thw=shown.grid_thw,
        seconds_per_grid=shown.seconds_per_grid,
        timestamps_s=shown.timestamps_s,
    )
    metadata = inputs.video_metadata(given)
    assert metadata["do_sample_frames"] is False
    assert metadata["total_num_frames"] == len(metadata["frames_indices"]) == len(shown.frames)
    module, _, name = inputs.model_class.partition(":")
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    source = Path(vllm.origin).parents[1] / (module.replace(".", "/") + ".py")
    assert f"class {name}(" in source.read_text()


@pytest.mark.slow
def test_families_are_light() -> None:
    """Decoding processes and engines read families without megatron.core."""
    program = (
        "import sys; from megatron_vrl.models.families import FAMILIES, family_named; "
        "[family_named(name) for name in FAMILIES]; print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert not loaded & {"megatron", "vllm", "transformers"}


def _names_a_family(path: Path) -> Iterator[str]:
    """Yield names, imports and texts of code, but no docstrings, that name a family."""
    families = re.compile("|".join(name.replace("_", "[._-]?") for name in FAMILIES), re.I)
    if not families.search(path.read_text()):
        return
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        texts = [
            node.value if isinstance(node, ast.Constant) and id(node) not in docs else None,
            node.id if isinstance(node, ast.Name) else None,
            node.module if isinstance(node, ast.ImportFrom) else None,
            node.name if isinstance(node, ast.alias) else None,
        ]
        yield from (text for text in texts if isinstance(text, str) and families.search(text))


def test_no_other_module_names_a_family() -> None:
    package, registry = ROOT / "megatron_vrl", ROOT / "megatron_vrl/models/families.py"
    folders = [package / "models" / name for name in FAMILIES]
    others = [p for p in package.rglob("*.py") if not any(f in p.parents for f in folders)]
    found = {str(p.relative_to(ROOT)): list(_names_a_family(p)) for p in others if p != registry}
    assert {path: names for path, names in found.items() if names} == {}
    assert list(_names_a_family(registry))  # the check finds what it looks for
