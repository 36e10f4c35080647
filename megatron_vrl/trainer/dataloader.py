"""Samples of a step, with their videos: a bad video costs its sample, never the batch.

A sample whose video cannot be used is written to quarantine.jsonl and replaced by the next sample
of the stream, at the same place of the same rank, so groups stay as many and as large as they were.
All ranks hear of every bad sample before any draws again, and all draw the same; how far the stream
has come is saved with the run, so a restarted one goes on in the same order. What the next step
will need is decoded in the background. (Evaluations have fixed samples: see evaluation.py.)
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from megatron_vrl.context import RunContext
from megatron_vrl.data.mix import SampleStream
from megatron_vrl.data.problems import Problem, summary
from megatron_vrl.errors import UserError, VideoError
from megatron_vrl.parallel.mesh import gather_objects, raise_on_all_ranks, world_axis
from megatron_vrl.storage.files import RowFile, read_rows
from megatron_vrl.trainer.state import RunState
from megatron_vrl.types import Prompt, VideoSample

FEWEST_DRAWN = 100  # the share of bad samples is not taken of fewer


class PreparedSample(NamedTuple):
    sample: VideoSample
    prompt: Prompt
    position: int  # of the sample in the stream


class PromptDataLoader:
    """The stream of one phase. Every rank calls its methods, in the same order."""

    def __init__(
        self, ctx: RunContext, stream: SampleStream, state: RunState, say: Callable[[str], None]
    ):
        """Rows of quarantine.jsonl that the run will write again are taken back. What was drawn
        and not yet trained on when the state was saved is drawn first."""
        self._ctx, self._stream, self._state, self._say = ctx, stream, state, say
        path = Path(ctx.cfg.run.out_dir) / "quarantine.jsonl"
        self._file: RowFile | None = None
        with raise_on_all_ranks(ctx.mesh):
            if ctx.mesh.rank == 0:
                self._file = RowFile(path, resume=state.next_row)
        self._written = {(row["sample"], row["video"]) for row in read_rows(path)}
        self._bad: list[Problem] = []  # since this start
        self._told: set[str] = set()  # kinds of problems
        self._bad_before = state.bad_samples
        self._again = list(state.under_way)
        self._num_drawn = state.stream - len(self._again)
        self._counts_before = dict.fromkeys(ctx.reader.counts, 0)

    @property
    def position(self) -> int:
        """How far the stream has come."""
        return self._stream.state

    def take(self, num: int) -> list[PreparedSample]:
        """This rank's share of the next `num` samples with usable videos.

        Raises UserError on every rank if more than video.max_bad_fraction of the samples are bad.
        """
        mine = self._ctx.rank_share(range(num))
        made: dict[int, PreparedSample] = {}
        open_places = list(range(num))
        while open_places:
            drawn = dict(zip(open_places, self._draw(len(open_places)), strict=True))
            new, bad = self._make({place: drawn[place] for place in mine if place in drawn})
            made |= new
            found: dict[int, Problem] = {}
            for of_rank in gather_objects(world_axis(self._ctx.mesh), bad):
                found = of_rank | found
            open_places = sorted(found)
            self._note([found[place] for place in open_places])
        return [made[place] for place in mine]

    def prefetch(self, num: int) -> None:
        """Decode this rank's share of the next `num` samples in the background."""
        with raise_on_all_ranks(self._ctx.mesh):
            coming = self._ctx.rank_share(self._stream.peek(num))
        clip = [sample.clip for sample in coming if isinstance(sample, VideoSample)]
        self._ctx.reader.prefetch(clip)

    def numbers(self) -> dict[str, float]:
        """Of all ranks since the last call."""
        counts = dict(self._ctx.reader.counts)
        own = {name: count - self._counts_before[name] for name, count in counts.items()}
        self._counts_before = counts
        bad_in_all = self._state.bad_samples
        bad, self._bad_before = bad_in_all - self._bad_before, bad_in_all
        everywhere = gather_objects(world_axis(self._ctx.mesh), own)
        names = {"decoded": "videos_decoded", "store": "videos_from_store"}
        names["retried"] = "videos_retried"
        return {
            "bad_samples": float(bad),
            "bad_sample_share": bad_in_all / max(self._num_drawn, 1),
        } | {title: float(sum(o[name] for o in everywhere)) for name, title in names.items()}

    def _draw(self, num: int) -> list[tuple[int, VideoSample | Problem]]:
        """With their positions."""
        self._num_drawn += num
        again, self._again = self._again[:num], self._again[num:]
        with raise_on_all_ranks(self._ctx.mesh):
            drawn = [(position, self._stream.at(position)) for position in again]
            for _ in range(num - len(again)):
                (item,) = self._stream.draw(1)
                drawn.append((self._stream.state - 1, item))
        return drawn

    def _make(
        self, drawn: dict[int, tuple[int, VideoSample | Problem]]
    ) -> tuple[dict[int, PreparedSample], dict[int, Problem]]:
        """By place: prompts of this rank's samples, and what is wrong with the others."""
        made: dict[int, PreparedSample] = {}
        items = {place: item for place, (_, item) in drawn.items()}
        bad = {place: item for place, item in items.items() if isinstance(item, Problem)}
        samples = {p: item for p, item in items.items() if isinstance(item, VideoSample)}
        with raise_on_all_ranks(self._ctx.mesh):
            videos = self._ctx.reader.encode([s.clip for s in samples.values()])
            for (place, sample), video in zip(samples.items(), videos, strict=True):
                if isinstance(video, VideoError):
                    bad[place] = Problem(
                        sample=sample.id, video=sample.video, kind=video.kind, reason=str(video)
                    )
                else:
                    prompt = self._ctx.encoder.prompt(sample, video)
                    made[place] = PreparedSample(sample, prompt, drawn[place][0])
        return made, bad

    def _note(self, bad: list[Problem]) -> None:
        """Every rank holds the same `bad`; rank 0 writes."""
        self._bad += bad
        self._state.bad_samples += len(bad)
        new = [problem for problem in bad if (problem.sample, problem.video) not in self._written]
        self._written |= {(problem.sample, problem.video) for problem in new}
        with raise_on_all_ranks(self._ctx.mesh):
            for problem in new:
                if self._file:
                    when = {"phase": self._state.stage, "step": self._state.step + 1}
                    self._file.append(when | problem.row())
        self._tell(new)
        most = self._ctx.cfg.video.max_bad_fraction
        if self._state.bad_samples > most * max(self._num_drawn, FEWEST_DRAWN):
            since = "since this start " if len(self._bad) < self._state.bad_samples else ""
            raise UserError(
                f"{self._state.bad_samples} of the {self._num_drawn} samples drawn have bad "
                f"videos, over video.max_bad_fraction={most}: {since}{summary(self._bad)}; see "
                "quarantine.jsonl, check the data with tools/check_data.py, or raise the limit."
            )

    def _tell(self, new: list[Problem]) -> None:
        """The first of each kind in full; of the others of a batch how many they are."""
        others = []
        for problem in new:
            if problem.kind in self._told:
                others.append(problem)
            else:
                self._told.add(problem.kind)
                self._say(f"Quarantined {problem.sample}: {problem.reason}")
        if others:
            self._say(f"Quarantined {len(others)} more: {summary(others)}; see quarantine.jsonl.")
