"""Seconds of one step of SFT, of GRPO, and of GRPO with KL, which equal seconds are computed from.

Only their ratios matter: equal seconds become equal steps once, and later load of the machine
changes nothing. The phases are measured in turn, in rounds of short jobs; a ratio is the median
over rounds of the ratio inside a round, so that slow drift of the load cancels.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vrl.errors import ConfigError
from megatron_vrl.storage.files import write_file
from studies.arms import Study, cold_start, common, pool_of
from studies.jobs import median_step
from studies.settings import GRPO, KL, TUNING_SEED

ROUNDS = 3
STEPS = {"sft": 20, "grpo": 8}  # of a round
CONDITION = "jitter"  # whose pool is used
KINDS = ("sft", "grpo", "grpo_kl")


def given_seconds(text: str) -> dict[str, float]:
    """Return the seconds in `sft=0.2,grpo=1.1[,grpo_kl=1.3]`. Raises ConfigError."""
    try:
        pairs = dict(pair.split("=") for pair in text.split(","))
        seconds = {name: float(value) for name, value in pairs.items()}
    except ValueError:
        raise ConfigError(
            f"--seconds-per-step {text!r} is not of the form sft=0.2,grpo=1.1."
        ) from None
    seconds.setdefault("grpo_kl", seconds.get("grpo", 0.0))
    if set(seconds) != set(KINDS) or min(seconds.values()) <= 0:
        raise ConfigError(
            f"--seconds-per-step {text!r} must give positive seconds of sft and grpo, and may give "
            "those of grpo_kl."
        )
    return seconds


def combined(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the seconds of a step of each kind: SFT's median, times the median of the ratios."""
    base = statistics.median(each["sft"] for each in rounds)
    return {
        kind: base * statistics.median(each[kind] / each["sft"] for each in rounds)
        for kind in KINDS
    }


def seconds_per_step(study: Study, given: str) -> dict[str, float]:
    """Return the seconds of a step: given, measured earlier, or measured now.

    OUT/seconds.json keeps them, and all arms of a study use the same. Raises ConfigError if other
    ones are given later.
    """
    file = study.out / "seconds.json"
    if file.exists():
        held: dict[str, float] = json.loads(file.read_text())["seconds_per_step"]
        if given and given_seconds(given) != held:
            raise ConfigError(
                f"{file} has other seconds than --seconds-per-step {given}: leave the option out, "
                "or give another --out."
            )
        return held
    rounds = [] if given else [_round(study, number) for number in range(ROUNDS)]
    seconds = given_seconds(given) if given else combined(rounds)
    content = {"seconds_per_step": seconds, "rounds": rounds}
    write_file(file, json.dumps(content, indent=1) + "\n")
    return seconds


def _round(study: Study, number: int) -> dict[str, float]:
    """Measure each kind of step once, one after another, from the cold start."""
    start = cold_start(study, TUNING_SEED) / "export"
    settings: dict[str, Any] = {
        **common(study, TUNING_SEED, start, pool_of(study, CONDITION, TUNING_SEED)),
        **GRPO,
        "data.evaluation": {},
        "sft.stop_metric": "''",
        "sft.steps": STEPS["sft"],
        "grpo.steps": STEPS["grpo"],
        "grpo.evaluate_every": 0,
    }
    home = study.out / "jobs/timing" / f"round-{number + 1}"
    plain = study.launcher.train(home / "grpo", settings)
    with_kl = study.launcher.train(home / "grpo-kl", {**settings, **KL, "sft.steps": 0})
    return {
        "sft": median_step(plain, "sft"),
        "grpo": median_step(plain, "grpo"),
        "grpo_kl": median_step(with_kl, "grpo"),
    }
