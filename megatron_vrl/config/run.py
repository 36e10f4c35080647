"""The whole configuration, typed. Defaults < YAML < command line (`section.key=value`).

Two levels: a section, then its keys. Unknown keys and wrong types are refused with the nearest
name. A part of the program receives its own section, never the whole.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from megatron_vrl.config.algorithm_presets import ALGORITHM_PRESETS, AlgorithmName
from megatron_vrl.config.base import SECTION, Positive
from megatron_vrl.config.loader import overridden, read_mix, read_tree
from megatron_vrl.config.rollout import RolloutConfig
from megatron_vrl.config.video import Video
from megatron_vrl.errors import ConfigError


class Section(BaseModel):
    model_config = SECTION


class Run(Section):
    out_dir: str
    """Everything this run writes lies here."""
    seed: int = 1
    """Seeds data order, sampling and initialisation."""
    lock_timeout_s: float = Field(60.0, ge=0)
    """Seconds to wait for an earlier run in `out_dir` to end before this one is refused."""
    deterministic: bool = False
    """Only operations whose result does not depend on the order of threads; slower on a GPU."""


class Model(Section):
    checkpoint: str
    """Directory of a Hugging Face checkpoint, or of one made by tools/convert_checkpoint.py."""
    architecture: str = ""
    """JSON of the architecture where the checkpoint is not at hand (--dry-run): configs/models."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type; main weights, gradients and optimizer state are float32."""
    freeze_vision: bool = False
    """Do not train the vision tower."""
    freeze_merger: bool = False
    """Do not train the patch merger."""
    freeze_language: bool = False
    """Do not train the language model."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: selective, the attention of
    each language layer; full, every layer of the language model and the vision tower."""
    layers: Literal["megatron", "transformer_engine", "fp8_emulated"] = "megatron"
    """Whose linear layers and norms the language model has. Transformer Engine needs a GPU;
    rounded: Megatron's, whose products see operands rounded to FP8, a slow proof anywhere."""
    attention: Literal["auto", "sdpa", "flash", "transformer_engine"] = "auto"
    """Attention of the language layers. sdpa: torch's, anywhere, in buckets of one length; flash:
    torch's FlashAttention, or Transformer Engine's: on a GPU in bfloat16, sequences of any length
    in one call. auto: flash where it can be, else sdpa."""
    fp8: Literal["none", "delayed", "current", "blockwise"] = "none"
    """Scaling of the language layers' FP8 matrices (needs `layers: transformer_engine`, or
    rounded); vision tower, embedding and head stay in `dtype`."""
    fp8_skip_first_last_layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (
        0,
        0,
    )
    """Language layers at the start and at the end that stay in `dtype` all the same."""
    gradient_accumulation_fusion: Literal["auto", "none"] = "auto"
    """auto: weight gradients are added up inside their products where NVIDIA apex is, on a GPU."""


class Parallel(Section):
    processes: Annotated[int, Field(ge=0)] = 0
    """Processes that the layout is meant for; read by --dry-run and tools/plan.py where nothing
    else says how many. 0: any."""
    tensor: Positive = 1
    """Ranks that share each layer's matrices."""
    pipeline: Positive = 1
    """Ranks that share the stack of layers."""
    virtual: Positive = 1
    """Chunks of layers on each pipeline rank; more than 1 is the interleaved schedule."""
    split: Literal["even", "balanced"] = "even"
    """even: the same number of layers in every chunk; balanced: fewer beside the vision tower and
    the head."""
    layers_per_chunk: list[Positive] = []
    """Layers of each chunk in model order, instead of `split`."""
    context: Positive = 1
    """Ranks that share one packed sequence; keys and values are gathered."""
    sequence: bool = False
    """Split the norms along the sequence too (needs tensor > 1)."""
    distributed_optimizer: bool = True
    """Split optimizer state over the data-parallel ranks."""
    overlap: bool = False
    """Sum gradients over the data-parallel ranks while the backward pass goes on."""


class Source(Section):
    """One annotation file and the videos it speaks of."""

    json_path: str
    """Annotation file, .json or .jsonl; for mvbench and tempcompass also a folder of them."""
    data_folder: str
    """Folder of its videos."""
    format: Literal[
        "charades_sta",
        "next_gqa",
        "multiple_choice",
        "temporal_r1",
        "generic",
        "tvgbench",
        "activitynet_rtl",
        "mvbench",
        "tempcompass",
        "video_mme",
        "mmvu",
    ] = "temporal_r1"
    """Format of the file, see megatron_vrl/data/formats/training.py and benchmarks.py."""
    sampling_strategy: str = "all"
    """all | first:N | end:N | random:N, where N may be a percentage."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often its samples come in an epoch: 2, each twice; 0.5, half of them, in turn."""


class Data(Section):
    sft: list[Source] = []
    """Sources of the warm-up; disjoint from `train` when the two are compared. Like `train`, also
    the path of a YAML file as Temporal-R1 has them: `datasets`, a list of sources."""
    train: list[Source] = []
    """Sources of GRPO."""
    selection: str = ""
    """kept.jsonl of tools/select_data.py: GRPO trains on these samples alone."""
    difficulty: str = ""
    """stats.jsonl of tools/select_data.py: the recorded rewards that a curriculum goes by."""
    curriculum: Literal["none", "easy_first", "hard_first"] = "none"
    """Order of an epoch of GRPO by recorded mean reward; samples without one come last."""
    curriculum_stages: Positive = 4
    """Parts of equal size that a curriculum goes through; each is shuffled in itself."""
    evaluation: dict[str, list[Source]] = {}
    """Split name -> sources. The split `dev` decides when the warm-up ends and is not reported."""
    system_prompt: Literal["none", "temporal_r1", "think", "answer"] = "think"
    """none: the template's default; seed: Temporal-R1's as released; think: the same in our words,
    reasoning, then JSON; answer: JSON alone."""
    question: Literal["default", "temporal_r1"] = "default"
    """seed: Temporal-R1's wording of multiple choice; for the other tasks there is no other."""
    max_prompt_tokens: Positive = 4096
    """A longer prompt is refused, never cut: cutting would remove video tokens."""

    @field_validator("sft", "train", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        """Sources named in a YAML file of their own."""
        return read_mix(given) if isinstance(given, str) else given


class Rewards(Section):
    mode: Literal["strict", "temporal_r1"] = "strict"
    """strict: format and content are read from one answer block; temporal_r1: the scores released
    with Temporal-R1, bit for bit, for temporal grounding."""
    weights: dict[str, dict[str, float]] = {}
    """Task -> reward component -> weight, for example
    `rewards.weights.temporal_grounding.format=1`. A component that is left out keeps its task's
    default weight (docs/tasks.md); a weight of 0 logs a component without training on it."""
    length_tokens: tuple[Positive, Positive] = (320, 512)
    """Fewest and most tokens of a right answer that earns the component `length`."""
    functions: dict[str, str] = {}
    """Reward components of your own: name -> `package.module:function`. The function is called with
    (response, sample) and returns a number in [0, 1]; `weights` weighs it by its name. See
    docs/tasks.md."""
    function_timeout_s: Annotated[float, Field(gt=0)] = 1.0
    """Longest time for one call of such a function, in seconds."""
    function_workers: Positive = 2
    """Processes that run the functions, on each rank."""


class Algorithm(Section):
    name: AlgorithmName = "grpo"
    """Also sets what its source says for the keys left out here: see docs/algorithms.md."""
    clip: Annotated[float, Field(gt=0)] = 0.2
    """The ratio is clipped from below to 1 - clip; 1 is no bound."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """The ratio is clipped from above to 1 + clip_high."""
    kl: Annotated[float, Field(ge=0)] = 0.01
    """Coefficient of the KL term; 0 loads no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """k1: log ratio; k2: half its square; k3: never negative, without bias, at most 10."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: a term of each token; reward: the answer's sum is subtracted from its reward. k1
    belongs in the reward: as a term of the loss it has no gradient on average."""
    entropy: Annotated[float, Field(ge=0)] = 1e-3
    """Coefficient of the entropy bonus."""
    normalisation: Literal[
        "global_tokens", "sequence_mean", "sequence_sum", "constant_length", "temporal_r1"
    ] = "global_tokens"
    """global_tokens: token sum over the step's token count; sequence_mean: mean over answers of
    the mean over tokens; sequence_sum: mean over answers of the sum over tokens; constant_length:
    sequence_sum over rollout.max_response_tokens; seed: mean inside each micro-batch."""
    combine: Literal["sum_then_normalise", "normalise_then_sum"] = "sum_then_normalise"
    """Several reward components. sum_then_normalise: their weighted sum becomes an advantage;
    normalise_then_sum: each becomes an advantage, and these are summed by weight (GDPO)."""
    rollout_is: Literal["none", "token", "sequence"] = "none"
    """Weigh the policy loss with trainer probability / engine probability, of each token or of
    the whole answer."""
    rollout_is_mode: Literal["clip", "mask"] = "clip"
    """clip: at most `rollout_is_threshold`; mask: 0 outside [1 / limit, limit]."""
    rollout_is_threshold: Annotated[float, Field(gt=1)] = 2.0
    drop_zero_variance_groups: bool = True
    """Leave out groups whose advantages are all 0: they have no policy gradient."""
    dynamic_sampling_rounds: Annotated[int, Field(ge=0)] = 0
    """More rounds of prompts, at most, to replace dropped groups (DAPO's dynamic sampling)."""
    mask_truncated: bool = False
    """Answers cut off at the length limit take part in the group's statistics but not in the loss
    (DAPO's overlong filtering)."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """The reward falls linearly over the last so many tokens before the length limit (DAPO's soft
    overlong punishment); 0: it does not."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    """What an answer at the limit loses by that."""

    @model_validator(mode="before")
    @classmethod
    def _published(cls, given: Any) -> Any:
        """Keys left out get the value of the named algorithm's source, if that says one."""
        if not isinstance(given, dict):
            return given
        name = given.get("name", "grpo")
        return {**ALGORITHM_PRESETS.get(name, {}), **given} if isinstance(name, str) else given


class Optimizer(Section):
    lr: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: Literal["constant", "cosine"] = "constant"
    """cosine: down to a tenth over the phase's steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip_grad: Annotated[float, Field(gt=0)] = 1.0


class Sft(Section):
    steps: Annotated[int, Field(ge=0)] = 0
    """Most steps of the warm-up; 0 leaves it out."""
    batch_size: Positive = 32
    optimizer: Optimizer = Optimizer(lr=1e-5)
    stop_metric: str = ""
    """Metric of the split `dev` that ends the warm-up, for example `temporal_grounding/miou`."""
    stop_at: float = 0.0
    """The warm-up ends at the first evaluation at or above this value."""
    evaluate_every: Positive = 50
    restarts: Annotated[int, Field(ge=0)] = 0
    """If `stop_at` is not reached within `steps`, start over this often with the next seed."""


class Grpo(Section):
    steps: Annotated[int, Field(ge=0)] = 0
    """Steps of reinforcement learning; 0 leaves it out."""
    mini_batches: Positive = 1
    """Parts that a step's groups are cut into, with an optimizer update on each."""
    epochs: Positive = 1
    """Passes over a step's groups. With more than one update the log-probs that ratios are taken
    against are computed once, before the first."""
    optimizer: Optimizer = Optimizer(lr=1e-6)
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    """Evaluate the split `dev` every k steps; 0: never."""


class Selection(Section):
    answers: Positive = 8
    """Answers sampled for each sample of the pool."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    min_std: Annotated[float, Field(ge=0)] = 0.05
    """A sample with a graded component, such as temporal_iou, is kept only if the component's
    standard deviation over the answers is at least this."""
    min_mean: Annotated[float, Field(ge=0)] = 0.1
    """The same sample is kept only if the component's mean is at least this."""
    budget: Annotated[int, Field(ge=0)] = 0
    """Most samples to keep, shared out over the tasks by what passes their rules; 0: all."""
    every_epochs: Annotated[int, Field(ge=0)] = 0
    """Select anew inside a run, after every k epochs of GRPO, what the next ones draw; 0: never."""


class Batch(Section):
    tokens: Positive = 16384
    """Most tokens of one packed micro-batch on one rank; a longer group gets one of its own."""
    layout: Literal["shared", "plain"] = "shared"
    """shared: a group's prompt is computed once; plain: once for each answer (the reference)."""


class Evaluation(Section):
    max_response_tokens: Positive = 2048


class Checkpoint(Section):
    every_steps: Positive = 50
    """Steps between checkpoints, besides one at the end of each phase."""
    keep: Positive = 2
    """How many of the newest are kept."""
    asynchronous: bool = True
    """Write in the background while training goes on; false: wait for each."""


class Observe(Section):
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "megatron_vrl"
    samples_per_step: Annotated[int, Field(ge=0)] = 1
    """Groups per step that are logged whole, with frames, for the report."""
    profile_steps: list[Annotated[int, Field(gt=0)]] = []
    """Steps of the warm-up and of GRPO, from 1, of which torch.profiler writes a trace into
    OUT/traces, for ui.perfetto.dev. A traced step is slower."""
    profile_ranks: list[Annotated[int, Field(ge=0)]] = [0]
    """Ranks whose steps are traced."""


class RunConfig(Section):
    run: Run
    model: Model
    parallel: Parallel = Parallel()
    video: Video = Video()
    data: Data = Data()
    rollout: RolloutConfig = RolloutConfig()
    rewards: Rewards = Rewards()
    algorithm: Algorithm = Algorithm()
    sft: Sft = Sft()
    grpo: Grpo = Grpo()
    selection: Selection = Selection()
    batch: Batch = Batch()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    observe: Observe = Observe()


def check_batches(cfg: RunConfig, replicas: int) -> None:
    """Raises ConfigError if a step has too few samples for the replicas or the mini-batches."""
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


def check_dev(cfg: RunConfig) -> None:
    """Raises ConfigError if a stage will look at a split that is not named."""
    looks = {
        "sft.stop_metric": cfg.sft.steps > 0 and bool(cfg.sft.stop_metric),
        "grpo.evaluate_every": 0 < cfg.grpo.evaluate_every <= cfg.grpo.steps,
    }
    for key, looks_at_dev in looks.items():
        if looks_at_dev and not cfg.data.evaluation.get("dev"):
            raise ConfigError(
                f"{key} needs the split data.evaluation.dev: name its sources, or leave {key} out."
            )


def check_off_policy(cfg: RunConfig) -> None:
    """Raises ConfigError if answers of other weights are wanted and cannot be made or weighed."""
    staleness, quantization = cfg.rollout.max_staleness, cfg.rollout.quantization
    if quantization != "none" and cfg.algorithm.rollout_is == "none":
        raise ConfigError(
            f"rollout.quantization={quantization} samples from other weights than those that are "
            "trained: set algorithm.rollout_is=token (or sequence)."
        )
    if staleness and cfg.rollout.placement == "colocated":
        raise ConfigError(
            f"rollout.max_staleness={staleness} needs rollout.placement=workers, not "
            f"{cfg.rollout.placement}: an engine in the trainer's process waits while it trains."
        )
    if staleness and cfg.algorithm.rollout_is == "none":
        raise ConfigError(
            f"rollout.max_staleness={staleness} trains on answers of older weights: set "
            "algorithm.rollout_is=token (or sequence), or rollout.max_staleness=0."
        )


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:  # type: ignore[assignment]
    """Read a YAML file, apply `section.key=value` overrides, validate.

    Raises ConfigError naming the key, the value and the nearest known name.
    """
    return overridden(RunConfig, read_tree(path), overrides, str(path))
