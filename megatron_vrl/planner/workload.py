"""Sizes of a GRPO step: tokens of prompt and answer, groups per micro-batch, micro-batches.

All groups of a planned step are alike. By default they are as large as the config allows: the
prompt holds a video at the limits of section `video` and `TEXT_TOKENS` tokens of text, and every
answer has `rollout.max_response_tokens` tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from megatron_vrl.config import RunConfig, Video
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.family import Family, prompt_form
from megatron_vrl.parallel.mesh import row_tile
from megatron_vrl.video.rules import PixelRules, plan_frames

Grid = tuple[int, int, int]  # temporal steps; height and width in patches

TEXT_TOKENS = 256  # system prompt, question and template around a video; ours have 100 to 250
FILM_FPS, FILM_SIZE = 30.0, (720, 1280)  # source video that the video rule is applied to


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSizes:
    """Sizes of one group."""

    prompt: int  # tokens, vision included
    response: int  # tokens of each answer
    answers: int
    grid: Grid | None  # grid of the group's video
    pixels: PixelRules

    @property
    def rows(self) -> int:
        """Return the packed rows of the group; an answer's last token is no input."""
        return self.prompt + self.answers * (self.response - 1)

    @property
    def patches(self) -> int:
        """Return the patches of the group's video."""
        if self.grid is None:
            return 0
        t, h, w = self.grid
        return t * h * w

    @property
    def vision_tokens(self) -> int:
        """Return the vision tokens of the group's video."""
        return self.patches // self.pixels.merge**2

    @property
    def targets(self) -> int:
        """Return the loss tokens of the group."""
        return self.answers * self.response


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A micro-batch of equal groups."""

    group: GroupSizes
    groups: int
    rows: int  # with padding, of all context-parallel ranks


def step_sizes(
    cfg: RunConfig, family: Family, prompt: int | None = None, response: int | None = None
) -> GroupSizes:
    """Return the sizes of a step's groups. Raise ConfigError if a given length exceeds the
    config's."""
    longest = cfg.data.max_prompt_tokens
    grid = video_grid(cfg.video, family.pixels)
    each = prompt_form(family, cfg.data.timestamps).step_text
    if prompt is None:
        prompt = min(longest, _tokens(grid, family.pixels) + grid[0] * each + TEXT_TOKENS)
    elif not 1 <= prompt <= longest:
        raise ConfigError(
            f"--prompt-tokens {prompt} is not between 1 and data.max_prompt_tokens={longest}."
        )
    most = cfg.rollout.max_response_tokens
    if response is not None and not 1 <= response <= most:
        raise ConfigError(
            f"--response-tokens {response} is not between 1 and rollout.max_response_tokens={most}."
        )
    return GroupSizes(
        prompt=prompt,
        response=response or most,
        answers=cfg.rollout.group_size,
        grid=_cut(grid, prompt - TEXT_TOKENS, each, family.pixels.merge),
        pixels=family.pixels,
    )


def packed_sizes(cfg: RunConfig, sizes: GroupSizes) -> tuple[GroupSizes, int]:
    """Return the sizes that the packer receives for a group, and how many such groups.

    The shared layout packs the group itself; the plain layout packs one group per answer. A group
    has one answer more with `algorithm.ground_truth_answer`.
    """
    if cfg.algorithm.ground_truth_answer != "none":
        sizes = replace(sizes, answers=sizes.answers + 1)
    if cfg.batch.layout == "shared":
        return sizes, 1
    return replace(sizes, answers=1), sizes.answers


def video_grid(cfg: Video, pixels: PixelRules) -> Grid:
    """Return the largest grid that section `video` allows for a video of any length."""
    return _grids(cfg.model_dump_json(), pixels)


@cache
def _grids(video: str, pixels: PixelRules) -> Grid:
    """Return `video_grid` for the section as JSON, which is hashable."""
    cfg = Video.model_validate_json(video)
    longest = int((cfg.num_frames or cfg.max_frames) / cfg.fps) + 1
    lengths = {min(2**k, longest) for k in range(longest.bit_length() + 1)}
    plans = [plan_frames(int(s * FILM_FPS), FILM_FPS, *FILM_SIZE, cfg, pixels) for s in lengths]
    return max(plans, key=lambda plan: plan.num_tokens).grid_thw


def _tokens(grid: Grid, pixels: PixelRules) -> int:
    """Return the vision tokens of a grid."""
    t, h, w = grid
    return t * h * w // pixels.merge**2


def _cut(grid: Grid, room: int, text: int, merge: int) -> Grid | None:
    """Return the grid reduced to at most `room` tokens; None if no step fits.

    A temporal step has its vision tokens and `text` more. Temporal steps are removed first, then
    the picture is made smaller.
    """
    t, h, w = grid
    each = h * w // merge**2
    if room <= text:
        return None
    if room < each + text:
        return 1, merge, (room - text) * merge
    return min(t, room // (each + text)), h, w


def row_multiple(cfg: RunConfig) -> int:
    """Return the multiple that a micro-batch's rows are padded to on GPUs, see
    `policy/micro_batches.py`."""
    context = cfg.parallel.context
    tile = row_tile(cfg.parallel, cfg.model.fp8)
    return cfg.parallel.tensor * (2 * context if context > 1 else 1) * tile


def pack_step(
    cfg: RunConfig, sizes: GroupSizes, replicas: int, multiple: int
) -> tuple[PackedBatch, int]:
    """Return a micro-batch of the step, and the number of micro-batches per replica and update."""
    piece, pieces = packed_sizes(cfg, sizes)
    groups = -(-cfg.rollout.prompts_per_step // replicas)
    per_update = -(-groups // cfg.grpo.mini_batches) * pieces
    fit = max(1, cfg.batch.tokens // piece.rows)
    count = -(-per_update // fit)
    if cfg.parallel.virtual > 1:  # the interleaved schedule needs a multiple of the pipeline size
        count = -(-count // cfg.parallel.pipeline) * cfg.parallel.pipeline
    members = -(-per_update // count)
    return _packed(piece, members, multiple), count


def worst_batches(
    cfg: RunConfig, family: Family, sizes: GroupSizes, multiple: int, given: bool
) -> Iterator[PackedBatch]:
    """Yield the micro-batches that may need the most memory.

    They are the step's own micro-batch at the token budget; the longest possible group, which gets
    its own micro-batch; and, unless the answer length was `given`, a micro-batch of as many videos
    as the budget holds when answers are short.
    """
    cases = [sizes]
    if not given:
        cases.append(_shorter(sizes))
    for case in cases:
        piece, pieces = packed_sizes(cfg, case)
        most = cfg.rollout.prompts_per_step * pieces
        yield _packed(piece, min(most, max(1, cfg.batch.tokens // piece.rows)), multiple)
    longest = step_sizes(cfg, family, prompt=cfg.data.max_prompt_tokens)
    yield _packed(packed_sizes(cfg, longest)[0], 1, multiple)


def _shorter(sizes: GroupSizes) -> GroupSizes:
    """Return `sizes` with answers of one token."""
    return replace(sizes, response=1)


def _packed(piece: GroupSizes, groups: int, multiple: int) -> PackedBatch:
    """Return a micro-batch of `groups` groups with its padded rows."""
    rows = -(-groups * piece.rows // multiple) * multiple
    return PackedBatch(group=piece, groups=groups, rows=rows)


def scoring_passes(cfg: RunConfig) -> list[str]:
    """Return the forward passes that rewards need, as `trainer/experience.py` runs them.

    They run over all groups of a step before the update packs them, so a frozen tower encodes the
    videos for each of them.
    """
    shuffled = cfg.rewards.temporal == "shuffled_boundaries"
    refers = cfg.algorithm.kl > 0 and cfg.algorithm.kl_in == "reward"
    return ["shuffled frames"] * shuffled + ["reward KL"] * refers


def shuffled_answers(cfg: RunConfig) -> int:
    """Return the answers to each prompt's shuffled frames, see `trainer/rollout_queue.py`."""
    return max(1, cfg.rollout.group_size // 2) * (cfg.rewards.temporal == "shuffled_group")


def forward_passes(cfg: RunConfig) -> list[str]:
    """Return the forward passes before a step's first update, as `trainer/update.py` runs them."""
    several = cfg.grpo.mini_batches * cfg.grpo.epochs > 1
    refers = cfg.algorithm.kl > 0 and cfg.algorithm.kl_in == "loss"
    return ["old log-probs"] * several + ["reference"] * refers
