"""Generation from stored rollouts (`rollout.placement: replay`), without engine and vLLM.

A prompt is looked up by its sample and its seed. The seed derives from the sample's position in the
data stream, so a run with the same data and run.seed asks for the groups that the files hold.
Rewards are computed again.

A group becomes ready at the step that trained on it in the original run, so that a replay of an
overlapped run trains on the same groups at the same steps. Example: weights version 3, futures of
groups that the original run took at versions 2, 3 and 5. The first two are done. The third is done
when the version reaches 5, or at once if version 3 is synced a second time, since the trainer then
needs more groups at version 3 than the original run took.

Greedy rollouts for evaluations are not stored and cannot be replayed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from megatron_vrl.config import RunConfig
from megatron_vrl.errors import ConfigError, DataError, RolloutError
from megatron_vrl.rollout.records import GroupRecord, decode, files_of, prompt_digest, warn
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.storage.compressed import frames, read_frame
from megatron_vrl.types import Prompt, Rollout

Key = tuple[str, int]  # sample, seed of the first answer


class RecordLocation(NamedTuple):
    """Position of a group's line."""

    path: Path
    begin: int  # of the compressed frame, bytes
    line: int  # within the frame


class _Seed(msgspec.Struct):
    seed: int


class _Head(msgspec.Struct):
    """Fields of a line that the index needs. msgspec skips the others."""

    sample: str
    answers: list[_Seed]


class ReplayFiles:
    """Index of the stored groups by key. Groups are read from disk when they are asked for."""

    def __init__(self, directory: str | Path, loud: bool = True) -> None:
        """Index all files. loud: warn about torn frames.

        Raises DataError if a group is stored twice.
        """
        self._locations: dict[Key, RecordLocation] = {}
        self.directory = Path(directory)
        for path in files_of(directory):
            for frame in frames(path, warn if loud else lambda sentence: None):
                for number, line in enumerate(frame.content.splitlines()):
                    self._note(_key(line, path), RecordLocation(path, frame.begin, number))

    def groups(self, keys: Sequence[Key]) -> dict[Key, GroupRecord]:
        """Return the stored groups among `keys`. A frame with several of them is read once."""
        wanted: dict[tuple[Path, int], list[tuple[int, Key]]] = {}
        for key in keys:
            if location := self._locations.get(key):
                wanted.setdefault((location.path, location.begin), []).append((location.line, key))
        return dict(self._read(wanted))

    def _read(
        self, wanted: dict[tuple[Path, int], list[tuple[int, Key]]]
    ) -> Iterator[tuple[Key, GroupRecord]]:
        for (path, begin), of_frame in wanted.items():
            lines = read_frame(path, begin).splitlines()
            for number, key in of_frame:
                yield key, decode(lines[number], path)

    def _note(self, key: Key, location: RecordLocation) -> None:
        if key in self._locations:
            raise DataError(
                f"{self.directory} holds the rollouts of sample {key[0]} with seed {key[1]} twice "
                f"({self._locations[key].path.name}, {location.path.name}): name the files of one "
                "run."
            )
        self._locations[key] = location


@dataclass(frozen=True, slots=True)
class ReplayFuture:
    """Rollouts of one prompt. group: None if they are not stored."""

    engine: "ReplayEngine"
    prompt: Prompt
    spec: SamplingSpec
    group: GroupRecord | None

    def done(self) -> bool:
        """Return True once the trainer's version has reached the one that took the group."""
        return self.engine.is_ready(self.group.version if self.group else None)

    def result(self) -> list[Rollout]:
        """Return the rollouts.

        Raises RolloutError if they are not stored, or belong to another prompt or spec.
        """
        if self.group is None:
            raise RolloutError(
                f"{self.engine.directory} holds no rollouts of sample {self.prompt.id} with seed "
                f"{self.spec.seed}: generate them with the run.seed, data and grpo.steps of this "
                "run."
            )
        _check_same(self.group, self.prompt, self.spec, self.engine.directory)
        rollouts = self.group.rollouts()
        self.engine.check_age(self.prompt.id, rollouts)
        return rollouts


class ReplayEngine:
    """Generator over stored rollouts. Its weight sync only records the version number."""

    no_live_workers = True  # waiting never makes a stored group ready
    needs_weights = False

    def __init__(self, files: ReplayFiles, importance_weights: bool) -> None:
        """importance_weights: the loss corrects for rollouts of other weights than the trainer's;
        without them such rollouts are refused."""
        self.directory = files.directory
        self._files, self._importance_weights = files, importance_weights
        self._version = -1  # of the trainer's weights
        self._all_ready = False

    def submit(
        self, prompts: Sequence[Prompt], specs: Sequence[SamplingSpec]
    ) -> list[ReplayFuture]:
        """Look up one group per prompt. A group that is missing raises in `result`."""
        keys = [(p.id, s.seed) for p, s in zip(prompts, specs, strict=True)]
        groups = self._files.groups(keys)
        return [
            ReplayFuture(self, prompt, spec, groups.get(key))
            for prompt, spec, key in zip(prompts, specs, keys, strict=True)
        ]

    def sync(self, version: int, min_workers: int) -> bool:
        """Record the trainer's version and return True.

        A second sync of one version makes every group ready, see the module docstring.
        """
        self._all_ready = version == self._version
        self._version = version
        return True

    def is_ready(self, taken_at: int | None) -> bool:
        """Return True if a group that was trained on at version `taken_at` may be returned."""
        return self._all_ready or (taken_at is not None and taken_at <= self._version)

    def check_age(self, sample: str, rollouts: Sequence[Rollout]) -> None:
        """Raise RolloutError if rollouts of other weights would be trained on as on-policy."""
        for rollout in rollouts:
            if not self._importance_weights and rollout.newest_version != self._version:
                raise RolloutError(
                    f"The rollouts of sample {sample} are of weights {rollout.newest_version}, and "
                    f"the trainer has {self._version}: set algorithm.rollout_is=token (or "
                    "sequence)."
                )


def check_replay(cfg: RunConfig) -> None:
    """Raise UserError if `placement: replay` is set with a config that needs an engine."""
    directory = cfg.rollout.replay_dir
    if cfg.rollout.placement != "replay":
        return
    if not directory:
        raise ConfigError(
            "rollout.placement=replay needs rollout.replay_dir: name the rollouts of a run."
        )
    for key, is_set in (
        ("data.evaluation", bool(cfg.data.evaluation)),
        ("sft.stop_metric", bool(cfg.sft.steps and cfg.sft.stop_metric)),
        ("grpo.evaluate_every", bool(cfg.grpo.evaluate_every)),
    ):
        if is_set:
            raise ConfigError(
                f"rollout.placement=replay generates nothing for evaluations, and {key} is set: "
                "set data.evaluation={}, sft.stop_metric='' and grpo.evaluate_every=0, and "
                "evaluate the export with tools/evaluate.py."
            )
    if Path(directory).resolve() == (Path(cfg.run.out_dir) / "rollouts").resolve():
        raise ConfigError(
            f"rollout.replay_dir={directory} is where this run writes its rollouts: choose another "
            "run.out_dir."
        )
    files_of(directory)


def _check_same(group: GroupRecord, prompt: Prompt, spec: SamplingSpec, directory: Path) -> None:
    """Raise RolloutError if the group was generated with another spec or for another prompt."""
    settings = {
        "rollout.group_size": (len(group.answers), spec.n),
        "rollout.temperature": (group.temperature, spec.temperature),
        "rollout.top_p": (group.top_p, spec.top_p),
        "rollout.max_response_tokens": (group.max_tokens, spec.max_tokens),
    }
    for key, (stored, wanted) in settings.items():
        if stored != wanted:
            raise RolloutError(
                f"The rollouts of sample {prompt.id} in {directory} were generated with "
                f"{key}={stored}, not {wanted}: set {key}={stored}."
            )
    if group.prompt_digest != prompt_digest(prompt):
        raise RolloutError(
            f"The rollouts of sample {prompt.id} in {directory} belong to another prompt, since "
            "its video, its question or a setting of `video` or `data` has changed: restore it, or "
            "generate the rollouts again."
        )


def _key(line: bytes, path: Path) -> Key:
    """Return the key of a line. Raises DataError if the line is not a group."""
    try:
        head = msgspec.json.decode(line, type=_Head)
        return head.sample, head.answers[0].seed
    except (msgspec.DecodeError, IndexError) as error:
        raise DataError(f"{path} holds a line that is not a group of rollouts: {error}.") from None
