"""How large a GRPO step is: tokens of prompt and answer, groups of a micro-batch, micro-batches.

A plan is made of groups that are all alike. Unless told otherwise the prompt holds a video at the
budget of section `video` and `TEXT_TOKENS` words around it, and every answer is as long as
`rollout.max_response_tokens` lets it be: the most that a step can cost.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from megatron_vrl.config import RunConfig, Video
from megatron_vrl.errors import ConfigError
from megatron_vrl.video.rules import MERGE, plan_frames

Grid = tuple[int, int, int]  # temporal steps; height and width in patches

TEXT_TOKENS = 256  # system prompt, question and template around a video; ours have 100 to 250
FILM_FPS, FILM_SIZE = 30.0, (720, 1280)  # of the film that the video rule is asked about


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of one group."""

    prompt: int  # tokens, vision included
    response: int  # tokens of each answer
    answers: int
    grid: Grid | None  # of its video

    @property
    def rows(self) -> int:
        """Packed rows: an answer's last token is no input."""
        return self.prompt + self.answers * (self.response - 1)

    @property
    def patches(self) -> int:
        if self.grid is None:
            return 0
        t, h, w = self.grid
        return t * h * w

    @property
    def vision_tokens(self) -> int:
        return self.patches // MERGE**2

    @property
    def targets(self) -> int:
        return self.answers * self.response


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A micro-batch of groups that are alike."""

    of: Sizes
    groups: int
    rows: int  # with padding, over all context-parallel ranks


def step_sizes(cfg: RunConfig, prompt: int | None = None, response: int | None = None) -> Sizes:
    """Of one group of a step, in the layout that `batch.layout` says."""
    longest = cfg.data.max_prompt_tokens
    grid = video_grid(cfg.video)
    if prompt is None:
        prompt = min(longest, _tokens(grid) + TEXT_TOKENS)
    elif not 1 <= prompt <= longest:
        raise ConfigError(
            f"--prompt-tokens {prompt} is not between 1 and data.max_prompt_tokens={longest}."
        )
    most = cfg.rollout.max_response_tokens
    if response is not None and not 1 <= response <= most:
        raise ConfigError(
            f"--response-tokens {response} is not between 1 and rollout.max_response_tokens={most}."
        )
    return Sizes(
        prompt=prompt,
        response=response or most,
        answers=cfg.rollout.group_size,
        grid=_cut(grid, prompt - TEXT_TOKENS),
    )


def laid_out(cfg: RunConfig, sizes: Sizes) -> tuple[Sizes, int]:
    """What the packer is given for one group: itself, or as many as it has answers."""
    if cfg.batch.layout == "shared":
        return sizes, 1
    alone = Sizes(prompt=sizes.prompt, response=sizes.response, answers=1, grid=sizes.grid)
    return alone, sizes.answers


def video_grid(cfg: Video) -> Grid:
    """The largest that the rules of section `video` give a film of any length."""
    return _grids(cfg.model_dump_json())


@cache
def _grids(video: str) -> Grid:
    cfg = Video.model_validate_json(video)
    longest = int((cfg.num_frames or cfg.max_frames) / cfg.fps) + 1
    lengths = {min(2**k, longest) for k in range(longest.bit_length() + 1)}
    plans = [plan_frames(int(s * FILM_FPS), FILM_FPS, *FILM_SIZE, cfg) for s in lengths]
    return max((plan.grid_thw for plan in plans), key=_tokens)


def _tokens(grid: Grid) -> int:
    t, h, w = grid
    return t * h * w // MERGE**2


def _cut(grid: Grid, room: int) -> Grid | None:
    """Fewer temporal steps, then a smaller picture, so that its tokens have room."""
    t, h, w = grid
    each = h * w // MERGE**2
    if room < 1:
        return None
    if room < each:
        return 1, MERGE, room * MERGE
    return min(t, room // each), h, w


def pack_step(cfg: RunConfig, sizes: Sizes, replicas: int, multiple: int) -> tuple[Packed, int]:
    """A micro-batch of the step and how many each replica computes for one update."""
    piece, pieces = laid_out(cfg, sizes)
    groups = -(-cfg.rollout.prompts_per_step // replicas)
    per_update = -(-groups // cfg.grpo.mini_batches) * pieces
    fit = max(1, cfg.batch.tokens // piece.rows)
    count = -(-per_update // fit)
    if cfg.parallel.virtual > 1:  # handed on in rounds of the pipeline's size
        count = -(-count // cfg.parallel.pipeline) * cfg.parallel.pipeline
    members = -(-per_update // count)
    return _packed(piece, members, multiple), count


def worst_batches(cfg: RunConfig, sizes: Sizes, multiple: int, given: bool) -> Iterator[Packed]:
    """The micro-batches that may need the most memory.

    The step's own at its fullest; the longest group there may be, which gets a micro-batch of its
    own; and, unless the length of answers was `given`, as many videos as go into the budget when
    answers are short.
    """
    cases = [sizes]
    if not given:
        cases.append(_shorter(sizes))
    for case in cases:
        piece, pieces = laid_out(cfg, case)
        most = cfg.rollout.prompts_per_step * pieces
        yield _packed(piece, min(most, max(1, cfg.batch.tokens // piece.rows)), multiple)
    longest = step_sizes(cfg, prompt=cfg.data.max_prompt_tokens)
    yield _packed(laid_out(cfg, longest)[0], 1, multiple)


def _shorter(sizes: Sizes) -> Sizes:
    return Sizes(prompt=sizes.prompt, response=1, answers=sizes.answers, grid=sizes.grid)


def _packed(piece: Sizes, groups: int, multiple: int) -> Packed:
    rows = -(-groups * piece.rows // multiple) * multiple
    return Packed(of=piece, groups=groups, rows=rows)
