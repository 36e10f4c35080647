"""Numbers of the study from the answers of its arms: means, intervals, paired differences."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.bootstrap import Values, interval
from studies.settings import GRPO_ARMS, SFT_ARMS

Answer = dict[str, Any]
SPLITS = {"heldout": "held-out", "ood": "out of domain"}


def component(name: str, task: str = "", least: float | None = None) -> Callable[..., list[float]]:
    """Return a function from answers to a reward component of each answer to a task's question.

    "": every task. `least`: 1 where the component is at least this value, else 0.
    """

    def values(answers: Sequence[Answer]) -> list[float]:
        found = [a["components"][name] for a in answers if task in ("", a["task"])]
        return found if least is None else [float(value >= least) for value in found]

    return values


METRICS: dict[str, Callable[..., list[float]]] = {  # one value for each question
    "mIoU": component("temporal_iou", "temporal_grounding"),
    "R@0.5": component("temporal_iou", "temporal_grounding", least=0.5),
    "MC acc.": component("accuracy", "multiple_choice"),
    "QA acc.": component("accuracy", "grounded_qa"),
    "QA mIoU": component("temporal_iou", "grounded_qa"),
    "format": component("format"),
}


def read_answers(out: Path, record: Mapping[str, Any], split: str) -> list[Answer]:
    """Return the answers of an arm's last evaluation of a split, in the order of the questions."""
    file = out / record["home"] / "evaluations" / f"{record['stage']}-{split}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


class Results:
    """Values per question of the finished arms of a study."""

    def __init__(self, out: Path, records: Sequence[Mapping[str, Any]]) -> None:
        self.records = {(r["condition"], r["arm"], r["seed"]): r for r in records}
        self._answers = {
            (*key, split): read_answers(out, record, split)
            for key, record in self.records.items()
            for split in SPLITS
        }

    def seeds(self, condition: str, *arms: str) -> list[int]:
        """Return the seeds in which all of the arms are finished."""
        found = [{s for c, a, s in self.records if (c, a) == (condition, arm)} for arm in arms]
        return sorted(set.intersection(*found)) if found else []

    def values(
        self, condition: str, arm: str, split: str, metric: str, seeds: Sequence[int]
    ) -> Values:
        """Return [seeds, questions]."""
        of_seed = [self._answers[condition, arm, seed, split] for seed in seeds]
        return np.array([METRICS[metric](answers) for answers in of_seed], dtype=np.float64)

    def summary(self, condition: str, arm: str, split: str, metric: str) -> dict[str, float]:
        """Return {"mean", "low", "high"} over the seeds in which the arm is finished."""
        values = self.values(condition, arm, split, metric, self.seeds(condition, arm))
        low, high = interval(values)
        return {"mean": float(values.mean()), "low": low, "high": high}

    def difference(
        self, condition: str, arms: tuple[str, str], split: str, metric: str
    ) -> dict[str, float]:
        """Return {"mean", "low", "high"} of the first arm minus the second, paired by question."""
        seeds = self.seeds(condition, *arms)
        first, second = (self.values(condition, arm, split, metric, seeds) for arm in arms)
        low, high = interval(first - second)
        return {"mean": float((first - second).mean()), "low": low, "high": high}

    def best_sft(self, condition: str) -> str | None:
        """Return the SFT arm with the highest held-out mIoU, None before one is finished.

        Held-out questions choose it, in favour of SFT. Arms with fewer finished seeds do not count.
        """
        done = {arm: len(self.seeds(condition, arm)) for arm in SFT_ARMS}
        most = max(done.values())
        if not most:
            return None
        candidates = [arm for arm in SFT_ARMS if done[arm] == most]

        def miou(arm: str) -> float:
            seeds = self.seeds(condition, arm)
            return float(self.values(condition, arm, "heldout", "mIoU", seeds).mean())

        return max(candidates, key=miou)

    def comparisons(self, condition: str) -> list[tuple[str, str]]:
        """Return pairs (GRPO arm, SFT arm): each with the best SFT, `sft_grpo` with its start."""
        best = self.best_sft(condition)
        pairs = [(arm, best) for arm in GRPO_ARMS if best] + [("sft_grpo", "sft")]
        return [p for p in dict.fromkeys(pairs) if self.seeds(condition, *p)]
