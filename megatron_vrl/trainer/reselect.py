"""Data selection between epochs of GRPO: answer the pool again, and train on what varies.

With selection.every_epochs=k a selection is due at the first step that begins k epochs after the
last one. It answers the whole pool with the weights of that step, on the engines of the run, in
blocks of rollout.prompts_per_step prompts, and applies the rules of tools/select_data.py. A sample
that a step drew across the end of the epoch stays drawn. Dropped samples are answered again at the
next selection and may come back.

States of a selection, with its files in OUT/selection/epoch-NNNN:

    SAVED     the run has a checkpoint of the weights that answer
    ANSWERED  blocks of answers-0.jsonl, one after the other
    APPLIED   kept.jsonl is written and the stream draws from the kept samples, by their new weights
              (data.sample_weight_std_power, data.sample_weight_mean_power)

A killed run resumes from the checkpoint, so the same weights answer the blocks that are missing.
The seed of an answer comes from the epoch and the position of its sample in the pool. A resumed run
removes selections that were made after its checkpoint, unless selection.every_epochs is 0.

Example with every_epochs=2 and 1000 samples: epochs 0 and 1 draw all of them. The first step of
epoch 2 answers 1000 samples and keeps 600, and epochs 2 and 3 have 600 samples each.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from megatron_vrl.config import RunConfig
from megatron_vrl.context import RunContext
from megatron_vrl.data.mix import SampleStream
from megatron_vrl.data.pool import Drawn, Pool
from megatron_vrl.data.sample_weights import (
    Statistics,
    has_weights,
    read_statistics,
    sample_weights,
    statistics_of,
)
from megatron_vrl.data.schedule import read_ids
from megatron_vrl.errors import ConfigError, DataError, VideoError
from megatron_vrl.parallel.mesh import gather_objects, raise_on_all_ranks, shard, world_axis
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.selection.answers import (
    Row,
    answer_row,
    candidates_of,
    json_lines,
    resume,
    sampling_spec,
)
from megatron_vrl.selection.rules import KEPT, Candidate, select
from megatron_vrl.selection.select import write_selection
from megatron_vrl.storage.files import full_disk_named, write_file
from megatron_vrl.trainer.preemption import stop_if_asked
from megatron_vrl.trainer.sample_stream import only, schedule_of
from megatron_vrl.trainer.state import RunState, finish_saving, save
from megatron_vrl.types import Prompt, Rollout, Sample

FOLDER, ANSWERS = "selection", "answers-0.jsonl"


def check_reselection(cfg: RunConfig) -> None:
    """Raises ConfigError if a selection inside the run cannot be made."""
    every = cfg.selection.every_epochs
    if every and cfg.rollout.placement == "replay":
        raise ConfigError(
            f"selection.every_epochs={every} asks new questions, which rollout.placement=replay "
            "cannot answer: set 0, or rollout.placement=colocated (or workers)."
        )
    if every and cfg.data.curriculum != "none":
        raise ConfigError(
            f"selection.every_epochs={every} changes what an epoch holds, and data.curriculum="
            f"{cfg.data.curriculum} orders it by older records: set one of them to 0 or none."
        )


class DataSelection:
    """Selections of one run. Every rank calls its methods, in the same order."""

    def __init__(
        self,
        ctx: RunContext,
        state: RunState,
        pool: Pool,
        stream: SampleStream,
        log: Callable[[str], None],
    ) -> None:
        """Apply the selections that `state` records to `stream`, a stream of `pool`.

        Raises DataError if the files of a recorded selection are missing.
        """
        self._ctx, self._state, self._pool, self._stream = ctx, state, pool, stream
        self._log = log
        self._root = Path(ctx.cfg.run.out_dir) / FOLDER
        self._saved_step = state.step  # step of the last checkpoint that is known here
        with raise_on_all_ranks(ctx.mesh):
            for epoch, position in state.selections:
                folder, recorded = self._folder(epoch), {}
                if has_weights(ctx.cfg.data):
                    recorded = read_statistics(str(folder / "stats.jsonl"))
                self._apply(read_ids(str(folder / "kept.jsonl")), recorded, epoch, position)
        valid = {self._folder(epoch) for epoch, _ in state.selections}
        if self._is_due:
            valid.add(self._folder(stream.epoch))  # answered in part by these weights
        cleans = ctx.mesh.rank == 0 and ctx.cfg.selection.every_epochs > 0
        with raise_on_all_ranks(ctx.mesh):
            for folder in self._root.glob("epoch-*") if cleans else ():
                if folder not in valid:
                    shutil.rmtree(folder)

    def make_if_due(self) -> None:
        """Select if it is time. Call at the start of a step, after the engines have its weights.

        Raises DataError if nothing is kept, StopRequested if the run was asked to stop.
        """
        if not self._is_due:
            return
        ctx, epoch, position = self._ctx, self._stream.epoch, self._stream.state
        self._save()
        with ctx.clock("select"):
            seed = (ctx.cfg.run.seed, epoch)
            chosen = select(self._candidates(epoch), ctx.cfg.selection, seed)
            kept = {candidate.id for candidate in chosen if candidate.verdict == KEPT}
            with raise_on_all_ranks(ctx.mesh):
                if ctx.mesh.rank == 0:
                    rule = ctx.cfg.selection
                    write_selection(self._folder(epoch), chosen, len(chosen), rule)
                recorded = statistics_of(candidate.row() for candidate in chosen)
                self._apply(kept, recorded, epoch, position)
        self._state.selections.append([epoch, position])
        self._log(f"From epoch {epoch} on {_sentence(chosen, kept)}; see {self._folder(epoch)}.")

    @property
    def _is_due(self) -> bool:
        every = self._ctx.cfg.selection.every_epochs
        last = self._state.selections[-1][0] if self._state.selections else 0
        return every > 0 and self._stream.epoch >= last + every

    def _folder(self, epoch: int) -> Path:
        return self._root / f"epoch-{epoch:04d}"

    def _apply(
        self, kept: set[str], recorded: Mapping[str, Statistics], epoch: int, position: int
    ) -> None:
        """Let the stream draw only the kept samples from `position` on, which begins `epoch`."""
        cfg = self._ctx.cfg
        pool = only(self._pool, kept)
        if not len(pool):
            raise DataError(
                f"The selection at epoch {epoch} keeps none of the pool's samples, see "
                f"{self._folder(epoch)}: lower selection.min_std={cfg.selection.min_std:g} and "
                f"selection.min_mean={cfg.selection.min_mean:g}, or set selection.every_epochs=0."
            )
        weights = None
        if has_weights(cfg.data):
            weights = sample_weights(pool.names(), recorded, cfg.data)
        schedule = schedule_of(pool, cfg.data.train, cfg.run.seed, weights=weights)
        self._stream.turn(pool, schedule, start=position, epoch=epoch)

    def _save(self) -> None:
        """Save the run, unless its weights are those of a checkpoint already."""
        state = self._state
        finish_saving(self._ctx)
        if state.step not in (self._saved_step, 0) and (
            state.step % self._ctx.cfg.checkpoint.every_steps
        ):
            save(self._ctx, state)
            finish_saving(self._ctx)
        self._saved_step = state.step

    def _candidates(self, epoch: int) -> list[Candidate]:
        """Return the statistics of the whole pool, in its order, the same on every rank."""
        ctx, folder = self._ctx, self._folder(epoch)
        spec = sampling_spec(ctx.cfg, epoch, 1)  # training has other seeds, by stream position
        with raise_on_all_ranks(ctx.mesh):
            numbers = _numbers(self._pool)
            names, size = list(numbers), ctx.cfg.rollout.prompts_per_step
            blocks = [names[begin : begin + size] for begin in range(0, len(names), size)]
            begun = self._begun(folder, spec, blocks) if ctx.mesh.rank == 0 else {}
        known = gather_objects(world_axis(ctx.mesh), begun)[0]
        for block in blocks:
            if block[0] in known:
                continue
            stop_if_asked(ctx.mesh, self._state.step)
            mine = shard(block, ctx.mesh.data, ctx.mesh.model)
            own = self._answered([numbers[name] for name in mine], spec)
            of_all = dict(chain(*gather_objects(world_axis(ctx.mesh), own)))
            rows = [of_all[numbers[name]] for name in block]
            with raise_on_all_ranks(ctx.mesh):
                if ctx.mesh.rank == 0:
                    _append(folder / ANSWERS, rows)
            known |= self._by_id(rows)
        return [known[name] for name in names]

    def _begun(
        self, folder: Path, spec: SamplingSpec, blocks: Sequence[Sequence[str]]
    ) -> dict[str, Candidate]:
        """Return the candidates that an earlier process answered with these weights, by id.

        Answers of other weights or settings are removed. Rank 0 calls it.
        """
        prompts = self._ctx.cfg.rollout.prompts_per_step
        settings = {"version": self._state.version, "prompts_per_step": prompts} | asdict(spec)
        path = folder / "settings.json"
        if folder.exists() and (not path.exists() or json.loads(path.read_text()) != settings):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(settings, indent=1) + "\n")
        return self._by_id(resume(folder / ANSWERS, blocks).values())

    def _by_id(self, rows: Iterable[Row]) -> dict[str, Candidate]:
        return {
            candidate.id: candidate
            for candidate in candidates_of(rows, self._ctx.reward_manager.weights)
        }

    def _answered(self, mine: Sequence[int], spec: SamplingSpec) -> list[tuple[int, Row]]:
        """Return (number in the pool, row) of this rank's samples. Every rank calls it."""
        ctx = self._ctx
        with raise_on_all_ranks(ctx.mesh):
            samples = {number: _sample(self._pool[number]) for number in mine}
            loaded = dict(zip(mine, ctx.prompts.load(list(samples.values())), strict=True))
        prompts = {number: one for number, one in loaded.items() if isinstance(one, Prompt)}
        rollouts = ctx.rollout_manager.generate(
            ctx.embed(list(prompts.values())), spec, list(prompts)
        )
        answers: dict[int, list[Rollout] | VideoError] = {
            number: one for number, one in loaded.items() if isinstance(one, VideoError)
        }
        answers |= dict(zip(prompts, rollouts, strict=True))
        with raise_on_all_ranks(ctx.mesh):
            return [
                (number, answer_row(sample, answers[number], spec, ctx.reward_manager))
                for number, sample in samples.items()
            ]


def _numbers(pool: Pool) -> dict[str, int]:
    """Return id -> number in the pool of every sample that can be asked."""
    drawn = ((number, pool[number]) for number in range(len(pool)))
    return {one.id: number for number, one in drawn if isinstance(one, Sample)}


def _sample(drawn: Drawn) -> Sample:
    assert isinstance(drawn, Sample)  # `_numbers` has no others
    return drawn


def _append(path: Path, rows: Sequence[Row]) -> None:
    with full_disk_named(path), path.open("a", encoding="utf-8") as file:
        file.write(json_lines(rows))


def _sentence(chosen: Sequence[Candidate], kept: Set[str]) -> str:
    """Return how many samples are kept, and why the others are not."""
    verdicts = Counter(candidate.verdict for candidate in chosen if candidate.verdict != KEPT)
    dropped = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return f"{len(kept)} of {len(chosen)} samples" + (f", without {dropped}" if dropped else "")
