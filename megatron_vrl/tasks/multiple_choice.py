"""Multiple choice: the model names the letter of the correct option.

The SFT target is a JSON object. If the answer block holds no JSON object, its text is read as the
option, so that models without format training can be evaluated. Such an answer gets no format
reward.
`temporal_r1_question` is the wording of Temporal-R1's evaluation on MVBench.
"""

from collections.abc import Sequence

from megatron_vrl.rewards import accuracy, format
from megatron_vrl.tasks.answer import (
    LETTER,
    lettered,
    read_block,
    read_json,
    read_option,
    template,
)
from megatron_vrl.tasks.baselines import option_baselines
from megatron_vrl.tasks.metrics import option_metrics
from megatron_vrl.tasks.task import Task, Truth
from megatron_vrl.types import Parsed, Sample

INSTRUCTION = "Answer with the letter of the best option."
TEMPLATE = template(option=LETTER)


def question(sample: Sample) -> str:
    return question_with_options(sample, INSTRUCTION)


def question_with_options(sample: Sample, instruction: str) -> str:
    """Return the question, its options with one option per line, and `instruction` below them."""
    options = "\n".join(f"({letter}) {option}" for letter, option in lettered(sample.options))
    return f"Question: {sample.query}\nOptions:\n{options}\n{instruction}"


def temporal_r1_question(sample: Sample) -> str:
    options = "".join(f"({letter}) {option}\n" for letter, option in lettered(sample.options))
    return f"Question:{sample.query}\nOption:\n{options}Only give the best option.\n"


def target(sample: Sample) -> str:
    answer = f'{{"option": "{sample.option}"}}'
    return f"<think>{sample.rationale}</think><answer>{answer}</answer>"


def parse(response: str, sample: Sample) -> Parsed:
    body, failure = read_block(response)
    if failure:
        return Parsed(failure=failure)
    value, json_failure = read_json(body)
    text = body if json_failure else value.get("option") if isinstance(value, dict) else value
    option, failure = read_option(text, sample.options)
    formatted = not failure and TEMPLATE.fullmatch(response.strip()) is not None
    return Parsed(option=option, formatted=formatted, failure=failure)


def baselines(samples: Sequence[Sample]) -> dict[str, list[str]]:
    return option_baselines(samples, target)


MULTIPLE_CHOICE = Task(
    name="multiple_choice",
    truth=Truth(option=True),
    question=question,
    target=target,
    parse=parse,
    components={"format": format.score, "accuracy": accuracy.score},
    default_weights={"format": 0.5, "accuracy": 0.5},
    correctness={"accuracy": "binary"},
    metrics=option_metrics,
    titles={"accuracy": ("MC accuracy", "%")},
    baselines=baselines,
    temporal_r1_question=temporal_r1_question,
)
