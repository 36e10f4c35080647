"""Annotated times against the unit of their format, on synthetic files of a known unit."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from megatron_vrl.config import Source
from megatron_vrl.data.units import FileTimes, interval_problems

RNG = np.random.default_rng(3)
DURATIONS = RNG.uniform(20, 60, 50)
FRACTIONS = np.sort(RNG.uniform(0, 1, (50, 2)), axis=1)
SECONDS = FRACTIONS * DURATIONS[:, None]
WRITTEN = {
    "seconds": SECONDS,
    "fractions of the video (0 to 1)": FRACTIONS,
    "milliseconds": np.round(SECONDS * 1000),
    "percentages": FRACTIONS * 100,
    "frame numbers": np.round(SECONDS * 30),
}


def unit_problem(
    written: list[tuple[float, float]] | npt.NDArray[np.float64],
    durations: list[float] | npt.NDArray[np.float64],
    unit: Literal["seconds", "fraction"],
) -> str:
    form: Any = {"seconds": "charades_sta", "fraction": "temporal_r1"}[unit]
    times = FileTimes(Source(json_path="a.json", data_folder="/d", format=form), unit)
    for number, ((start, end), duration_s) in enumerate(zip(written, durations, strict=True)):
        scale = duration_s if unit == "fraction" else 1.0
        times.add(f"v/{number}", start * scale, end * scale, duration_s)
    return times.problem()


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("unit", ["seconds", "fraction"])
def test_a_file_in_another_unit_is_reported(
    name: str, unit: Literal["seconds", "fraction"]
) -> None:
    sentence = unit_problem(WRITTEN[name], DURATIONS, unit)
    if name.startswith(unit):
        assert sentence == ""
    else:
        assert sentence.endswith(f"these look like {name}.")
        assert sentence.startswith("a.json: ")


@pytest.mark.parametrize(
    ("written", "durations", "unit", "ending"),
    [
        ([(0.5, 8.0)], [16.0], "fraction", "(first 'v/0'): the times of temporal_r1 are fractions "
         "of the video (0 to 1), these look like seconds."),
        ([(2.0, 60.0)], [16.0], "seconds", "these look like percentages or frame numbers."),
        ([(0.2, 0.5)], [16.0], "seconds", "these look like fractions of the video (0 to 1)."),
        ([(2000.0, 60000.0)], [61.0], "seconds", "these look like milliseconds."),
    ],
)  # fmt: skip
def test_one_interval_is_enough(
    written: list[tuple[float, float]],
    durations: list[float],
    unit: Literal["seconds", "fraction"],
    ending: str,
) -> None:
    assert unit_problem(written, durations, unit).endswith(ending)


@pytest.mark.parametrize(
    ("written", "durations"),
    [
        ([(0, 1)], [4.0]),  # the first second
        ([(0.1, 0.9)], [1.5]),  # a short clip
        ([(20.0, 34.0)], [33.2]),  # as in Charades-STA, a little past the end
        ([(1, 2)] * 8 + [(1, 90)], [10.0] * 9),  # one mistake is not the file's unit
        ([], []),
    ],
)
def test_plausible_seconds_are_not_reported(
    written: list[tuple[float, float]], durations: list[float]
) -> None:
    assert unit_problem(written, durations, "seconds") == ""


def test_problems_of_one_interval() -> None:
    kinds = {
        (1.0, 2.0): [],
        (0.0, 9.0): [],
        (2.0, 2.0): ["zero_length"],
        (3.0, 2.0): ["reversed"],
        (-1.0, 2.0): ["before_start"],
        (1.0, 9.5): ["interval"],
        (12.0, 11.0): ["reversed", "interval"],
    }
    for (start_s, end_s), expected in kinds.items():
        assert [kind for kind, _ in interval_problems(start_s, end_s, 9.0)] == expected
