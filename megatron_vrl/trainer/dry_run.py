"""Start-up check: everything that can be checked without starting an engine.

It checks the layout, the architecture, the checkpoint's headers, the tokenizer, the rewards and the
annotations. A run calls it before it builds anything, and `--dry-run` calls nothing else.
"""

from pathlib import Path

import torch

from megatron_vrl.checkpoint.hf_reader import HFCheckpoint
from megatron_vrl.checkpoint.layout import hf_dir_of, is_megatron
from megatron_vrl.config import (
    RunConfig,
    Source,
    check_answer_form,
    check_batches,
    check_dev,
    check_ground_truth_answer,
    check_off_policy,
    check_temporal_reward,
)
from megatron_vrl.context import CheckedRun, prompt_encoder
from megatron_vrl.data.datasets import Datasets
from megatron_vrl.data.media_limits import limits_of
from megatron_vrl.data.prompt import PromptEncoder
from megatron_vrl.errors import ConfigError, DataError, counted
from megatron_vrl.models.architecture import Architecture, padded_vocab, read_architecture
from megatron_vrl.models.fusion import gradient_fusion
from megatron_vrl.models.pipeline_split import all_chunks, check_divides
from megatron_vrl.models.weight_map import num_parameters
from megatron_vrl.parallel.mesh import check_layout
from megatron_vrl.rewards.user_functions import load_function
from megatron_vrl.rewards.weights import reward_weights
from megatron_vrl.rollout.replay import check_replay
from megatron_vrl.rollout.request import max_model_len
from megatron_vrl.selection.rules import check_budget
from megatron_vrl.trainer.reselect import check_reselection
from megatron_vrl.trainer.sample_stream import check_records, check_sample_weights

MISSING = "not on this machine: "


def check(cfg: RunConfig, world: int, here: bool = False) -> CheckedRun:
    """Return the checked architecture, prompt encoder and annotations, and notes for the user.

    Raises UserError if the configuration cannot work. `here`: the run starts on this machine, so
    every annotation file must exist. Otherwise a missing one is a note.
    """
    check_layout(cfg.parallel, world)
    check_processes(cfg, world)
    parallel = cfg.parallel
    replicas = world // (parallel.tensor * parallel.context * parallel.pipeline)
    check_batches(cfg, replicas)
    check_dev(cfg)
    check_answer_form(cfg)
    check_off_policy(cfg)
    check_ground_truth_answer(cfg)
    check_temporal_reward(cfg)
    check_replay(cfg)
    check_visual_input(cfg)
    check_reselection(cfg)
    check_sample_weights(cfg)
    check_budget(cfg.selection)
    reward_weights(cfg.rewards)
    for function in cfg.rewards.functions.values():
        load_function(function)
    hf_dir = hf_dir_of(cfg.model.checkpoint)
    arch, notes = _architecture(cfg, hf_dir)
    if (longest := max_model_len(cfg)) > arch.max_positions:
        raise ConfigError(
            f"data.max_prompt_tokens={cfg.data.max_prompt_tokens} and the longest answer are "
            f"{longest} tokens, the model reads {arch.max_positions}: lower "
            "data.max_prompt_tokens, rollout.max_response_tokens or evaluation.max_response_tokens."
        )
    check_divides(arch, cfg.model, cfg.parallel)
    encoder = _check_checkpoint(cfg, hf_dir, arch)
    datasets = Datasets(cfg.run.seed, limits_of(cfg.data))
    missing = _parse(cfg, datasets, here)
    check_records(cfg.data)
    answers = cfg.rollout.prompts_per_step * cfg.rollout.group_size
    updates = cfg.grpo.mini_batches * cfg.grpo.epochs
    fusion = gradient_fusion(cfg.model, torch.cuda.is_available())
    notes = [
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
    return CheckedRun(notes=notes, arch=arch, hf_dir=hf_dir, encoder=encoder, datasets=datasets)


def _parse(cfg: RunConfig, datasets: Datasets, here: bool) -> list[str]:
    """Parse or index every annotation file, and return notes on missing files and folders.

    Raises DataError naming the config's key and the file.
    """
    keys = {"data.sft": cfg.data.sft, "data.train": cfg.data.train}
    keys |= {f"data.evaluation.{name}": part for name, part in cfg.data.evaluation.items()}
    missing = []
    for key, sources in keys.items():
        read_all = datasets.load if key.startswith("data.evaluation.") else datasets.open_pool
        for source in sources:
            missing += _missing(source)
        local = [source for source in sources if here or not _is_elsewhere(source)]
        try:
            read_all(local, _one_second)
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


def check_processes(cfg: RunConfig, world: int) -> None:
    """Raise ConfigError if the launcher started another number of ranks than the config names."""
    wanted = cfg.parallel.processes
    if wanted and world != wanted:
        raise ConfigError(
            f"parallel.processes={wanted} and the launcher started {counted(world, 'process')}: "
            f"set NPROC and NNODES of launch/train.sh so that they give {wanted}, or set "
            f"parallel.processes={world}."
        )


def check_visual_input(cfg: RunConfig) -> None:
    """Raises ConfigError if vision embeddings are to be cached while the tower is trained."""
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
    """Return a note if the vocabulary is padded for the tensor-parallel ranks."""
    rows = padded_vocab(arch, cfg.parallel)
    if rows == arch.vocab:
        return []
    return [
        f"the vocabulary of {arch.vocab} is padded to {rows} rows, which "
        f"parallel.tensor={cfg.parallel.tensor} divides"
    ]


def _one_second(path: str) -> float:
    """Return an invented duration: the check opens no video."""
    return 1.0


def _architecture(cfg: RunConfig, hf_dir: Path) -> tuple[Architecture, list[str]]:
    """Return the architecture, and a note if model.architecture had to give it."""
    if (hf_dir / "config.json").exists() or not cfg.model.architecture:
        return read_architecture(hf_dir), []
    note = f"{MISSING}checkpoint {cfg.model.checkpoint}"
    return read_architecture(cfg.model.architecture), [note]


def _check_checkpoint(cfg: RunConfig, hf_dir: Path, arch: Architecture) -> PromptEncoder | None:
    """Return the prompt encoder of the checkpoint, or None if it is not on this machine.

    Raises CheckpointError if the tokenizer or the weights do not fit the architecture.
    """
    if not (hf_dir / "config.json").exists():
        return None
    encoder = prompt_encoder(hf_dir, arch, cfg.data)
    if not is_megatron(Path(cfg.model.checkpoint)):
        HFCheckpoint(hf_dir, arch)
    return encoder


def _missing(source: Source) -> list[str]:
    """Return a note for the annotation file and the video folder that do not exist."""
    paths = {"annotation file": source.json_path, "video folder": source.data_folder}
    if "://" in source.data_folder:
        del paths["video folder"]  # a URL is not asked before its first video is wanted
    return [f"{MISSING}{n} {p}" for n, p in paths.items() if not Path(p).exists()]
