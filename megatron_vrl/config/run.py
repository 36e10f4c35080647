"""Configuration of a run: typed sections with defaults.

Values come from the defaults, then a YAML file, then the command line (`section.key=value`). There
are two levels: a section and its keys. Unknown keys and wrong types are refused, with the nearest
known name. Each component receives its own section, not the whole configuration.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from megatron_vrl.config.algorithm import Algorithm
from megatron_vrl.config.base import SECTION, Positive
from megatron_vrl.config.loader import read_mix, read_tree, validate_with_overrides
from megatron_vrl.config.lora import Lora
from megatron_vrl.config.rollout import RolloutConfig
from megatron_vrl.config.source import Source
from megatron_vrl.config.video import Video

RewardMode = Literal["strict", "answer_only", "temporal_r1"]


class Section(BaseModel):
    """Base class of all sections."""

    model_config = SECTION


class Run(Section):
    out_dir: str
    """Directory of everything that the run writes."""
    seed: int = 1
    """Seed of data order, sampling and initialisation."""
    lock_timeout_s: float = Field(default=60.0, ge=0)
    """Seconds to wait for an earlier run in `out_dir` to end; after that this run is refused."""
    deterministic: bool = False
    """Use only deterministic operations in the trainer; slower on a GPU. Engines are not
    affected."""


class Model(Section):
    checkpoint: str
    """Directory of a Hugging Face checkpoint, or of one made by tools/convert_checkpoint.py."""
    architecture: str = ""
    """JSON file of the architecture, read by --dry-run when the checkpoint is not available; see
    configs/models."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of computation; main weights, gradients and optimizer state are float32."""
    freeze_vision: bool = False
    """Do not train the vision tower."""
    freeze_merger: bool = False
    """Do not train the patch merger."""
    freeze_language: bool = False
    """Do not train the language model."""
    lora: Lora = Lora()
    """Train low-rank adapters instead of weights; see docs/lora.md."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations of the language model that the backward pass recomputes. selective: the attention
    of each layer; full: whole layers, as many as `recompute_num_layers` says."""
    recompute_num_layers: Annotated[int, Field(ge=0)] = 0
    """Number of first layers of each pipeline stage (of each chunk with `parallel.virtual`) that
    `recompute: full` covers; the others keep their activations. 0: all layers."""
    recompute_vision: Literal["none", "full"] = "none"
    """Activations of the vision tower that the backward pass recomputes. full: every layer; a
    frozen tower has none."""
    vision_output_cache_mib: Annotated[int, Field(ge=0)] = 1024
    """Most device memory for the outputs of a frozen vision tower, which are kept while a step has
    several passes over its micro-batches (reference, old log-probs, updates): the tower then runs
    once for all of them. 0: none."""
    layers: Literal["megatron", "transformer_engine", "fp8_emulated"] = "megatron"
    """Linear layers and norms of the language model. megatron: Megatron's; transformer_engine:
    Transformer Engine's, on a GPU, a norm and the linear layer after it in one module;
    fp8_emulated: Megatron's with operands rounded to FP8, slow, on any device. Checkpoints are the
    same."""
    attention: Literal["auto", "sdpa", "flash", "transformer_engine"] = "auto"
    """Attention of the language layers. flash: torch's FlashAttention without copies of a prompt's
    keys, on a GPU in bfloat16, on a CPU in any dtype; sdpa: torch's, on any device, in buckets of
    nearly equal length; transformer_engine: Transformer Engine's, on a GPU in bfloat16, with a copy
    of a prompt's keys for each answer. auto: flash on a GPU in bfloat16, else sdpa."""
    fp8: Literal["none", "delayed", "current", "blockwise"] = "none"
    """Scaling of FP8 in the language layers; needs `layers` transformer_engine or fp8_emulated.
    Vision tower, embedding and head stay in `dtype`. blockwise with `parallel.sequence` pads each
    micro-batch to a multiple of 128 rows per tensor rank, else 16."""
    fp8_skip_first_last_layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (
        0,
        0,
    )
    """Number of first and of last language layers that stay in `dtype`."""
    gradient_accumulation_fusion: Literal["auto", "none"] = "auto"
    """auto: add weight gradients inside their matrix products on a GPU: in Transformer Engine's
    layers, and in Megatron's if NVIDIA apex is installed."""

    @property
    def trains_language(self) -> bool:
        """Return whether the language model's own weights are trained, not only adapters."""
        return not (self.freeze_language or self.lora.rank)


class Parallel(Section):
    processes: Annotated[int, Field(ge=0)] = 0
    """Number of processes of the run; a launcher that starts another number is refused. --dry-run
    and tools/plan.py use it if nothing else gives a number. 0: any."""
    tensor: Positive = 1
    """Ranks that split each layer's matrices (tensor parallelism)."""
    pipeline: Positive = 1
    """Ranks that split the stack of layers (pipeline parallelism)."""
    virtual: Positive = 1
    """Chunks of layers on each pipeline rank; more than 1 uses the interleaved schedule."""
    split: Literal["even", "balanced"] = "even"
    """even: the same number of layers in every chunk; balanced: fewer in the chunks that also hold
    the vision tower and the head."""
    layers_per_chunk: list[Positive] = []
    """Layers of each chunk in model order; overrides `split`."""
    context: Positive = 1
    """Ranks that split one packed sequence (context parallelism); each gathers keys and values."""
    sequence: bool = False
    """Also split norms along the sequence (sequence parallelism); needs tensor > 1."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel ranks."""
    overlap: bool = False
    """Reduce gradients over the data-parallel ranks during the backward pass."""


class Data(Section):
    sft: list[Source] = []
    """Sources of the SFT warm-up; keep them disjoint from `train` to compare the two. `sft` and
    `train` may also be the path of a Temporal-R1 YAML file with a list `datasets`."""
    train: list[Source] = []
    """Sources of GRPO."""
    selection: str = ""
    """kept.jsonl of tools/select_data.py: GRPO trains only on these samples."""
    difficulty: str = ""
    """stats.jsonl of tools/select_data.py: recorded rewards, for a curriculum or sample weights."""
    curriculum: Literal["none", "easy_first", "hard_first"] = "none"
    """Order of samples in an epoch of GRPO, by recorded mean reward; samples without one come
    last."""
    curriculum_stages: Positive = 4
    """Number of equal parts that a curriculum goes through; each part is shuffled."""
    sample_weight_std_power: Annotated[float, Field(ge=0)] = 0.0
    """a of the sampling weight std^a (1 - mean)^b by recorded rewards: std of the reward, mean of
    the temporal IoU (or accuracy). 0 with b = 0: all samples alike."""
    sample_weight_mean_power: Annotated[float, Field(ge=0)] = 0.0
    """b of the sampling weight; TimeLens2 trains with a = 0 and b = 2."""
    evaluation: dict[str, list[Source]] = {}
    """Split name -> sources. The split `dev` ends the warm-up (`sft.stop_metric`) and is left out
    of the reported results."""
    system_prompt: Literal[
        "none", "temporal_r1", "think", "think_text", "answer", "answer_only"
    ] = "think"
    """none: the chat template's default; temporal_r1: as released by Temporal-R1; think: reasoning,
    then JSON, in our wording; think_text: reasoning, then any text, for short_answer; answer: JSON
    after an empty think block; answer_only: JSON without a think block, with
    rewards.mode=answer_only."""
    question: Literal["default", "temporal_r1"] = "default"
    """temporal_r1: Temporal-R1's wording of multiple choice; other tasks have one wording."""
    timestamps: Literal["none", "interleaved"] = "none"
    """interleaved: the time of every temporal step stands as text before it, as in TimeLens. none:
    the model knows times by M-RoPE alone. A model family whose own prompts have timestamps
    (docs/tasks.md) shows those with either value."""
    snap_truth: bool = False
    """Move the true intervals of training samples outwards to times of temporal steps, as TimeLens
    does."""
    max_images: Annotated[int, Field(ge=0)] = 32
    """Most images of a sample. Reading the annotations refuses a sample with more."""
    max_videos: Annotated[int, Field(ge=0)] = 8
    """Most videos of a sample. Reading the annotations refuses a sample with more."""
    image_min_pixels: Positive | None = None
    """An image is enlarged to at least as many pixels. null: the limit of the checkpoint's image
    processor. Frames of videos have `video.min_pixels` and `video.max_pixels`."""
    image_max_pixels: Positive | None = None
    """An image is shrunk to at most as many pixels. null: the limit of the checkpoint's image
    processor, which may be 16,384 tokens: more than `max_prompt_tokens`."""
    max_prompt_tokens: Positive = 4096
    """Longest prompt. A longer one is refused and never truncated, since that would remove video
    tokens."""

    @field_validator("sft", "train", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        """Return the sources, read from the YAML file that `given` names if it is a string."""
        return read_mix(given) if isinstance(given, str) else given


class Rewards(Section):
    mode: RewardMode = "strict"
    """strict: format and content are read from one answer block; answer_only: like strict, and the
    format has no think block; temporal_r1: the scores released with Temporal-R1, bit for bit, for
    temporal grounding."""
    weights: dict[str, dict[str, float]] = {}
    """Task -> reward component -> weight, for example
    `rewards.weights.temporal_grounding.format=1`. A component that is left out keeps its task's
    default weight (docs/tasks.md); a weight of 0 logs a component without training on it."""
    length_tokens: tuple[Positive, Positive] = (320, 512)
    """Fewest and most tokens of a right answer that earns the component `length`."""
    temporal: Literal["none", "shuffled_group", "shuffled_boundaries"] = "none"
    """Bonus of 0.3 for answers that need the order of the frames. shuffled_group (T-GRPO): for
    right answers, unless half as many answers to shuffled frames are clearly more accurate.
    shuffled_boundaries (TaRO): for answers with an IoU of 0.7 whose log-prob falls most when frames
    near the true boundaries are shuffled; it takes one forward pass more."""
    functions: dict[str, str] = {}
    """Reward components of your own: name -> `package.module:function`. The function is called with
    (response, sample) and returns a number in [0, 1]; `weights` weighs it by its name. See
    docs/tasks.md."""
    function_timeout_s: Annotated[float, Field(gt=0)] = 1.0
    """Longest time for one call of such a function, in seconds."""
    function_workers: Positive = 2
    """Processes that run the functions, on each rank."""


class Optimizer(Section):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[float, Field(gt=0)]
    """Learning rate after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear learning-rate warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    """cosine: decay to a tenth of `lr` over the phase's steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip_grad: Annotated[float, Field(gt=0)] = 1.0


class Sft(Section):
    steps: Annotated[int, Field(ge=0)] = 0
    """Maximum number of steps of the SFT warm-up; 0: no warm-up."""
    batch_size: Positive = 32
    optimizer: Optimizer = Optimizer(lr=1e-5)
    stop_metric: str = ""
    """Metric of the split `dev`, for example `temporal_grounding/miou`, that is measured every
    `evaluate_every` steps for `stop_at` and `load_best_at_end`. Empty: SFT does not evaluate."""
    stop_at: float | None = None
    """SFT ends at the first evaluation in which `stop_metric` is at least this value, and must
    reach it within `steps`. null: SFT makes all its steps."""
    load_best_at_end: bool = False
    """End SFT with the weights of the evaluation in which `stop_metric` was largest. false: with
    the last weights."""
    evaluate_every: Positive = 50
    restarts: Annotated[int, Field(ge=0)] = 0
    """Number of restarts, each with the next seed, if `stop_at` is not reached within `steps`."""


class Grpo(Section):
    steps: Annotated[int, Field(ge=0)] = 0
    """Number of GRPO steps; 0: no GRPO."""
    mini_batches: Positive = 1
    """Number of mini-batches of a step's groups; each gives one optimizer update."""
    epochs: Positive = 1
    """Passes over a step's groups. With more than one update per step, old log-probs are computed
    once before the first."""
    optimizer: Optimizer = Optimizer(lr=1e-6)
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    """Evaluate the split `dev` every k steps; 0: never."""


class Selection(Section):
    answers: Positive = 8
    """Answers sampled for each sample of the pool."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    min_std: Annotated[float, Field(ge=0)] = 0.05
    """Minimum standard deviation of a graded component, such as temporal_iou, over the answers."""
    min_mean: Annotated[float, Field(ge=0)] = 0.1
    """Minimum mean of the same component."""
    budget: Annotated[int, Field(ge=0)] = 0
    """Maximum number of samples to keep, divided over the tasks in proportion to the samples that
    pass; 0: all."""
    gaussian_filter_std: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of mean IoUs around gaussian_filter_mean; samples drawn by this density
    fill the budget, in place of those with the largest spread. 0: no draw. TimeLens: 0.2, with
    min_std and min_mean 0."""
    gaussian_filter_mean: float = 0.05
    """Wanted mean IoU of that draw."""
    duration_buckets_s: list[Annotated[float, Field(gt=0)]] = []
    """Divide each task's budget equally among buckets of video durations, with these limits in
    seconds. TimeLens: 30, 60, ... 240. []: one bucket."""
    every_epochs: Annotated[int, Field(ge=0)] = 0
    """Repeat the selection inside a run after every k epochs of GRPO; 0: never."""


class Batch(Section):
    tokens: Positive = 16384
    """Maximum number of tokens of a packed micro-batch on one rank; a longer group is packed
    alone."""
    layout: Literal["shared", "plain"] = "shared"
    """shared: a group's prompt is computed once; plain: the prompt is computed for each answer
    (reference)."""


class Evaluation(Section):
    max_response_tokens: Positive = 2048
    before_training: bool = True
    """Evaluate the splits once before the first step, too."""


class Checkpoint(Section):
    every_steps: Positive = 50
    """Steps between checkpoints; each phase also ends with one."""
    keep: Positive = 2
    """Number of newest checkpoints to keep."""
    asynchronous: bool = True
    """Write checkpoints in the background while training goes on; false: wait for each."""


class Observe(Section):
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "megatron_vrl"
    samples_per_step: Annotated[int, Field(ge=0)] = 1
    """Groups per step that are logged whole, with frames, for the report."""
    profile_steps: list[Annotated[int, Field(gt=0)]] = []
    """Steps of the warm-up and of GRPO, counted from 1, that torch.profiler records. Traces are
    written to OUT/traces, for ui.perfetto.dev. A profiled step is slower."""
    profile_ranks: list[Annotated[int, Field(ge=0)]] = [0]
    """Ranks that are profiled."""


class RunConfig(Section):
    """Configuration of a run: all sections."""

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


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:  # type: ignore[assignment]
    """Read a YAML file, apply `section.key=value` overrides and validate.

    Raise ConfigError with the key, the value and the nearest known name.
    """
    return validate_with_overrides(RunConfig, read_tree(path), overrides, str(path))
