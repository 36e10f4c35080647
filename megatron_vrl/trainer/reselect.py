"""Selection between epochs of GRPO: answer the pool again and train on what still teaches.

With `selection.every_epochs: k` a selection is due at the first step that begins k epochs after the
last one. It answers the whole pool with the weights of that moment, on the run's own engines, in
blocks of `rollout.prompts_per_step` prompts, and applies the rules of tools/select_data.py. Samples
that a step drew across the end of the epoch stay drawn. Dropped samples are answered again at the
next selection and may come back.

OUT/selection/epoch-NNNN holds the tool's files. The run is saved before the first answer, so a
killed run goes on with the same weights and answers no finished block again; the seed of an answer
comes from the epoch and the sample's place in the pool. A resumed run removes selections that were
made after its checkpoint, unless `selection.every_epochs` is 0.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vrl.config import RunConfig
from megatron_vrl.context import RunContext
from megatron_vrl.data.mix import SampleStream
from megatron_vrl.data.pool import Drawn, Pool
from megatron_vrl.data.schedule import read_ids
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.parallel.mesh import gather_objects, raise_on_all_ranks, shard, world_axis
from megatron_vrl.rewards import weights_of
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.selection.rules import KEPT, Candidate, candidate, select
from megatron_vrl.selection.select import judged, write_selection
from megatron_vrl.storage.files import full_disk_named, read_rows, write_file
from megatron_vrl.trainer.preemption import stop_if_asked
from megatron_vrl.trainer.sample_stream import only, schedule_of
from megatron_vrl.trainer.state import RunState, finish_saving, save
from megatron_vrl.types import Prompt, VideoSample

FOLDER, ANSWERS = "selection", "answers-0.jsonl"
Row = dict[str, Any]


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
    """Every rank calls its methods, in the same order."""

    def __init__(
        self,
        ctx: RunContext,
        state: RunState,
        pool: Pool,
        stream: SampleStream,
        say: Callable[[str], None],
    ) -> None:
        """`stream` is of `pool` and stands where the run does; it then turns where it did before.

        Raises DataError if a selection that was made is gone.
        """
        self._ctx, self._state, self._pool, self._stream = ctx, state, pool, stream
        self._say = say
        self._root = Path(ctx.cfg.run.out_dir) / FOLDER
        self._saved_step = state.step  # at which the run was saved last, as far as known here
        with raise_on_all_ranks(ctx.mesh):
            for epoch, place in state.selections:
                self._turn(read_ids(str(self._folder(epoch) / "kept.jsonl")), epoch, place)
        valid = {self._folder(epoch) for epoch, _ in state.selections}
        if self._is_due:
            valid.add(self._folder(stream.epoch))  # of these weights: it was begun
        cleans = ctx.mesh.rank == 0 and ctx.cfg.selection.every_epochs > 0
        with raise_on_all_ranks(ctx.mesh):
            for folder in self._root.glob("epoch-*") if cleans else ():
                if folder not in valid:
                    shutil.rmtree(folder)

    def make_if_due(self) -> None:
        """At the beginning of a step, when the engines hold its weights.

        Raises DataError if nothing is kept, StopRequested if the run was asked to stop.
        """
        if not self._is_due:
            return
        ctx, epoch, place = self._ctx, self._stream.epoch, self._stream.state
        self._save()
        with ctx.clock("select"):
            chosen = select(self._candidates(epoch), ctx.cfg.selection)
            kept = {found.id for found in chosen if found.verdict == KEPT}
            with raise_on_all_ranks(ctx.mesh):
                if ctx.mesh.rank == 0:
                    rule = ctx.cfg.selection
                    write_selection(self._folder(epoch), chosen, len(chosen), rule)
                self._turn(kept, epoch, place)
        self._state.selections.append([epoch, place])
        self._say(f"From epoch {epoch} on {_told(chosen, kept)}; see {self._folder(epoch)}.")

    @property
    def _is_due(self) -> bool:
        every = self._ctx.cfg.selection.every_epochs
        last = self._state.selections[-1][0] if self._state.selections else 0
        return every > 0 and self._stream.epoch >= last + every

    def _folder(self, epoch: int) -> Path:
        return self._root / f"epoch-{epoch:04d}"

    def _turn(self, kept: set[str], epoch: int, place: int) -> None:
        cfg = self._ctx.cfg
        pool = only(self._pool, kept)
        if not len(pool):
            raise DataError(
                f"The selection at epoch {epoch} keeps none of the pool's samples, see "
                f"{self._folder(epoch)}: lower selection.min_std={cfg.selection.min_std:g} and "
                f"selection.min_mean={cfg.selection.min_mean:g}, or set selection.every_epochs=0."
            )
        schedule = schedule_of(pool, cfg.data.train, cfg.run.seed)
        self._stream.turn(pool, schedule, start=place, epoch=epoch)

    def _save(self) -> None:
        """So that the weights that answer are those that a restarted run begins with."""
        state = self._state
        finish_saving(self._ctx)
        if state.step not in (self._saved_step, 0) and (
            state.step % self._ctx.cfg.checkpoint.every_steps
        ):
            save(self._ctx, state)
            finish_saving(self._ctx)
        self._saved_step = state.step

    def _candidates(self, epoch: int) -> list[Candidate]:
        """Of the whole pool, in its order, the same on every rank."""
        ctx, folder, spec = self._ctx, self._folder(epoch), _spec(self._ctx.cfg, epoch)
        with raise_on_all_ranks(ctx.mesh):
            places = _places(self._pool)
            names, size = list(places), ctx.cfg.rollout.prompts_per_step
            blocks = [names[begin : begin + size] for begin in range(0, len(names), size)]
            begun = self._begun(folder, spec, blocks) if ctx.mesh.rank == 0 else {}
        known = gather_objects(world_axis(ctx.mesh), begun)[0]
        for block in blocks:
            if block[0] in known:
                continue
            stop_if_asked(ctx.mesh, self._state.step)
            mine = shard(block, ctx.mesh.data, ctx.mesh.model)
            own = self._answered([places[name] for name in mine], spec)
            of_all = dict(chain(*gather_objects(world_axis(ctx.mesh), own)))
            rows = [of_all[places[name]] for name in block]
            with raise_on_all_ranks(ctx.mesh):
                if ctx.mesh.rank == 0:
                    _append(folder / ANSWERS, rows)
            known |= {row["id"]: self._candidate(row) for row in rows}
        return [known[name] for name in names]

    def _begun(
        self, folder: Path, spec: SamplingSpec, blocks: Sequence[Sequence[str]]
    ) -> dict[str, Candidate]:
        """Return the candidates that an earlier process answered with these weights.

        A block that is there in part is dropped: its other prompts alone would be another batch,
        which the engine's kernels may round otherwise. Rank 0 calls it.
        """
        prompts = self._ctx.cfg.rollout.prompts_per_step
        settings = {"version": self._state.version, "prompts_per_step": prompts} | asdict(spec)
        path = folder / "settings.json"
        if folder.exists() and (not path.exists() or json.loads(path.read_text()) != settings):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(settings, indent=1) + "\n")
        found = {row["id"]: row for row in read_rows(folder / ANSWERS)}
        whole = [block for block in blocks if all(name in found for name in block)]
        rows = [found[name] for block in whole for name in block]
        write_file(folder / ANSWERS, _lines(rows))
        return {row["id"]: self._candidate(row) for row in rows}

    def _candidate(self, row: Row) -> Candidate:
        weights = weights_of(self._ctx.cfg.rewards)
        return candidate(row["id"], row["task"], row["answers"], weights[row["task"]])

    def _answered(self, places: Sequence[int], spec: SamplingSpec) -> list[tuple[int, Row]]:
        """(place, row) of this rank's places in the pool. Every rank calls it."""
        ctx = self._ctx
        with raise_on_all_ranks(ctx.mesh):
            samples = {place: _sample(self._pool[place]) for place in places}
            loaded = dict(zip(places, ctx.prompts.load(list(samples.values())), strict=True))
        prompts = {place: one for place, one in loaded.items() if isinstance(one, Prompt)}
        answers = ctx.rollout_manager.generate(
            ctx.embed(list(prompts.values())), spec, list(prompts)
        )
        rows: list[tuple[int, Row]] = []
        with raise_on_all_ranks(ctx.mesh):
            of_place = dict(zip(prompts, answers, strict=True))
            for place, sample in samples.items():
                row: Row = {"id": sample.id, "task": sample.task, "seed": spec.seed, "answers": []}
                if place in of_place:
                    row["answers"] = judged(ctx.reward_manager, sample, of_place[place])
                else:
                    row["problem"] = str(loaded[place])
                rows.append((place, row))
        return rows


def _spec(cfg: RunConfig, epoch: int) -> SamplingSpec:
    """The seeds are not those of training, which go by the place in the stream."""
    return SamplingSpec(
        n=cfg.selection.answers,
        temperature=cfg.selection.temperature,
        top_p=cfg.rollout.top_p,
        max_tokens=cfg.rollout.max_response_tokens,
        seed=int(np.random.SeedSequence([cfg.run.seed, epoch, 1]).generate_state(1)[0] >> 1),
    )


def _places(pool: Pool) -> dict[str, int]:
    """Id -> place of every sample that can be asked about."""
    drawn = ((place, pool[place]) for place in range(len(pool)))
    return {one.id: place for place, one in drawn if isinstance(one, VideoSample)}


def _sample(drawn: Drawn) -> VideoSample:
    assert isinstance(drawn, VideoSample)  # `_places` has no others
    return drawn


def _append(path: Path, rows: Sequence[Row]) -> None:
    with full_disk_named(path), path.open("a", encoding="utf-8") as file:
        file.write(_lines(rows))


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _told(chosen: Sequence[Candidate], kept: Set[str]) -> str:
    verdicts = Counter(found.verdict for found in chosen if found.verdict != KEPT)
    dropped = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return f"{len(kept)} of {len(chosen)} samples" + (f", without {dropped}" if dropped else "")
