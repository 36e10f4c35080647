"""The section `algorithm` of the configuration."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from megatron_vrl.config.algorithm_presets import ALGORITHM_PRESETS, AlgorithmName
from megatron_vrl.config.base import SECTION


class Algorithm(BaseModel):
    model_config = SECTION

    name: AlgorithmName = "grpo"
    """Algorithm; also sets its preset for keys that are left out, see docs/algorithms.md."""
    clip: Annotated[float, Field(gt=0)] = 0.2
    """Lower clip bound of the ratio is 1 - clip; 1 means no bound."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """Upper clip bound of the ratio is 1 + clip_high."""
    kl: Annotated[float, Field(ge=0)] = 0.01
    """Coefficient of the KL term; 0 loads no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """k1: log ratio; k2: half its square; k3: unbiased and never negative, at most 10."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: add KL to each token's loss; reward: subtract the answer's summed KL from its reward.
    Use k1 with reward: its gradient in the loss is 0 on average."""
    entropy: Annotated[float, Field(ge=0)] = 1e-3
    """Coefficient of the entropy bonus."""
    normalisation: Literal[
        "global_tokens", "sequence_mean", "sequence_sum", "constant_length", "temporal_r1"
    ] = "global_tokens"
    """global_tokens: token sum over the step's token count; sequence_mean: mean over answers of the
    mean over tokens; sequence_sum: mean over answers of the sum over tokens; constant_length:
    sequence_sum over rollout.max_response_tokens; temporal_r1: mean inside each micro-batch."""
    combine: Literal["sum_then_normalise", "normalise_then_sum"] = "sum_then_normalise"
    """sum_then_normalise: the advantage of the weighted sum of reward components;
    normalise_then_sum: the weighted sum of the components' advantages (GDPO)."""
    ground_truth_answer: Literal["none", "in_group", "anchored", "shaped"] = "none"
    """Train on the annotation as one more answer of each group, off-policy (TempSamp-R1).
    in_group: its advantage is that of its reward among all; anchored: 1.2 x the largest of the
    others; shaped: in_group over rewards that hardly rise above 0.8."""
    ground_truth_weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the annotation's advantage. With rollout.group_size the annotation weighs as much
    as the whole group of sampled answers."""
    rollout_is: Literal["none", "token", "sequence"] = "none"
    """Multiply the policy loss by trainer probability / engine probability, per token or per
    answer."""
    rollout_is_mode: Literal["clip", "mask"] = "clip"
    """clip: limit the weight to `rollout_is_threshold`; mask: set it to 0 outside [1 / threshold,
    threshold]."""
    rollout_is_threshold: Annotated[float, Field(gt=1)] = 2.0
    """Limit of the rollout-correction weight."""
    drop_zero_variance_groups: bool = True
    """Do not train on groups whose advantages are all 0; they have no policy gradient."""
    dynamic_sampling_rounds: Annotated[int, Field(ge=0)] = 0
    """Maximum number of extra rounds of prompts that replace dropped groups (DAPO's dynamic
    sampling)."""
    mask_truncated: bool = False
    """Mask answers cut off at the length limit in the loss (DAPO's overlong filtering); they still
    count in the group's statistics."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """Number of tokens before the length limit over which the reward falls linearly (DAPO's soft
    overlong punishment); 0: no punishment."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Reward that an answer at the length limit loses through `overlong_buffer`."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        """Add the named algorithm's preset values for keys that are left out."""
        if not isinstance(given, dict):
            return given
        name = given.get("name", "grpo")
        return {**ALGORITHM_PRESETS.get(name, {}), **given} if isinstance(name, str) else given
