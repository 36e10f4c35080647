"""Conversion: there and back is the same, what differs is named, and mistakes cost one sentence."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vrl.checkpoint.convert import compare, convert_to_hf, convert_to_megatron
from megatron_vrl.checkpoint.hf_reader import HFCheckpoint, HFCheckpointWriter
from megatron_vrl.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from megatron_vrl.errors import CheckpointError, UserError
from megatron_vrl.models.architecture import read_architecture
from tests.running import ROOT, run_python
from tests.tiny_models import hf_model, save

TOOL = ROOT / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    hf = save(hf_model(tied=request.param), folder / "hf")
    (hf / "tokenizer.json").write_text("{}")
    (hf / "preprocessor_config.json").write_text("{}")
    (hf / "video_preprocessor_config.json").write_text("{}")
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    convert_to_megatron(hf, folder / "megatron")
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in directory.glob("*.safetensors") for n, t in load_file(f).items()}


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The checkpoint with `change(tensors)` made to its tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def assert_same(first: Path, second: Path) -> None:
    a, b = tensors_of(first), tensors_of(second)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def test_there_and_back_is_bit_equal_and_complete(folder: Path, tmp_path: Path) -> None:
    convert_to_hf(folder / "megatron", tmp_path / "back")
    assert_same(folder / "hf", tmp_path / "back")
    files, back = (
        {str(p.relative_to(place)): p for p in place.rglob("*") if p.is_file()}
        for place in (folder / "hf", tmp_path / "back")
    )
    assert files.keys() == back.keys()
    for name in files.keys() - {"model.safetensors"}:
        assert back[name].read_bytes() == files[name].read_bytes()


def test_bfloat16_in_shards_under_the_names_of_either_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: NaN and -0 survive, and tensors larger than a chunk or a file are cut."""
    from megatron_vrl.checkpoint import hf_reader, torch_dist

    model = hf_model().bfloat16()
    with torch.no_grad():
        model.lm_head.weight[0, :2] = torch.tensor([float("nan"), -0.0])
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    in_memory = tmp_path / "in-memory"
    in_memory.mkdir()
    save_file(
        {n: t.clone() for n, t in model.state_dict().items()}, in_memory / "model.safetensors"
    )
    shutil.copy(tmp_path / "hf" / "config.json", in_memory)
    monkeypatch.setattr(torch_dist, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(torch_dist, "FILE_BYTES", 50_000)
    monkeypatch.setattr(hf_reader, "SHARD_BYTES", 50_000)
    for name in ("hf", "in-memory"):
        convert_to_megatron(tmp_path / name, tmp_path / f"{name}-megatron")
        assert len(list((tmp_path / f"{name}-megatron" / "weights").glob("*.distcp"))) > 2
        convert_to_hf(tmp_path / f"{name}-megatron", tmp_path / f"{name}-back")
        assert_same(tmp_path / "hf", tmp_path / f"{name}-back")
        back = tmp_path / f"{name}-back"
        HFCheckpoint(back, read_architecture(back))  # its index is right
    assert compare(tmp_path / "hf", tmp_path / "in-memory-megatron") == len(tensors_of(in_memory))


def test_result_loads_in_stock_transformers(folder: Path, tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    convert_to_hf(folder / "megatron", tmp_path / "back")
    load: Callable[..., Any] = Qwen2_5_VLForConditionalGeneration.from_pretrained
    model, notes = load(tmp_path / "back", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    ids = torch.arange(10)[None]
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits for m in (model, load(folder / "hf")))
    assert torch.equal(ours, theirs)


def test_zeros_that_pad_the_vocabulary_are_left_out(folder: Path, tmp_path: Path) -> None:
    """Tensor-parallel training writes such zeros when its ranks do not divide the vocabulary."""
    source = TorchDistReader(folder / "megatron" / "weights")
    padded = tmp_path / "padded"
    writer = TorchDistWriter(padded / "weights")
    for name in source.names():
        tensor = source.tensor(name)
        if name.startswith(("language.embedding", "language.output")):
            tensor = torch.cat([tensor, torch.zeros(3, tensor.shape[1])])
        writer.add(name, tensor)
    writer.close()
    shutil.copytree(folder / "megatron" / "huggingface", padded / "huggingface")
    convert_to_hf(padded, tmp_path / "back")
    assert_same(folder / "hf", tmp_path / "back")


# ---- verify


def test_verify_says_which_tensor_differs(folder: Path, copy: Path) -> None:
    assert compare(folder / "hf", folder / "megatron") == len(tensors_of(folder / "hf"))
    rewritten(copy / "hf", lambda t: t["model.norm.weight"][3].add_(1e-6))
    for pair in ((folder / "megatron", copy / "hf"), (copy / "hf", folder / "hf")):
        with pytest.raises(CheckpointError, match=r"differ, first in model\.norm\.weight\.$"):
            compare(*pair)


def test_verify_reads_bits_not_numbers(folder: Path, copy: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    rewritten(copy / "hf", lambda t: t[name].zero_())
    other = shutil.copytree(copy / "hf", copy / "other")
    rewritten(other, lambda t: t[name].fill_(-0.0))
    with pytest.raises(CheckpointError, match=name):
        compare(copy / "hf", other)


# ---- mistakes: (what is done to a copy, the sentence that follows)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def changed_config(directory: Path, **text: int) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["text_config"] |= text
    (directory / "config.json").write_text(json.dumps(config))


def dropped(name: str) -> Callable[[Path], Path]:
    return lambda d: rewritten(d, lambda t: t.pop(name))


PUBLISHED_MISTAKES = {
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        r"holds no \.safetensors file",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), r"Cannot read .*config\.json"),
    "cut file": (lambda d: cut(d / "model.safetensors"), r"model\.safetensors is damaged"),
    "cut index": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        r"index\.json is damaged",
    ),
    "missing shard": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}'),
        "lacks its shard b",
    ),
    "missing tensor": (dropped("model.norm.weight"), r"lacks the tensor model\.norm\.weight"),
    "one tensor too many": (
        lambda d: rewritten(d, lambda t: t.update(extra=torch.zeros(1))),
        r"model\.safetensors holds extra, which the model of config\.json does not have",
    ),
    "another shape": (
        lambda d: rewritten(d, lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
        r"model\.safetensors: model\.norm\.weight has the shape \[3\].* asks for \[64\]",
    ),
    "another model": (
        lambda d: changed_config(d, num_hidden_layers=5),
        r"lacks the tensor model\.layers\.4\.",
    ),
}


MEGATRON_MISTAKES = {
    "no metadata": (lambda d: (d / "weights/.metadata").unlink(), r"Cannot read .*\.metadata"),
    "cut metadata": (lambda d: cut(d / "weights/.metadata"), r"\.metadata is damaged"),
    "missing file": (lambda d: (d / "weights/__0_0.distcp").unlink(), r"lacks its file __0_0"),
    "cut file": (
        lambda d: cut(d / "weights/__0_0.distcp"),
        r"weights: the tensor \S+ cannot be read",
    ),
    "another model": (
        lambda d: changed_config(d / "huggingface", num_hidden_layers=5),
        r"lacks the tensor language\.decoder\.layers\.4\.",
    ),
    "another shape": (
        lambda d: changed_config(d / "huggingface", intermediate_size=100),
        r"weights: language\.\S+ has the shape \[192, 64\].* asks for \[200, 64\]",
    ),
    "smaller model": (
        lambda d: changed_config(d / "huggingface", num_hidden_layers=3),
        r"holds language\.decoder\.layers\.3\.\S+, which the model",
    ),
}


MISTAKES = [
    pytest.param(convert, kind, *mistake, id=f"{kind}: {name}")
    for convert, kind, mistakes in (
        (convert_to_megatron, "hf", PUBLISHED_MISTAKES),
        (convert_to_hf, "megatron", MEGATRON_MISTAKES),
    )
    for name, mistake in mistakes.items()
]


@pytest.mark.parametrize(("convert", "kind", "spoil", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    copy: Path,
    convert: Callable[[Path, Path], object],
    kind: str,
    spoil: Callable[[Path], object],
    sentence: str,
) -> None:
    spoil(copy / kind)
    with pytest.raises(CheckpointError, match=sentence) as error:
        convert(copy / kind, copy / "new")
    assert "\n" not in str(error.value)
    assert not list(copy.glob("new*"))


def test_existing_target_wrong_direction_and_nothing_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hf exists already: remove it or choose another"):
        convert_to_hf(folder / "megatron", folder / "hf")
    with pytest.raises(CheckpointError, match="is a Megatron checkpoint: did you mean megatron-to"):
        convert_to_megatron(folder / "megatron", tmp_path / "x")
    with pytest.raises(CheckpointError, match="is no Megatron checkpoint: did you mean hf-to"):
        convert_to_hf(folder / "hf", tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*nowhere"):
        convert_to_hf(folder / "nowhere", tmp_path / "x")


def test_no_room_on_the_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**19))
    for convert, source in ((convert_to_megatron, "hf"), (convert_to_hf, "megatron")):
        with pytest.raises(CheckpointError, match=r"x needs about . MiB, and its disk has 0"):
            convert(folder / source, tmp_path / "x")


def test_a_disk_that_fills_up_meanwhile(folder: Path, tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron_vrl.checkpoint.convert._check_room", lambda *_: None)
            for convert, source in (
                (convert_to_megatron, "hf"),
                (convert_to_hf, "megatron"),
            ):
                with pytest.raises(UserError, match=f"{tmp_path / 'x'} cannot"):
                    convert(folder / source, tmp_path / "x")
                assert not any(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_writer_closes_a_shard_whose_header_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_vrl.checkpoint import hf_reader

    monkeypatch.setattr(hf_reader, "HEADER_BYTES", 512)
    writer = HFCheckpointWriter(tmp_path)
    tensors = {f"tensor-{i}": torch.full((2, 3), float(i)) for i in range(20)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert all(torch.equal(tensor, tensors[n]) for n, tensor in tensors_of(tmp_path).items())


# ---- the program


@pytest.mark.slow
def test_program_prints_what_it_did(folder: Path, tmp_path: Path) -> None:
    done = run_python(TOOL, "megatron-to-hf", folder / "megatron", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == f"Written: {tmp_path / 'back'}"
    same = run_python(TOOL, "verify", folder / "hf", tmp_path / "back")
    assert same.stdout.endswith("tensors are bit-equal\n")
    assert same.stderr == ""
    again = run_python(TOOL, "megatron-to-hf", folder / "megatron", tmp_path / "back")
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("folder", [False], ids=["untied"], indirect=True)
def test_bench_measures_beside_safetensors_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    config = folder / "hf" / "config.json"
    bench = [ROOT / "tools" / "bench.py", "convert", "--model", config, "--rounds", 1]
    done = run_python(*bench, "--dir", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    steps = ["safetensors alone", "hf-to-megatron", "megatron-to-hf", "verify"]
    assert [row["step"] for row in rows] == steps
    assert all(row["seconds"] > 0 and 0 < row["peak_gib"] < 2 for row in rows)
    assert not any(tmp_path.iterdir())
