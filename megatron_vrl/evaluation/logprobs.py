"""Log-probs of given responses, token by token, in any parallel layout (score_responses.py).

Decoding, prompts, packing, model and schedule are those of training. The pass is forward only, at
temperature 1 and with no token banned. Samples are read, scored and written in blocks, so memory
does not grow with their number. Left out: sharing a prompt's computation between several
responses; each sample is a group of one answer.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.batching.pack import Answer, Group, MicroBatch
from megatron_vrl.checkpoint.checkpoint import load_weights
from megatron_vrl.checkpoint.layout import hf_dir_of
from megatron_vrl.config import (
    Batch,
    Data,
    Model,
    Parallel,
    Section,
    Video,
)
from megatron_vrl.config.base import Positive
from megatron_vrl.config.inference import read_inference
from megatron_vrl.config.loader import validate, validate_with_overrides
from megatron_vrl.context import prompt_encoder
from megatron_vrl.data.prompt import PromptEncoder, PromptSpec, check_text
from megatron_vrl.data.prompt_pipeline import PromptPipeline
from megatron_vrl.errors import ConfigError, DataError, VideoError, counted
from megatron_vrl.models.architecture import Architecture, config_dtype, read_architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.models.pipeline_split import check_divides
from megatron_vrl.observe.progress import progress_bar
from megatron_vrl.parallel.mesh import (
    Mesh,
    gather_objects,
    gather_shards,
    init_mesh,
    raise_on_all_ranks,
    shard,
    world_axis,
)
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from megatron_vrl.types import ImageFile, Prompt, VideoClip
from megatron_vrl.video import VideoReader
from megatron_vrl.video.image import image_rules

SAMPLES_AT_A_TIME = 16  # of one model replica
DUMMY = ""  # id of the answer of the dummy group
Row = dict[str, Any]


class PromptForm(Section):
    timestamps: Literal["none", "interleaved"] = "none"
    """interleaved: the time of every temporal step stands as text before it."""
    max_prompt_tokens: Positive = 128_000
    """A longer prompt is refused, never cut. The default is what Qwen's models are trained on."""
    image_min_pixels: Positive | None = None
    """An image is enlarged to at least as many pixels. null: the checkpoint's limit."""
    image_max_pixels: Positive | None = None
    """An image is shrunk to at most as many pixels. null: the checkpoint's limit."""


class ScoreConfig(Section):
    """Sections of a run's configuration that a log-prob depends on."""

    model: Model
    parallel: Parallel = Parallel()
    video: Video = Video()
    data: PromptForm = PromptForm()
    batch: Batch = Batch()


class ScoredSample(Section):
    """One line of the samples' file."""

    id: str
    system: str | None = None
    """None: the chat template's own default."""
    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    question: str
    response: str


def score_config(checkpoint: str, overrides: Sequence[str]) -> ScoreConfig:
    """Return the configuration: `inference.yaml` of the checkpoint, replaced by `overrides`.

    The dtype is that of the checkpoint unless `model.dtype` is overridden.
    """
    directory = hf_dir_of(checkpoint)
    read_architecture(directory)  # raises CheckpointError if config.json is wrong
    dtype = config_dtype(directory) or "float32"
    kept = read_inference(directory)
    tree: dict[str, Any] = {name: kept[name] for name in ("video",) if name in kept}
    form = kept.get("data", {})
    tree["data"] = {key: form[key] for key in PromptForm.model_fields if key in form}
    tree["model"] = {"checkpoint": checkpoint, "dtype": dtype}
    cfg = validate_with_overrides(ScoreConfig, tree, overrides, "command line")
    if cfg.model.checkpoint != checkpoint:
        raise ConfigError(
            f"model.checkpoint={cfg.model.checkpoint} is not --checkpoint {checkpoint}: give one."
        )
    return cfg


def score_file(cfg: ScoreConfig, samples: Path, out: Path) -> str:
    """Write the log-probs of every sample of a file to `out`, and return a summary line.

    Every rank calls it and rank 0 writes. Raises UserError on every rank alike; `out` is unchanged
    then.
    """
    directory = hf_dir_of(cfg.model.checkpoint)
    arch = read_architecture(directory)
    check_divides(arch, cfg.model, cfg.parallel)
    mesh = init_mesh(cfg.parallel, seed=0, fp8=cfg.model.fp8)
    encoder = prompt_encoder(directory, arch, Data(system_prompt="none", **cfg.data.model_dump()))
    with raise_on_all_ranks(mesh):
        count = _check(samples)
    tokens, total = 0, 0.0
    with _rows_into(out, mesh) as write:
        scorer = Scorer(cfg, arch, encoder, mesh)
        stream = (sample for _, sample in read_samples(samples))
        with progress_bar("score", count, "samples", disable=mesh.rank != 0 or None) as bar:
            while block := list(islice(stream, SAMPLES_AT_A_TIME * mesh.data.size)):
                rows = scorer.score(block)
                write(rows)
                tokens += sum(len(row["logprobs"]) for row in rows)
                total += sum(sum(row["logprobs"]) for row in rows)
                bar.update(len(block))
    counts = f"{counted(count, 'response')}, {counted(tokens, 'token')}"
    return f"{counts}, mean log-prob {total / max(tokens, 1):.4f}"


def read_samples(path: Path) -> Iterator[tuple[int, ScoredSample]]:
    """Yield (line number, sample) of each line that is not blank.

    Raises DataError naming the line.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parsed(line, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give --samples FILE.") from None


class Scorer:
    """Model and prompt pipeline over the mesh. Every rank calls every method."""

    def __init__(
        self, cfg: ScoreConfig, arch: Architecture, encoder: PromptEncoder, mesh: Mesh
    ) -> None:
        """Raises UserError on every rank alike if the weights do not load."""
        parts = ("freeze_vision", "freeze_merger", "freeze_language")
        frozen = cfg.model.model_copy(update=dict.fromkeys(parts, True))  # no gradient buffers
        self._policy = Policy(arch, frozen, cfg.parallel, mesh)
        load_weights(cfg.model.checkpoint, self._policy)
        self._mesh, self._encoder, self._batch = mesh, encoder, cfg.batch
        pixels = family_of(arch).pixels
        form = cfg.data
        rules = image_rules(
            hf_dir_of(cfg.model.checkpoint), pixels, form.image_min_pixels, form.image_max_pixels
        )
        self._prompts = PromptPipeline(VideoReader(cfg.video, pixels, rules), encoder)

    def score(self, block: Sequence[ScoredSample]) -> list[Row]:
        """Return the rows of a block in its order on rank 0, and [] on the other ranks.

        Every rank passes all samples of the block.

        Raises VideoError or ConfigError on every rank, naming the sample.
        """
        mesh = self._mesh
        groups = self._groups(block)
        dummy_group = self._dummy_group()
        batches = plan_batches(groups, dummy_group, self._batch, mesh)
        outputs = self._policy.logprobs(batches, Distribution())
        logprobs = [
            (int(name), *pieces)
            for batch, output in zip(batches, outputs, strict=True)
            if output is not None and mesh.tensor.rank == 0
            for name, pieces in zip(
                batch.answer_id, _by_answer(batch, output.cpu().numpy()), strict=True
            )
            if name != DUMMY
        ]
        rows = {int(g.answers[0].id): _row(g) for g in groups} if mesh.model.rank == 0 else {}
        everywhere = gather_objects(world_axis(mesh), (rows, logprobs))
        return _joined(block, everywhere) if mesh.rank == 0 else []

    def _groups(self, block: Sequence[ScoredSample]) -> list[Group]:
        """Return the groups of this replica's samples. Each of its ranks decodes a shard of them.

        The id of an answer is the number of its sample in the block.
        """
        mesh = self._mesh
        mine = shard(range(len(block)), mesh.data, mesh.model)
        groups: list[Group] = []
        with raise_on_all_ranks(mesh):
            prompts = self._prompts.load_specs([_spec(block[number]) for number in mine])
            for number, prompt in zip(mine, prompts, strict=True):
                if isinstance(prompt, VideoError):
                    raise VideoError(f"Sample {block[number].id}: {prompt}")
                groups.append(self._group(prompt, block[number].response, str(number)))
        return gather_shards(groups, mesh.model)

    def _dummy_group(self) -> Group:
        """Return a group for ranks with fewer micro-batches than others. Its rows are dropped."""
        return self._group(self._encoder.encode("dummy", None, ("",)), "", DUMMY)

    def _group(self, prompt: Prompt, response: str, answer_id: str) -> Group:
        token_ids = self._encoder.answer(response)
        answer = Answer(
            token_ids=token_ids,
            advantage=0.0,
            engine_logprobs=np.zeros(len(token_ids), np.float32),
            id=answer_id,
        )
        return Group(prompt=prompt, answers=(answer,))


def _spec(sample: ScoredSample) -> PromptSpec:
    return PromptSpec(
        id=sample.id,
        system=sample.system,
        content=(
            *map(VideoClip, sample.videos),
            *map(ImageFile, sample.images),
            sample.question,
        ),
    )


def _by_answer(
    batch: MicroBatch, logprobs: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield for each answer (index in the answer, log-prob) of this context rank's tokens [N]."""
    # The token before an answer's first input is the last of its prompt, or of another answer.
    index = batch.rows[batch.source] - batch.answer_start[batch.sequence] + 1
    index = np.maximum(index, 0)
    for answer in range(len(batch.answer_start)):
        own = batch.sequence == answer
        yield index[own], logprobs[own]


def _row(group: Group) -> Row:
    """Return the row of a sample without its log-probs."""
    prompt, (answer,) = group.prompt, group.answers
    first = int(prompt.positions.max()) + 1
    steps = np.broadcast_to(
        np.arange(first, first + len(answer.token_ids)), (3, len(answer.token_ids))
    )
    return {
        "id": prompt.id,
        "prompt_token_ids": prompt.token_ids.tolist(),
        "response_token_ids": answer.token_ids.tolist(),
        "positions": np.concatenate([prompt.positions, steps], axis=1).tolist(),
    }


def _joined(
    block: Sequence[ScoredSample], everywhere: Sequence[tuple[dict[int, Any], list[Any]]]
) -> list[Row]:
    """Return the rows of all replicas in the block's order, with all context ranks' log-probs."""
    rows = {number: row for rows, _ in everywhere for number, row in rows.items()}
    values = {n: np.full(len(row["response_token_ids"]), np.nan) for n, row in rows.items()}
    seen = dict.fromkeys(rows, 0)
    for _, pieces in everywhere:
        for number, index, logprobs in pieces:
            values[number][index] = logprobs
            seen[number] += len(index)
    assert seen == {number: len(value) for number, value in values.items()}
    return [{**rows[n], "logprobs": values[n].tolist()} for n in range(len(block))]


def _check(path: Path) -> int:
    """Return the number of samples. Raises DataError for the first line that is not valid."""
    count = 0
    for number, sample in read_samples(path):
        where = f"{path}, line {number}"
        for kind, files in {"videos": sample.videos, "images": sample.images}.items():
            absent = next((file for file in files if not Path(file).is_file()), None)
            if absent is not None:
                raise DataError(
                    f"{where}: there is no file {absent}; correct {kind!r} (paths count from the "
                    "working directory)."
                )
        check_text(f"{sample.id} ({where})", sample.system or "", sample.question, sample.response)
        count += 1
    if not count:
        raise DataError(f"{path} holds no samples; write one JSON object a line.")
    return count


def _parsed(line: bytes, origin: str) -> ScoredSample:
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} is not JSON ({error}); write one object a line.") from None
    if not isinstance(tree, dict):
        raise DataError(f"{origin} holds {type(tree).__name__}; write one object a line.")
    try:
        return validate(ScoredSample, tree, origin, "every sample has one.")
    except ConfigError as error:
        raise DataError(str(error)) from None


@contextmanager
def _rows_into(path: Path, mesh: Mesh) -> Iterator[Callable[[list[Row]], None]]:
    """Yield a function that writes rows to PATH.partial, which is renamed at the end."""
    partial = path.with_name(path.name + ".partial")
    with raise_on_all_ranks(mesh), _named(path):
        if path.is_dir():
            raise DataError(f"--out {path} is a directory; give the name of a file.")
        file = partial.open("w") if mesh.rank == 0 else None

    def write(rows: list[Row]) -> None:
        with raise_on_all_ranks(mesh), _named(path):
            if file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    try:
        yield write
        with raise_on_all_ranks(mesh), _named(path):
            if file:
                file.close()
                os.replace(partial, path)
    finally:
        if file:
            file.close()
            partial.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise DataError naming `path` in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); give --out FILE in a directory that "
            "exists and has room."
        ) from None
