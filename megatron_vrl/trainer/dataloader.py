"""Data loader of a training phase: the prompts of each step, with decoded videos.

A sample with a video or an image that cannot be read is written to quarantine.jsonl and replaced by
the next sample of the stream, at the same position in the step, so that every step has the same
number of groups. Example: a step takes samples 0 to 3 of the stream and the file of sample 2 is
truncated. The step trains on 0, 1, 4, 3, and the next step begins with 5.

All ranks exchange their bad samples before any rank draws again, so all draw the same samples. A
checkpoint holds the position in the stream, so a resumed run draws the same samples in the same
order. Videos and images of the next step are decoded in the background.

Evaluations have fixed samples and replace none of them: see evaluation/during_training.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from megatron_vrl.context import RunContext
from megatron_vrl.data.mix import SampleStream
from megatron_vrl.data.problems import Problem, summary
from megatron_vrl.data.snap_truth import snapped
from megatron_vrl.errors import UserError, VideoError
from megatron_vrl.parallel.mesh import gather_objects, raise_on_all_ranks, shard, world_axis
from megatron_vrl.storage.files import RowFile, read_rows
from megatron_vrl.trainer.state import RunState
from megatron_vrl.types import EncodedVideo, Prompt, Sample

MIN_DRAWN = 100  # least divisor of the fraction of bad samples


class PreparedSample(NamedTuple):
    """A sample with its prompt, whose video is decoded."""

    sample: Sample
    prompt: Prompt
    position: int  # position of the sample in the stream


class PromptDataLoader:
    """Data loader over one sample stream. Every rank calls its methods, in the same order."""

    def __init__(
        self, ctx: RunContext, stream: SampleStream, state: RunState, log: Callable[[str], None]
    ):
        """Remove the rows of quarantine.jsonl that the resumed run will write again.

        Samples that were in flight when `state` was saved are drawn first, again. `log` prints a
        message.
        """
        self._ctx, self._stream, self._state, self._log = ctx, stream, state, log
        path = Path(ctx.cfg.run.out_dir) / "quarantine.jsonl"
        self._file: RowFile | None = None
        with raise_on_all_ranks(ctx.mesh):
            if ctx.mesh.rank == 0:
                self._file = RowFile(path, resume=state.next_row)
        self._written = {(row["sample"], row["video"]) for row in read_rows(path)}
        self._bad: list[Problem] = []  # bad samples since this process started
        self._reported: set[str] = set()  # kinds of problems that have been logged
        self._bad_before = state.bad_samples
        self._to_redraw = list(state.in_flight)
        self._num_drawn = state.stream - len(self._to_redraw)
        self._counts_before = dict.fromkeys(ctx.reader.counts, 0)

    @property
    def position(self) -> int:
        """Number of samples drawn from the stream."""
        return self._stream.state

    def take(self, num: int) -> list[PreparedSample]:
        """Return this rank's shard of the next `num` samples with readable videos.

        Raises UserError on every rank if more than video.max_bad_fraction of the samples are bad.
        """
        mesh = self._ctx.mesh
        own_slots = shard(range(num), mesh.data, mesh.model)
        prepared: dict[int, PreparedSample] = {}  # by position in the step
        missing = list(range(num))
        while missing:
            drawn = dict(zip(missing, self._draw(len(missing)), strict=True))
            new, bad = self._prepare({slot: drawn[slot] for slot in own_slots if slot in drawn})
            prepared |= new
            bad_of_step: dict[int, Problem] = {}
            for bad_of_rank in gather_objects(world_axis(mesh), bad):
                bad_of_step = bad_of_rank | bad_of_step
            missing = sorted(bad_of_step)
            self._quarantine([bad_of_step[slot] for slot in missing])
        return [prepared[slot] for slot in own_slots]

    def prefetch(self, num: int) -> None:
        """Decode this rank's shard of the next `num` samples in the background."""
        mesh = self._ctx.mesh
        with raise_on_all_ranks(mesh):
            upcoming = shard(self._stream.peek(num), mesh.data, mesh.model)
        samples = [item for item in upcoming if isinstance(item, Sample)]
        self._ctx.reader.prefetch([medium for sample in samples for medium in sample.media])

    def metrics(self) -> dict[str, float]:
        """Return the counts of all ranks since the last call."""
        counts = dict(self._ctx.reader.counts)
        own = {name: count - self._counts_before[name] for name, count in counts.items()}
        self._counts_before = counts
        total_bad = self._state.bad_samples
        bad, self._bad_before = total_bad - self._bad_before, total_bad
        counts_of_ranks = gather_objects(world_axis(self._ctx.mesh), own)
        names = {"decoded": "data/videos_decoded", "store": "data/videos_from_store"}
        names["retried"] = "data/videos_retried"
        return {
            "data/bad_samples": float(bad),
            "data/bad_fraction": total_bad / max(self._num_drawn, 1),
        } | {metric: float(sum(c[name] for c in counts_of_ranks)) for name, metric in names.items()}

    def _draw(self, num: int) -> list[tuple[int, Sample | Problem]]:
        """Return the next `num` items of the stream, each with its position in the stream."""
        self._num_drawn += num
        redrawn, self._to_redraw = self._to_redraw[:num], self._to_redraw[num:]
        with raise_on_all_ranks(self._ctx.mesh):
            drawn = [(position, self._stream.at(position)) for position in redrawn]
            for _ in range(num - len(redrawn)):
                (item,) = self._stream.draw(1)
                drawn.append((self._stream.state - 1, item))
        return drawn

    def _prepare(
        self, drawn: dict[int, tuple[int, Sample | Problem]]
    ) -> tuple[dict[int, PreparedSample], dict[int, Problem]]:
        """Return this rank's prepared samples and its bad samples, both by position in the step."""
        bad = {slot: item for slot, (_, item) in drawn.items() if isinstance(item, Problem)}
        samples = {s: item for s, (_, item) in drawn.items() if isinstance(item, Sample)}
        with raise_on_all_ranks(self._ctx.mesh):
            prompts = self._ctx.prompts.load(list(samples.values()))
        prepared: dict[int, PreparedSample] = {}
        for (slot, sample), prompt in zip(samples.items(), prompts, strict=True):
            if isinstance(prompt, VideoError):
                bad[slot] = Problem.of_video(sample, prompt)
            else:
                prepared[slot] = PreparedSample(self._truth(sample, prompt), prompt, drawn[slot][0])
        return prepared, bad

    def _truth(self, sample: Sample, prompt: Prompt) -> Sample:
        """Return the sample, with its true intervals at sampled frames if data.snap_truth is on."""
        if not self._ctx.cfg.data.snap_truth:
            return sample
        videos = [visual for visual in prompt.visuals if isinstance(visual, EncodedVideo)]
        return snapped(sample, videos[0]) if len(videos) == 1 else sample

    def _quarantine(self, bad: list[Problem]) -> None:
        """Count the bad samples, write them to the file and check video.max_bad_fraction.

        Every rank passes the same `bad`. Rank 0 writes.
        """
        self._bad += bad
        self._state.bad_samples += len(bad)
        new = [problem for problem in bad if (problem.sample, problem.video) not in self._written]
        self._written |= {(problem.sample, problem.video) for problem in new}
        with raise_on_all_ranks(self._ctx.mesh):
            for problem in new:
                if self._file:
                    when = {"phase": self._state.stage, "step": self._state.step + 1}
                    self._file.append(when | problem.row())
        self._report(new)
        limit = self._ctx.cfg.video.max_bad_fraction
        if self._state.bad_samples > limit * max(self._num_drawn, MIN_DRAWN):
            since = "since the run was resumed " if len(self._bad) < self._state.bad_samples else ""
            raise UserError(
                f"{self._state.bad_samples} of the {self._num_drawn} samples drawn have bad "
                f"videos, over video.max_bad_fraction={limit}: {since}{summary(self._bad)}; see "
                "quarantine.jsonl, check the data with tools/check_data.py, or raise the limit."
            )

    def _report(self, new: list[Problem]) -> None:
        """Log the first problem of each kind in full; of the others in `new`, only the number."""
        others = []
        for problem in new:
            if problem.kind in self._reported:
                others.append(problem)
            else:
                self._reported.add(problem.kind)
                self._log(f"Quarantined {problem.sample}: {problem.reason}")
        if others:
            self._log(f"Quarantined {len(others)} more: {summary(others)}; see quarantine.jsonl.")
