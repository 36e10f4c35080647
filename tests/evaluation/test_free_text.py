"""Answers in free text: times and options, and the protocol that reads them."""

import pytest

from megatron_vrl.evaluation.free_text import read_interval, read_option
from megatron_vrl.evaluation.protocols import BENCHMARKS, Item, Prediction, judged
from megatron_vrl.types import Interval, Sample, VideoClip

SAMPLE = Sample(
    id="a",
    task="grounded_qa",
    media=(VideoClip("a.mp4"),),
    duration_s=30.0,
    query="why",
    rationale="",
    intervals_s=((6.0, 16.0),),
    options=("red", "blue", "green"),
    option="B",
)


@pytest.mark.parametrize(
    ("response", "seconds"),
    [
        ("The event happens in 6.0 - 15.5 seconds.", (6.0, 15.5)),
        ("From 6 to 15 seconds, 3 people", (6.0, 15.0)),
        ("It starts at 6.5 and ends at 15.", (6.5, 15.0)),
        ("between 01:05 and 0:01:20.5", (65.0, 80.5)),
        ("<think>1 - 2</think>6 - 15", (6.0, 15.0)),
        ("3 - 4 <answer>[6, 15]</answer>", (6.0, 15.0)),
        ('{"start_time": "6.0", "end_time": "15.0"}', (6.0, 15.0)),
        ("15 - 6", (15.0, 6.0)),
        ("around 6", None),
        ("", None),
    ],
)
def test_times(response: str, seconds: Interval | None) -> None:
    assert read_interval(response)[0] == seconds


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B. a dog", "B"),
        ("The answer is (B).", "B"),
        ("(A) is wrong, so the best option is B", "B"),
        ("**Answer: B**", "B"),
        ("I see a dog (A), then (B)", "B"),
        ("<think>The answer is A.</think><answer>B</answer>", "B"),
        ("A man walks", ""),  # the article
        ("D", ""),  # there are three
        ("", ""),
    ],
)
def test_options(response: str, letter: str) -> None:
    assert read_option(response, 3)[0] == letter


def scored(response: str) -> Item:
    answer = Prediction(id="a", response=response)
    return judged(SAMPLE, answer, BENCHMARKS["nextgqa"], "free_text")


def test_the_protocol_reads_the_format_first_and_free_text_else() -> None:
    body = '{"option": "B", "start_time": "6.0", "end_time": "16.0"}'
    exact = scored(f"<think>(C) 1 - 2</think><answer>{body}</answer>")
    free = scored("The answer is B, from 6.0 to 16.0 seconds.")
    assert exact.values == free.values and exact.values["accuracy_gqa"] == 1.0
    half = scored("The answer is B.")
    assert (half.option, half.interval_s, half.failure) == ("B", None, "unparsable")
    assert half.reason == "no two times in the text"
    assert half.values["accuracy"] == 1.0 and half.values["miou"] == 0.0
    backwards = scored("B. 16.0 - 6.0")
    assert backwards.failure == "" and backwards.values["miou"] == 0.0
