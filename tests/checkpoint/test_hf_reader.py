"""The reader of Hugging Face folders: only the tensors that the index names, and all of them.

What is read is compared with safetensors' own `load_file`; sources are folders that transformers
wrote.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vrl.checkpoint.convert import compare, convert_to_megatron, stored_tensors
from megatron_vrl.checkpoint.hf_reader import HFCheckpoint, copy_side_files
from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.storage.hf_files import INDEX
from tests.tiny_models import hf_model, save

Tensors = dict[str, torch.Tensor]  # of a file, by name
EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(tmp_path_factory, tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(tmp_path_factory, tied=True)


def _saved(tmp_path_factory: pytest.TempPathFactory, tied: bool) -> Path:
    folder = save(hf_model(tied=tied), tmp_path_factory.mktemp("reader") / "hf")
    tensors = {_published(n): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _published(name: str) -> str:
    return name.removeprefix("model.") if name.startswith("model.visual") else name


@pytest.fixture
def copy(untied: Path, tmp_path: Path) -> Path:
    return shutil.copytree(untied, tmp_path / "copy")


@pytest.fixture
def tied_copy(tied: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tied, tmp_path / "tied")


@pytest.fixture
def sharded(copy: Path) -> Path:
    """Two shards and an index."""
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard, part in (("1", names[::2]), ("2", names[1::2])):
        file = f"model-0000{shard}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, copy / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return copy


def changed(
    folder: Path, change: Callable[[Tensors], object], file: str = "model.safetensors"
) -> Path:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def reader(folder: Path) -> HFCheckpoint:
    return HFCheckpoint(folder, read_architecture(folder))


def assert_reads(folder: Path, tensors: Tensors) -> None:
    """Every way of reading gives these tensors."""
    read = dict(stored_tensors(folder))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


# ---- which files


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model-00002-of-00003.safetensors", "zz.safetensors", "a.safetensors"],
)
def test_files_that_the_index_does_not_name_are_not_read(
    untied: Path, sharded: Path, name: str
) -> None:
    tensors = load_file(untied / "model.safetensors")
    save_file(zeros(tensors), sharded / name, metadata={"format": "pt"})
    assert_reads(sharded, tensors)
    assert compare(untied, sharded) == len(tensors)


def test_a_damaged_file_that_the_index_does_not_name_is_not_opened(
    untied: Path, sharded: Path
) -> None:
    (sharded / "model-00003-of-00003.safetensors").write_bytes(b"cut")
    assert_reads(sharded, load_file(untied / "model.safetensors"))


def test_without_an_index_other_files_are_not_read(untied: Path, copy: Path) -> None:
    tensors = load_file(untied / "model.safetensors")
    save_file(zeros(tensors), copy / "zz.safetensors")
    assert_reads(copy, tensors)


SECOND = "model-00002-of-00002.safetensors"


def edited(**shards: str | None) -> Callable[[Path], None]:
    """A change of the index: tensors to shards; None takes a tensor out."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        for name, shard in shards.items():
            index["weight_map"].pop(name) if shard is None else None
            index["weight_map"] |= {name: shard} if shard else {}
        (folder / INDEX).write_text(json.dumps(index))

    return change


def test_a_copy_in_another_shard_is_not_read(untied: Path, sharded: Path) -> None:
    first, second = (load_file(f) for f in sorted(sharded.glob("model-*.safetensors")))
    save_file(second | zeros(first), sharded / SECOND, metadata={"format": "pt"})
    assert_reads(sharded, load_file(untied / "model.safetensors"))


FILE_MISTAKES = {
    "no index": (lambda d: (d / INDEX).unlink(), f"and 1 more but no model.safet.*no {INDEX}"),
    "index without names": (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), "is damaged"),
    "index of lists": (lambda d: (d / INDEX).write_text('{"weight_map": [1]}'), "is damaged"),
    "index is a list": (lambda d: (d / INDEX).write_text("[]"), "is damaged"),
    "index of numbers": (lambda d: (d / INDEX).write_text('{"weight_map": {"a": 1}}'), "damaged"),
    "index leads out": (edited(a="../model.safetensors"), "which is no file beside it"),
    "index names more": (edited(more=SECOND), f"lacks the tensor more, which {INDEX} expects"),
    "index names less": (edited(**{NORM: None}), rf"holds {NORM}, which {INDEX} does not name"),
    "empty shard": (lambda d: (d / SECOND).write_bytes(b""), f"{SECOND} is damaged"),
    "no header": (lambda d: (d / SECOND).write_bytes(b"\xff" * 64), f"{SECOND} is damaged"),
    "a header of words": (
        lambda d: (d / SECOND).write_bytes((9).to_bytes(8, "little") + b"not JSON."),
        f"{SECOND} is damaged",
    ),
    "shard is a directory": (
        lambda d: ((d / SECOND).unlink(), (d / SECOND).mkdir()),
        f"{SECOND} is damaged",
    ),
    "pointer of Git LFS": (
        lambda d: (d / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "a Git LFS pointer: run git lfs pull",
    ),
    "adapter": (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        r"holds an adapter \(adapter_config.json\).*merge it",
    ),
    "adapter without config": (
        lambda d: save_file({"a": torch.zeros(1)}, d / "adapter_model.safetensors"),
        r"holds an adapter \(adapter_model.safetensors\)",
    ),
}


@pytest.mark.parametrize(("spoil", "sentence"), FILE_MISTAKES.values(), ids=FILE_MISTAKES)
def test_mistakes_in_files_are_one_sentence(
    sharded: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    spoil(sharded)
    with pytest.raises(CheckpointError, match=sentence) as error:
        reader(sharded)
    assert "\n" not in str(error.value)


def test_a_single_file_beside_shards_of_another_save_is_refused(copy: Path) -> None:
    save_file({"a": torch.zeros(1)}, copy / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"of-00002\.safetensors beside model\.safetens"):
        reader(copy)


def test_a_checkpoint_of_pickled_weights_only_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"but pytorch_model\.bin, which is not read"):
        reader(copy)


def test_weight_files_are_not_copied_as_side_files(copy: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", INDEX, "model.gguf"):
        (copy / name).write_text("{}")
    (copy / "merges.txt").write_text("")
    copy_side_files(copy, tmp_path / "side")
    kept = {file.name for file in (tmp_path / "side").iterdir()}
    assert kept == {"config.json", "generation_config.json", "merges.txt"}


# ---- which tensors


def scaled(suffix: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[QUERY] = (tensors[QUERY] * 100).to(dtype)
        tensors[QUERY.removesuffix("weight") + suffix] = torch.ones(64)

    return change


def packed(suffix: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[QUERY]
        tensors[QUERY.removesuffix("weight") + suffix] = torch.zeros(8, 64, dtype=torch.int32)

    return change


TENSOR_MISTAKES = {
    "fp8, compressed-tensors": (scaled("weight_scale", torch.float8_e4m3fn), "quantised"),
    "fp8, DeepSeek": (scaled("weight_scale_inv", torch.float8_e4m3fn), "quantised"),
    "int8, bitsandbytes": (scaled("SCB", torch.int8), "quantised"),
    "nf4": (scaled("weight.absmax", torch.uint8), "quantised"),
    "rounded, scale beside": (scaled("weight_scale", torch.bfloat16), "quantised"),
    "GPTQ": (packed("qweight"), "quantised"),
    "packed": (packed("weight_packed"), "quantised"),
    "fp8 alone": (
        lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)}),
        f"stores {QUERY} as F8_E4M3, which is not read",
    ),
    "int8 alone": (lambda t: t.update({QUERY: t[QUERY].to(torch.int8)}), f"stores {QUERY} as I8"),
    "double": (lambda t: t.update({NORM: t[NORM].double()}), f"stores {NORM} as F64"),
    "missing": (lambda t: t.pop(QUERY), f"lacks the tensor {QUERY}"),
    "missing head": (lambda t: t.pop("lm_head.weight"), "lacks the tensor lm_head.weight"),
    "left over": (lambda t: t.update(value_head=torch.zeros(1)), "holds value_head, which the mod"),
    "a layer too many": (
        lambda t: t.update({NORM.replace("norm", "layers.4.norm"): torch.zeros(1)}),
        "holds model.layers.4.norm.weight, which the model",
    ),
    "another shape": (lambda t: t.update({NORM: torch.zeros(8, 8)}), r"shape \[8, 8\].*\[64\]"),
    "both generations": (
        lambda t: t.update({"model.language_model.norm.weight": torch.zeros(64)}),
        "is the same tensor as",
    ),
    "names of a wrapper": (
        lambda t: [t.update({f"module.{n}": t.pop(n)}) for n in list(t)],
        "lacks the tensor model.",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), TENSOR_MISTAKES.values(), ids=TENSOR_MISTAKES)
def test_unknown_and_missing_tensors_are_refused(
    copy: Path, tmp_path: Path, change: Callable[[Tensors], object], sentence: str
) -> None:
    changed(copy, change)
    reads = (
        lambda: reader(copy),
        lambda: next(stored_tensors(copy)),
        lambda: compare(copy, copy),
        lambda: convert_to_megatron(copy, tmp_path / "new"),
    )
    for read in reads:
        with pytest.raises(CheckpointError, match=sentence) as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq"]
)
def test_computed_buffers_are_ignored(untied: Path, copy: Path, name: str) -> None:
    changed(copy, lambda t: t.update({name: torch.zeros(4)}))
    assert_reads(copy, load_file(untied / "model.safetensors"))


def test_a_tied_head_equal_to_the_embedding_is_ignored(
    tied_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_vrl.checkpoint.hf_reader.COMPARED_ROWS", 7)
    plain = load_file(tied_copy / "model.safetensors")
    changed(tied_copy, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    assert_reads(tied_copy, plain)


@pytest.mark.parametrize(
    "head",
    [
        lambda t: t.index_fill(0, torch.tensor([95]), 0.5),
        lambda t: t.bfloat16(),
        lambda t: t[:90].clone(),
    ],
    ids=["last row", "type", "shape"],
)
def test_a_tied_head_that_differs_is_refused(
    tied_copy: Path, head: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    changed(tied_copy, lambda t: t.update({"lm_head.weight": head(t[EMBEDDING])}))
    with pytest.raises(CheckpointError, match=f"lm_head.weight, which differs from {EMBEDDING}"):
        reader(tied_copy)


def test_another_dtype_than_in_the_config_is_reported_and_read(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reader(copy).type_note() == ""
    changed(copy, lambda t: t.update({NORM: t[NORM].bfloat16()}))
    tensors = load_file(copy / "model.safetensors")
    assert_reads(copy, tensors)
    stderr = capsys.readouterr().err
    assert f"1 of {len(tensors)} tensors, the first {NORM}, are stored as bfloat16" in stderr
    assert "config.json says float32" in stderr


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("place", ["top", "text"])
def test_every_reader_refuses_a_quantised_config(copy: Path, key: str, place: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (config if place == "top" else config["text_config"])[key] = {"quant_method": "fp8"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{key} \(fp8\): quantised weights are not read"):
        read_architecture(copy)
    with pytest.raises(CheckpointError, match="quantised weights are not read"):
        compare(copy, copy)


def test_verify_reads_both_configs(untied: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"a": 1}}))
    with pytest.raises(CheckpointError, match="quantised"):
        compare(untied, copy)
