"""Configuration of a run: typed sections, read from YAML files and the command line.

`run.py` holds the sections and `load_config`, `checks.py` the checks across sections. The other
modules hold single sections and validation.
"""

from megatron_vrl.config.algorithm import Algorithm
from megatron_vrl.config.checks import (
    check_answer_form,
    check_batches,
    check_dev,
    check_ground_truth_answer,
    check_off_policy,
    check_temporal_reward,
)
from megatron_vrl.config.lora import Lora
from megatron_vrl.config.rollout import RolloutConfig
from megatron_vrl.config.run import (
    Batch,
    Checkpoint,
    Data,
    Evaluation,
    Grpo,
    Model,
    Observe,
    Optimizer,
    Parallel,
    RewardMode,
    Rewards,
    Run,
    RunConfig,
    Section,
    Selection,
    Sft,
    load_config,
)
from megatron_vrl.config.source import ROW_KEYS, Source
from megatron_vrl.config.video import Video

__all__ = [
    "ROW_KEYS",
    "Algorithm",
    "Batch",
    "Checkpoint",
    "Data",
    "Evaluation",
    "Grpo",
    "Lora",
    "Model",
    "Observe",
    "Optimizer",
    "Parallel",
    "RewardMode",
    "Rewards",
    "RolloutConfig",
    "Run",
    "RunConfig",
    "Section",
    "Selection",
    "Sft",
    "Source",
    "Video",
    "check_answer_form",
    "check_batches",
    "check_dev",
    "check_ground_truth_answer",
    "check_off_policy",
    "check_temporal_reward",
    "load_config",
]
