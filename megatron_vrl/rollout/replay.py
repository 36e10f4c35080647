"""Rollouts that were made before, from files: no engine, no vLLM.

A prompt is looked up by its sample and the seed that it is asked with. The seed comes from the
sample's place in the stream, so a run with the same data and run.seed asks for the groups that the
files hold. Each is ready at the step that took it when it was made: a run that generated beside
training takes the same groups again. What becomes of the answers is new: rewards are computed anew.

Left out: greedy answers for evaluations, which are not stored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from megatron_vrl.config import RunConfig
from megatron_vrl.errors import ConfigError, DataError, RolloutError
from megatron_vrl.rollout.buckets import NamedTensors
from megatron_vrl.rollout.identity import Member
from megatron_vrl.rollout.records import GroupRecord, decode, files_of, prompt_digest, say
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.storage.compressed import frames, read_frame
from megatron_vrl.types import Prompt, Rollout

Key = tuple[str, int]  # sample, seed of the first answer


class Place(NamedTuple):
    path: Path
    begin: int  # of its frame
    line: int


class _Seed(msgspec.Struct):
    seed: int


class _Head(msgspec.Struct):
    """What the index wants of a line; the rest is skipped."""

    sample: str
    answers: list[_Seed]


class ReplayFiles:
    """Groups by key. Holds where they lie; reads them when they are asked for."""

    def __init__(self, directory: str | Path, loud: bool = True) -> None:
        """Reads every file once. Raises DataError for a group that is there twice."""
        self._places: dict[Key, Place] = {}
        self.directory = Path(directory)
        for path in files_of(directory):
            for frame in frames(path, say if loud else lambda sentence: None):
                for number, line in enumerate(frame.content.splitlines()):
                    self._note(_key(line, path), Place(path, frame.begin, number))

    def groups(self, keys: Sequence[Key]) -> dict[Key, GroupRecord]:
        """Those that are there. A frame that holds several is read once."""
        wanted: dict[tuple[Path, int], list[tuple[int, Key]]] = {}
        for key in keys:
            if place := self._places.get(key):
                wanted.setdefault((place.path, place.begin), []).append((place.line, key))
        return dict(self._read(wanted))

    def _read(
        self, wanted: dict[tuple[Path, int], list[tuple[int, Key]]]
    ) -> Iterator[tuple[Key, GroupRecord]]:
        for (path, begin), of_frame in wanted.items():
            lines = read_frame(path, begin).splitlines()
            for number, key in of_frame:
                yield key, decode(lines[number], path)

    def _note(self, key: Key, place: Place) -> None:
        if key in self._places:
            raise DataError(
                f"{self.directory} holds the answers to sample {key[0]} with seed {key[1]} twice "
                f"({self._places[key].path.name}, {place.path.name}): give the files of one run."
            )
        self._places[key] = place


@dataclass(frozen=True, slots=True)
class ReplayFuture:
    """To one prompt; `group` is None if there are none."""

    engine: "ReplayEngine"
    prompt: Prompt
    spec: SamplingSpec
    group: GroupRecord | None

    @property
    def done(self) -> bool:
        taken_at = self.group.version if self.group else None
        return self.engine.is_ready(taken_at)

    def result(self) -> list[Rollout]:
        """Raises RolloutError if they are not there, or are answers to something else."""
        if self.group is None:
            raise RolloutError(
                f"{self.engine.directory} holds no answers to sample {self.prompt.id} with seed "
                f"{self.spec.seed}: make them with the run.seed, data and grpo.steps of this run."
            )
        _check_same(self.group, self.prompt, self.spec, self.engine.directory)
        rollouts = self.group.rollouts()
        self.engine.check_age(self.prompt.id, rollouts)
        return rollouts


class ReplayEngine:
    everywhere = True
    takes_weights = False
    starved = True  # what is not ready will not be by waiting

    def __init__(self, files: ReplayFiles, weighed: bool) -> None:
        """`weighed`: whether the loss has importance weights, which old answers want."""
        self.directory = files.directory
        self._files, self._weighed = files, weighed
        self._version = -1  # of the trainer's weights
        self._all_ready = False

    def ask(self, prompts: Sequence[Prompt], specs: Sequence[SamplingSpec]) -> list[ReplayFuture]:
        keys = [(p.id, s.seed) for p, s in zip(prompts, specs, strict=True)]
        groups = self._files.groups(keys)
        return [
            ReplayFuture(self, prompt, spec, groups.get(key))
            for prompt, spec, key in zip(prompts, specs, keys, strict=True)
        ]

    def is_ready(self, taken_at: int | None) -> bool:
        """Whether a group is given out that was taken for training at these weights."""
        return self._all_ready or (taken_at is not None and taken_at <= self._version)

    def check_age(self, sample: str, rollouts: Sequence[Rollout]) -> None:
        """Raises RolloutError if answers of other weights would be trained on as if of these."""
        for rollout in rollouts:
            if not self._weighed and rollout.newest_version != self._version:
                raise RolloutError(
                    f"Sample {sample} was answered by weights {rollout.newest_version}, and the "
                    f"trainer has {self._version}: set algorithm.rollout_is=token (or sequence)."
                )

    def gather(self, at_least: int) -> list[Member]:
        return []

    def start(self, members: Sequence[Member]) -> None:
        """Nothing takes weights here."""

    def takes_turns(self, members: Sequence[Member]) -> bool:
        return False

    def load(self, members: Sequence[Member], tensors: NamedTensors) -> None:
        """Nothing takes weights here."""

    def settle(self) -> None:
        """Nothing takes weights here."""

    def finish(self, members: Sequence[Member], version: int) -> None:
        """The same weights once more: the trainer wants more groups than were taken at them."""
        self._all_ready = version == self._version
        self._version = version

    @property
    def failed(self) -> set[str]:
        return set()

    def enlist(self, members: Sequence[Member], version: int) -> None:
        """There is nobody."""

    def checksums(self) -> dict[str, dict[str, str]]:
        return {}


def check_stored(cfg: RunConfig) -> None:
    """Raises UserError for what cannot be done from stored rollouts."""
    directory = cfg.rollout.replay_dir
    if cfg.rollout.placement != "replay":
        return
    if not directory:
        raise ConfigError(
            "rollout.placement=replay needs rollout.replay_dir: name a run's rollouts."
        )
    for key, wants in (
        ("data.evaluation", bool(cfg.data.evaluation)),
        ("sft.stop_metric", bool(cfg.sft.steps and cfg.sft.stop_metric)),
        ("grpo.evaluate_every", bool(cfg.grpo.evaluate_every)),
    ):
        if wants:
            raise ConfigError(
                f"rollout.placement=replay answers no evaluation, which {key} asks for: set "
                "data.evaluation={}, sft.stop_metric='' and grpo.evaluate_every=0, and evaluate "
                "the export with tools/evaluate.py."
            )
    if Path(directory).resolve() == (Path(cfg.run.out_dir) / "rollouts").resolve():
        raise ConfigError(
            f"rollout.replay_dir={directory} is where this run writes its own: choose another "
            "run.out_dir."
        )
    files_of(directory)


def _check_same(group: GroupRecord, prompt: Prompt, spec: SamplingSpec, directory: Path) -> None:
    pairs = {
        "rollout.group_size": (len(group.answers), spec.n),
        "rollout.temperature": (group.temperature, spec.temperature),
        "rollout.top_p": (group.top_p, spec.top_p),
        "rollout.max_response_tokens": (group.max_tokens, spec.max_tokens),
    }
    for key, (there, here) in pairs.items():
        if there != here:
            raise RolloutError(
                f"The answers to sample {prompt.id} in {directory} were made with {key}={there}, "
                f"not {here}: set {key}={there}."
            )
    if group.prompt_digest != prompt_digest(prompt):
        raise RolloutError(
            f"The answers to sample {prompt.id} in {directory} are to another prompt: its video, "
            "its question or a setting of `video` or `data` has changed since."
        )


def _key(line: bytes, path: Path) -> Key:
    try:
        head = msgspec.json.decode(line, type=_Head)
        return head.sample, head.answers[0].seed
    except (msgspec.DecodeError, IndexError) as error:
        raise DataError(f"{path} holds a line that is no group of rollouts: {error}.") from None
