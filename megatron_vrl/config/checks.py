"""Checks that compare values of several configuration sections. Each raises ConfigError."""

from megatron_vrl.config.run import RunConfig
from megatron_vrl.errors import ConfigError


def check_batches(cfg: RunConfig, replicas: int) -> None:
    """Raise ConfigError if a step has too few samples for the replicas or the mini-batches."""
    sizes = {"sft.batch_size": cfg.sft.batch_size}
    sizes["rollout.prompts_per_step"] = cfg.rollout.prompts_per_step
    for key, size in sizes.items():
        if size < replicas:
            raise ConfigError(
                f"{key}={size} is less than the {replicas} model replicas: raise it, or use fewer "
                "processes."
            )
    if cfg.grpo.mini_batches > cfg.rollout.prompts_per_step:
        raise ConfigError(
            f"grpo.mini_batches={cfg.grpo.mini_batches} is more than the "
            f"{cfg.rollout.prompts_per_step} groups of a step: lower it, or raise "
            "rollout.prompts_per_step."
        )


def check_answer_form(cfg: RunConfig) -> None:
    """Raise ConfigError if prompt and format reward disagree about the think block."""
    asked, scored = cfg.data.system_prompt == "answer_only", cfg.rewards.mode == "answer_only"
    if asked != scored:
        raise ConfigError(
            f"data.system_prompt={cfg.data.system_prompt} and rewards.mode={cfg.rewards.mode} "
            "disagree about the think block: set both to answer_only, or neither."
        )


def check_dev(cfg: RunConfig) -> None:
    """Raise ConfigError if a phase evaluates the split `dev` and `data.evaluation` has no such
    split, or if SFT is to keep its best weights and measures nothing."""
    if cfg.sft.load_best_at_end and not cfg.sft.stop_metric:
        raise ConfigError(
            "sft.load_best_at_end compares evaluations by sft.stop_metric, which is empty: set "
            "sft.stop_metric=temporal_grounding/miou, say."
        )
    needs_dev = {
        "sft.stop_metric": cfg.sft.steps > 0 and bool(cfg.sft.stop_metric),
        "grpo.evaluate_every": 0 < cfg.grpo.evaluate_every <= cfg.grpo.steps,
    }
    for key, is_needed in needs_dev.items():
        if is_needed and not cfg.data.evaluation.get("dev"):
            raise ConfigError(
                f"{key} needs the split data.evaluation.dev: list its sources, or leave {key} out."
            )


def check_ground_truth_answer(cfg: RunConfig) -> None:
    """Raise ConfigError if the annotation cannot join the groups."""
    algorithm = cfg.algorithm
    if algorithm.ground_truth_answer == "none":
        return
    key = f"algorithm.ground_truth_answer={algorithm.ground_truth_answer}"
    if algorithm.combine != "sum_then_normalise":
        raise ConfigError(
            f"{key} needs the sum of the rewards: set algorithm.combine=sum_then_normalise."
        )
    if algorithm.kl > 0 and algorithm.kl_in == "reward":
        raise ConfigError(
            f"{key} has no log-probs of an engine, which algorithm.kl_in=reward reads: set "
            "algorithm.kl_in=loss, or algorithm.kl=0."
        )


def check_temporal_reward(cfg: RunConfig) -> None:
    """Raise ConfigError if `rewards.temporal` cannot be computed."""
    if cfg.rewards.temporal == "none":
        return
    key = f"rewards.temporal={cfg.rewards.temporal}"
    if cfg.algorithm.ground_truth_answer != "none":
        raise ConfigError(
            f"{key} has no value for the annotation, which is no sampled answer: set "
            "algorithm.ground_truth_answer=none."
        )
    if cfg.rewards.temporal == "shuffled_group" and cfg.rollout.placement == "replay":
        raise ConfigError(
            f"{key} needs answers to shuffled frames, which stored rollouts do not hold: choose "
            "another rollout.placement than replay."
        )


def check_off_policy(cfg: RunConfig) -> None:
    """Raise ConfigError if off-policy answers cannot be generated, or are not corrected by
    `rollout_is`."""
    staleness, quantization = cfg.rollout.max_staleness, cfg.rollout.quantization
    if quantization != "none" and cfg.algorithm.rollout_is == "none":
        raise ConfigError(
            f"rollout.quantization={quantization} samples from other weights than those that are "
            "trained: set algorithm.rollout_is=token (or sequence)."
        )
    if staleness and cfg.rollout.placement == "colocated":
        raise ConfigError(
            f"rollout.max_staleness={staleness} needs rollout.placement=workers, not "
            f"{cfg.rollout.placement}: an engine in the trainer's process cannot generate "
            "during an update."
        )
    if staleness and cfg.algorithm.rollout_is == "none":
        raise ConfigError(
            f"rollout.max_staleness={staleness} trains on answers of older weights: set "
            "algorithm.rollout_is=token (or sequence), or rollout.max_staleness=0."
        )
