"""Everything that can be checked without training: layout, architecture, rewards, annotations."""

from itertools import chain
from pathlib import Path

import torch

from megatron_vrl.config import RunConfig, Source, check_batches, check_dev, check_off_policy
from megatron_vrl.data.mix import load, open_pool
from megatron_vrl.errors import ConfigError
from megatron_vrl.loops.reselect import check_reselection
from megatron_vrl.loops.stream import check_records
from megatron_vrl.model.architecture import Architecture, padded_vocab, read_architecture
from megatron_vrl.model.chunks import all_chunks, check_divides
from megatron_vrl.model.fusion import gradient_fusion
from megatron_vrl.parallel.mesh import check_layout
from megatron_vrl.rewards import weights_of
from megatron_vrl.rollout.start import max_model_len
from megatron_vrl.rollout.stored import check_stored
from megatron_vrl.training.layout import published_files
from megatron_vrl.user_functions import load_function

MISSING = "not on this machine: "


def check(cfg: RunConfig, world: int) -> list[str]:
    """Raises UserError for what cannot work; returns notes on what is not on this machine."""
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
    evaluated = list(chain(*cfg.data.evaluation.values()))
    sources = [*cfg.data.sft, *cfg.data.train, *evaluated]
    missing = [note for source in sources for note in _missing(source)]
    for part in (evaluated, cfg.data.sft, cfg.data.train):
        here = [source for source in part if Path(source.json_path).exists()]
        read_all = load if part is evaluated else open_pool
        if here:
            read_all(here, cfg.run.seed, _unknown)
    check_records(cfg.data)
    answers = cfg.rollout.prompts_per_step * cfg.rollout.group_size
    updates = cfg.grpo.mini_batches * cfg.grpo.epochs
    return [
        f"model: {arch.num_parameters:,} parameters",
        _layout(world, replicas, cfg),
        *_stages(arch, cfg),
        *padding_notes(arch, cfg),
        f"weight gradients: {gradient_fusion(cfg.model, torch.cuda.is_available()).words}",
        f"a GRPO step: {cfg.rollout.prompts_per_step} prompts, {answers} answers, "
        f"{updates} update{'s' if updates > 1 else ''}",
        *notes,
        *dict.fromkeys(missing),
        *_gpu_notes(cfg),
    ]


def _gpu_notes(cfg: RunConfig) -> list[str]:
    """What asks for a GPU where there is none."""
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
        f"layout: {world} processes = {replicas} replicas of tensor {parallel.tensor}{context} x "
        f"pipeline {parallel.pipeline}"
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
    checkpoint = published_files(cfg.model.checkpoint)
    if (checkpoint / "config.json").exists() or not cfg.model.architecture:
        return read_architecture(checkpoint), []
    note = f"{MISSING}checkpoint {cfg.model.checkpoint}"
    return read_architecture(cfg.model.architecture), [note]


def _missing(source: Source) -> list[str]:
    paths = {"annotation file": source.json_path, "video folder": source.data_folder}
    if "://" in source.data_folder:
        del paths["video folder"]  # a URL is not asked before its first video is wanted
    return [f"{MISSING}{n} {p}" for n, p in paths.items() if not Path(p).exists()]
