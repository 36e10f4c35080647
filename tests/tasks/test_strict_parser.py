"""The strict parser: what it reads, what it refuses, and that targets read back."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.tasks import SYSTEM_PROMPTS, TASKS
from megatron_vrl.tasks.short_answer import ShortAnswer
from megatron_vrl.types import Sample, VideoClip

SAMPLE = Sample(
    id="v/0",
    task="grounded_qa",
    media=(VideoClip("v.mp4"),),
    duration_s=30.0,
    query="what colour is the square?",
    rationale="blue",
    intervals_s=((6.0, 15.0),),
    options=("red", "blue", "a cat", "Red light"),
    option="B",
    truth=ShortAnswer(answer="blue"),
)
GROUNDING, CHOICE, GQA = (
    TASKS[name] for name in ("temporal_grounding", "multiple_choice", "grounded_qa")
)
RIGHT = '<think>x</think><answer>{"start_time": "6.0", "end_time": "15.0"}</answer>'


def grounded(body: str) -> str:
    return f"<think>x</think><answer>{body}</answer>"


def times(start: str, end: str) -> str:
    return grounded(f'{{"start_time": {start}, "end_time": {end}}}')


def test_exact_texts() -> None:
    assert GROUNDING.question(SAMPLE) == (
        'Give the query: "what colour is the square?", '
        "when does the described content occur in the video?."
    )
    assert CHOICE.question(SAMPLE) == (
        "Question: what colour is the square?\nOptions:\n(A) red\n(B) blue\n(C) a cat\n"
        "(D) Red light\nAnswer with the letter of the best option."
    )
    assert GQA.question(SAMPLE).splitlines()[-1] == (
        "Answer with the letter of the best option and the time span that shows it."
    )
    assert GROUNDING.target(SAMPLE) == (
        '<think>blue</think><answer>{"start_time": "6.0", "end_time": "15.0"}</answer>'
    )
    assert CHOICE.target(SAMPLE) == '<think>blue</think><answer>{"option": "B"}</answer>'
    assert GQA.target(SAMPLE) == (
        '<think>blue</think><answer>{"option": "B", "start_time": "6.0", "end_time": "15.0"}'
        "</answer>"
    )


def test_the_thinking_prompt_keeps_the_released_order() -> None:
    prompt = SYSTEM_PROMPTS["think"]
    assert prompt is not None
    marks = ["monologue", "<think> </think>", "<answer> </answer>", "JSON"]
    assert sorted(marks, key=prompt.index) == marks


@pytest.mark.parametrize(
    ("response", "interval_s", "formatted"),
    [
        (RIGHT, (6.0, 15.0), True),
        (f"\n {RIGHT}\n", (6.0, 15.0), True),  # white space around is free
        (RIGHT.replace("</think>", "</think>\n"), (6.0, 15.0), True),
        (RIGHT.replace("<think>x</think>", "<think></think>"), (6.0, 15.0), True),
        (times('"6"', '"15"'), (6.0, 15.0), True),
        (times("6.0", "15"), (6.0, 15.0), False),  # bare numbers read, but are not the form
        (grounded('{"end_time": "15.0", "start_time": "6.0"}'), (6.0, 15.0), False),
        (grounded('{"start_time": "6.0", "end_time": "15.0", "x": 1}'), (6.0, 15.0), False),
        (RIGHT.removeprefix("<think>x</think>"), (6.0, 15.0), False),
        (RIGHT + " so it is", (6.0, 15.0), False),
        (times('"0"', '"9999"'), (0.0, 30.0), True),  # clipped to the video
        (times('"-6"', '"15.0"'), (0.0, 15.0), False),
        (times('"1.0"', '"2.0"') + RIGHT.removeprefix("<think>x</think>"), (6.0, 15.0), False),
    ],
)
def test_readable_intervals(
    response: str, interval_s: tuple[float, float], formatted: bool
) -> None:
    parsed = GROUNDING.parse(response, SAMPLE)
    assert (parsed.interval_s, parsed.formatted, parsed.failure) == (interval_s, formatted, "")


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        ("", "no <answer> after the thinking"),
        ("from 6 to 15", "no <answer> after the thinking"),
        ("<think>so it is", "the thinking is never closed"),
        ("<think>" + RIGHT.removeprefix("<think>x</think>"), "the thinking is never closed"),
        (RIGHT[:-4], "the answer is never closed"),
        ("<think>" + RIGHT[16:] + "</think>", "no <answer> after the thinking"),  # hidden
        (times('"15.0"', '"6.0"'), "no part of the video lies between 15 s and 6 s"),
        (times('"6.0"', '"6.0"'), "no part of the video lies between 6 s and 6 s"),
        (times('"40"', '"50"'), "no part of the video lies between 30 s and 30 s"),
        (times('"6.0s"', '"15.0"'), "start_time '6.0s' is not a number of seconds"),
        (times('"00:06"', '"00:15"'), "start_time '00:06' is not a number of seconds"),
        (times('"1.2.3"', '"..."'), "start_time '1.2.3' is not a number of seconds"),
        (times('"6.0"', '"inf"'), "end_time 'inf' is not a number of seconds"),
        (times('"6.0"', '"nan"'), "end_time 'nan' is not a number of seconds"),
        (times('"6.0"', '"1e1"'), "end_time '1e1' is not a number of seconds"),
        (times("6.0", "1e1"), "end_time '1e1' is not a number of seconds"),
        (times("6.0", "1.5E1"), "end_time '1.5E1' is not a number of seconds"),
        (times("6.0", "1e400"), "end_time '1e400' is not a number of seconds"),
        (times('"6.0"', '"1e400"'), "end_time '1e400' is not a number of seconds"),
        (times('"6.0"', '"+15"'), "end_time '+15' is not a number of seconds"),
        (times('".5"', '"6.0"'), "start_time '.5' is not a number of seconds"),
        (times('"6.0"', '"15."'), "end_time '15.' is not a number of seconds"),
        (times('"6.0"', '"1_5"'), "end_time '1_5' is not a number of seconds"),
        (times('"6.0"', '"１５"'), "end_time '１５' is not a number of seconds"),  # noqa: RUF001
        (times('"6.0"', '" 15"'), "end_time ' 15' is not a number of seconds"),
        (times('"6.0"', '"15\\n"'), "end_time '15\\n' is not a number of seconds"),
        (times("6.0", "+15"), "the answer is not JSON"),
        (times(".5", "6.0"), "the answer is not JSON"),
        (times("6.0", "15."), "the answer is not JSON"),
        (times("6.0", "1_5"), "the answer is not JSON"),
        (times("6.0", "１５"), "the answer is not JSON"),  # noqa: RUF001
        (times("6.0", "-Infinity"), "the answer is not JSON"),
        (times("true", '"6.0"'), "start_time True is not a number of seconds"),
        (times("null", '"6.0"'), "start_time None is not a number of seconds"),
        (times("6.0", "1" + "0" * 5000), "end_time inf is not a number of seconds"),
        (times("NaN", "6.0"), "the answer is not JSON"),
        (times("6.0", "Infinity"), "the answer is not JSON"),
        (grounded("```json\n{}\n```"), "the answer is not JSON"),
        (grounded("[" * 100_000), "the answer is not JSON"),
        (grounded('{"start_time": 1, "start_time": 6, "end_time": 15}'), "the answer is not JSON"),
        (grounded("[6.0, 15.0]"), "the answer is not a JSON object"),
        (grounded('{"start_time": "6.0"}'), "end_time None is not a number of seconds"),
    ],
)
def test_unreadable_intervals(response: str, failure: str) -> None:
    parsed = GROUNDING.parse(response, SAMPLE)
    assert (parsed.interval_s, parsed.formatted, parsed.failure) == (None, False, failure)


@pytest.mark.parametrize(
    ("body", "option"),
    [
        ('{"option": "B"}', "B"),
        ('{"option": "(B)"}', "B"),
        ('{"option": "B."}', "B"),
        ('{"option": "b"}', "B"),
        ('{"option": "blue"}', "B"),
        ('{"option": "Blue."}', "B"),
        ('{"option": "(B) blue"}', "B"),
        ('{"option": "B. blue"}', "B"),
        ('{"option": "red light"}', "D"),
        ('{"option": "a cat"}', "C"),  # not the letter A
        ('"(B)"', "B"),
        ("B", "B"),
        ("(b)", "B"),
        ("blue", "B"),
        ('{"option": "B. red"}', ""),  # letter and text disagree
        ('{"option": "A, B"}', ""),
        ('{"option": "A or B"}', ""),
        ('{"option": "AB"}', ""),
        ('{"option": "E"}', ""),  # there are four
        ('{"option": ["B"]}', ""),
        ('{"option": 1}', ""),
        ('{"choice": "B"}', ""),
        ("[1, 2]", ""),
        ("", ""),
    ],
)
def test_options(body: str, option: str) -> None:
    parsed = CHOICE.parse(grounded(body), SAMPLE)
    assert parsed.option == option
    assert (parsed.failure == "") == (option != "")
    assert parsed.formatted == (body == '{"option": "B"}')


def test_equal_option_texts_are_ambiguous_and_a_single_letter_is_a_letter() -> None:
    twice = replace(SAMPLE, options=("B", "A", "x", "x"))
    assert CHOICE.parse(grounded('{"option": "x"}'), twice).option == ""
    assert CHOICE.parse(grounded('{"option": "B"}'), twice).option == "B"


@pytest.mark.parametrize("options", [("A", "B", "C", "D"), ("(a)", "(b)", "(c)", "(d)"), ("",) * 4])
@pytest.mark.parametrize(
    ("body", "option"),
    [
        ("D. small dog", "D"),
        ('{"option": "(D) small dog"}', "D"),
        ("D", "D"),
        ("D small dog", ""),  # the letter is not marked: "A dog" names nothing
        ("E. small dog", ""),  # there are four
    ],
)
def test_options_without_texts_are_read_by_their_letter(
    options: tuple[str, ...], body: str, option: str
) -> None:
    assert CHOICE.parse(grounded(body), replace(SAMPLE, options=options)).option == option


def test_an_option_that_is_another_letter_has_a_text() -> None:
    swapped = replace(SAMPLE, options=("B", "A", "C", "D"))
    assert CHOICE.parse(grounded("A. small dog"), swapped).option == ""
    assert CHOICE.parse(grounded("C. small dog"), swapped).option == "C"


def test_interval_and_option_are_read_independently() -> None:
    no_times = GQA.parse(grounded('{"option": "B"}'), SAMPLE)
    assert (no_times.option, no_times.interval_s) == ("B", None)
    assert no_times.failure == "start_time None is not a number of seconds"
    no_option = GQA.parse(times('"6.0"', '"15.0"'), SAMPLE)
    assert (no_option.option, no_option.interval_s) == ("", (6.0, 15.0))
    assert no_option.failure == "option None is not a letter"
    assert not no_times.formatted and not no_option.formatted


@pytest.mark.parametrize("name", TASKS)
@given(text=st.text(max_size=60), cut=st.integers(0, 200))
def test_parsing_never_raises_and_names_the_failure(name: str, text: str, cut: int) -> None:
    task = TASKS[name]
    target = task.target(SAMPLE)
    for response in (text, target[:cut] + text, f"<answer>{text}</answer>"):
        parsed = task.parse(response, SAMPLE)
        if parsed.formatted:
            assert parsed.failure == ""
        if parsed.interval_s is not None:
            assert 0 <= parsed.interval_s[0] < parsed.interval_s[1] <= SAMPLE.duration_s


@given(start=st.integers(0, 298), length=st.integers(1, 300))
def test_any_decimal_is_read(start: int, length: int) -> None:
    end = min(start + length, 300)
    body = json.dumps({"start_time": f"{start / 10}", "end_time": f"{end / 10}"})
    parsed = GROUNDING.parse(grounded(body), SAMPLE)
    assert parsed.formatted and parsed.interval_s == (start / 10, end / 10)
