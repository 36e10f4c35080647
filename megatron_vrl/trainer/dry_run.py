"""Everything that can be checked without training: layout, architecture, rewards, annotations."""

from pathlib import Path

import torch

from megatron_vrl.checkpoint.hf_reader import HFCheckpoint
from megatron_vrl.checkpoint.layout import hf_dir_of, is_megatron
from megatron_vrl.config import RunConfig, Source, check_batches, check_dev, check_off_policy
from megatron_vrl.context import prompt_encoder
from megatron_vrl.data.mix import load, open_pool
from megatron_vrl.errors import ConfigError, DataError, counted
from megatron_vrl.models.architecture import Architecture, padded_vocab, read_architecture
from megatron_vrl.models.fusion import gradient_fusion
from megatron_vrl.models.pipeline_split import all_chunks, check_divides
from megatron_vrl.models.qwen2_5_vl.hf_shapes import num_parameters
from megatron_vrl.parallel.mesh import check_layout
from megatron_vrl.rewards import weights_of
from megatron_vrl.rewards.user_functions import load_function
from megatron_vrl.rollout.replay import check_stored
from megatron_vrl.rollout.vllm.start import max_model_len
from megatron_vrl.trainer.reselect import check_reselection
from megatron_vrl.trainer.sample_stream import check_records

MISSING = "not on this machine: "


def check(cfg: RunConfig, world: int, here: bool = False) -> list[str]:
    """Raises UserError for what cannot work; returns notes on what is not on this machine.

    `here`: the run starts on this machine, so every annotation file must be there.
    """
    check_layout(cfg.parallel, world)
    parallel = cfg.parallel
    replicas = world // (parallel.tensor * parallel.context * parallel.pipeline)
    check_batches(cfg, replicas)
    check_dev(cfg)
    check_off_policy(cfg)
    check_stored(cfg)
    check_visual_input(cfg)
    check_reselection(cfg)
    weights_of(cfg.rewards)
    for function in cfg.rewards.functions.values():
        load_function(function)
    arch, notes = _architecture(cfg)
    if (longest := max_model_len(cfg)) > arch.max_positions:
        raise ConfigError(
            f"data.max_prompt_tokens={cfg.data.max_prompt_tokens} and the longest answer are "
            f"{longest} tokens, the model reads {arch.max_positions}: lower "
            "data.max_prompt_tokens, rollout.max_response_tokens or evaluation.max_response_tokens."
        )
    check_divides(arch, cfg.model, cfg.parallel)
    _check_checkpoint(cfg, arch)
    missing = _opened(cfg, here)
    check_records(cfg.data)
    answers = cfg.rollout.prompts_per_step * cfg.rollout.group_size
    updates = cfg.grpo.mini_batches * cfg.grpo.epochs
    fusion = gradient_fusion(cfg.model, torch.cuda.is_available())
    return [
        f"model: {num_parameters(arch):,} parameters",
        _layout(world, replicas, cfg),
        *_stages(arch, cfg),
        *padding_notes(arch, cfg),
        f"gradient accumulation fusion: {fusion.description}",
        f"a GRPO step: {counted(cfg.rollout.prompts_per_step, 'prompt')}, "
        f"{counted(answers, 'answer')}, {counted(updates, 'update')}",
        *notes,
        *dict.fromkeys(missing),
        *_gpu_notes(cfg),
    ]


def _opened(cfg: RunConfig, here: bool) -> list[str]:
    """Read or index every annotation file; return notes on what is not on this machine.

    Raises UserError naming the config's key and the file.
    """
    named = {"data.sft": cfg.data.sft, "data.train": cfg.data.train}
    named |= {f"data.evaluation.{name}": part for name, part in cfg.data.evaluation.items()}
    missing = []
    for key, sources in named.items():
        read_all = load if key.startswith("data.evaluation.") else open_pool
        for source in sources:
            missing += _missing(source)
            if not here and _is_elsewhere(source):
                continue
            try:
                read_all([source], cfg.run.seed, _unknown)
            except DataError as error:
                raise DataError(f"{key}: {error}") from None
    return missing


def _is_elsewhere(source: Source) -> bool:
    """Return whether even the folder of the annotations is missing on this machine."""
    return not Path(source.json_path).parent.exists()


def _gpu_notes(cfg: RunConfig) -> list[str]:
    """Return a note on the keys that need a GPU, if this machine has none."""
    asked = {
        "video.device=gpu": cfg.video.device == "gpu",
        "model.layers=transformer_engine": cfg.model.layers == "transformer_engine",
    }
    keys = [key for key, wanted in asked.items() if wanted]
    if torch.cuda.is_available() or not keys:
        return []
    return [f"{MISSING}a GPU, which {' and '.join(keys)} needs"]


def refuse_missing(notes: list[str]) -> None:
    """Raises ConfigError if a note of `check` names something that is not on this machine."""
    missing = [note.removeprefix(MISSING) for note in notes if note.startswith(MISSING)]
    if missing:
        raise ConfigError(f"{MISSING}{', '.join(missing)}.")


def check_visual_input(cfg: RunConfig) -> None:
    """Raises ConfigError if the vision tower's results cannot be kept."""
    if cfg.rollout.visual_input == "pixels":
        return
    if not (cfg.model.freeze_vision and cfg.model.freeze_merger):
        raise ConfigError(
            "rollout.visual_input=embeddings keeps what the vision tower computes, which must not "
            "be trained then: set model.freeze_vision=true and model.freeze_merger=true."
        )


def _layout(world: int, replicas: int, cfg: RunConfig) -> str:
    parallel = cfg.parallel
    context = f" x context {parallel.context}" if parallel.context > 1 else ""
    return (
        f"layout: {counted(world, 'process')} = {counted(replicas, 'replica')} of tensor "
        f"{parallel.tensor}{context} x pipeline {parallel.pipeline}"
    )


def _stages(arch: Architecture, cfg: RunConfig) -> list[str]:
    if cfg.parallel.pipeline == 1:
        return []
    counts = [len(chunk.layers) for chunk in all_chunks(arch, cfg.model, cfg.parallel)]
    stages = [counts[stage :: cfg.parallel.pipeline] for stage in range(cfg.parallel.pipeline)]
    return ["layers of each pipeline stage: " + ", ".join("+".join(map(str, s)) for s in stages)]


def padding_notes(arch: Architecture, cfg: RunConfig) -> list[str]:
    """What to say of a vocabulary that the tensor ranks do not divide."""
    rows = padded_vocab(arch, cfg.parallel)
    if rows == arch.vocab:
        return []
    return [
        f"the vocabulary of {arch.vocab} is padded to {rows} rows, which "
        f"parallel.tensor={cfg.parallel.tensor} divides"
    ]


def _unknown(path: str) -> float:
    """Stands in for the seconds in a video's header: a dry run opens no video."""
    return 1.0


def _architecture(cfg: RunConfig) -> tuple[Architecture, list[str]]:
    checkpoint = hf_dir_of(cfg.model.checkpoint)
    if (checkpoint / "config.json").exists() or not cfg.model.architecture:
        return read_architecture(checkpoint), []
    note = f"{MISSING}checkpoint {cfg.model.checkpoint}"
    return read_architecture(cfg.model.architecture), [note]


def _check_checkpoint(cfg: RunConfig, arch: Architecture) -> None:
    """Raises CheckpointError for a checkpoint at hand whose weights or tokenizer do not fit."""
    directory = hf_dir_of(cfg.model.checkpoint)
    if not (directory / "config.json").exists():
        return
    prompt_encoder(directory, arch, cfg.data.system_prompt, cfg.data.max_prompt_tokens)
    if not is_megatron(Path(cfg.model.checkpoint)):
        HFCheckpoint(directory, arch)


def _missing(source: Source) -> list[str]:
    paths = {"annotation file": source.json_path, "video folder": source.data_folder}
    if "://" in source.data_folder:
        del paths["video folder"]  # a URL is not asked before its first video is wanted
    return [f"{MISSING}{n} {p}" for n, p in paths.items() if not Path(p).exists()]
