"""Task short_answer: which forms of an answer are read, and which texts are equal."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.config import Rewards
from megatron_vrl.evaluation.metrics import summarise
from megatron_vrl.rewards.exact_match import equal
from megatron_vrl.rewards.score import score
from megatron_vrl.tasks import TASKS
from megatron_vrl.tasks.short_answer import ShortAnswer, answer
from megatron_vrl.types import Sample
from tests.tasks.test_rows import SAMPLE

TASK = TASKS["short_answer"]


def sample(truth: str) -> Sample:
    return replace(SAMPLE, task="short_answer", truth=ShortAnswer(answer=truth))


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("<think>a</think><answer>42</answer>", "42"),
        ('<think>a</think> <answer> {"answer": "two reds"} </answer>', "two reds"),
        ('<think></think><answer>{"answer": 1234567}</answer>', "1234567"),
        ('<think></think><answer>{"answer": 0.25}</answer>', "0.25"),
        ('<think></think><answer>"red"</answer>', "red"),
        ('<think></think><answer>{"color": "red"}</answer>', '{"color": "red"}'),
        ("<think>a</think> so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("<think>\\boxed{1}</think>\\boxed{2} \\boxed{3}", "3"),
        ("<think>a</think><answer>$\\boxed{7}$</answer>", "7"),
    ],
)
def test_the_forms_of_an_answer(response: str, value: str) -> None:
    parsed = TASK.parse(response, SAMPLE)
    assert (parsed.value, parsed.formatted, parsed.failure) == (value, True, "")


@pytest.mark.parametrize(
    "response", ["<answer>42</answer>", "\\boxed{42}", "So:<think></think><answer>42</answer>"]
)
def test_an_answer_in_another_form_is_read_and_not_formatted(response: str) -> None:
    parsed = TASK.parse(response, SAMPLE)
    assert (parsed.value, parsed.formatted) == ("42", False)


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        ("42", "no <answer> and no \\boxed{} after the thinking"),
        ("<think>\\boxed{42}", "the thinking is never closed"),
        ("<think>a</think>\\boxed{42}<answer>4", "the answer is never closed"),
        ("<think>a</think>\\boxed{\\frac{1}{2}", "the \\boxed{ is never closed"),
        ("<think>a</think><answer> </answer>", "the answer is empty"),
        ('<think>a</think><answer>{"answer": ""}</answer>', "the answer is empty"),
    ],
)
def test_what_cannot_be_read_says_why(response: str, failure: str) -> None:
    parsed = TASK.parse(response, SAMPLE)
    assert (parsed.value, parsed.formatted, parsed.failure) == (None, False, failure)
    assert [component(SAMPLE, parsed) for component in TASK.components.values()] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("0.5", "1/2", True),
        ("\\dfrac{1}{2}", ".50", True),
        ("-\\frac{1}{2}", "\N{MINUS SIGN}0.5", True),
        ("1,000", "1000", True),
        ("1,00", "100", False),
        ("1/3", "0.333", False),
        ("50%", "50", False),
        ("5\N{SUPERSCRIPT TWO}", "52", False),
        ("1/0", "2/0", False),
        ("$x + 1$", "\\(x+1\\)", True),
        ("\\left( 1, 2 \\right)", "(1,2)", True),
        ("\\text{Red}", " red. ", True),
        ("New  York", "new york", True),
        ("New York", "NewYork", False),
        ("e\u0301t\u00e9", "\u00e9te\u0301", True),
        ("9" * 50, "9" * 50 + ".0", False),
    ],
)
def test_which_answers_are_equal(left: str, right: str, same: bool) -> None:
    assert equal(left, right) == equal(right, left) == same


@given(st.fractions(max_denominator=10**9))
def test_a_fraction_equals_its_own_forms(number: object) -> None:
    above, _, below = str(number).partition("/")
    assert equal(f"\\frac{{{above}}}{{{below or 1}}}", str(number))


@given(st.text())
def test_no_text_stops_the_comparison(text: str) -> None:
    assert equal(text, text)
    TASK.parse(answer(text), SAMPLE)


def test_metrics_and_the_best_constant() -> None:
    samples = [sample("3"), sample("red"), sample("3.0")]
    summary = summarise(samples, TASK.baselines(samples)["best constant"], Rewards())
    assert summary["short_answer/accuracy"] == pytest.approx(2 / 3)
    right = summarise(samples, [TASK.target(one) for one in samples], Rewards())
    assert right["short_answer/accuracy"] == right["short_answer/reward/mean"] == 1.0


def test_an_answer_without_thinking() -> None:
    components, _ = score(sample("3"), "<answer>3</answer>", "answer_only", {})
    assert components == {"format": 1.0, "accuracy": 1.0}
