"""Multiple choice: which option is right?

The target answers in JSON. An answer block that holds no JSON object is read as the bare option,
so that models which were never taught the form can be evaluated; it does not count as formatted.
The released question is that of Temporal-R1's evaluation on MVBench.
"""

from megatron_vrl.tasks.answer import (
    LETTER,
    lettered,
    read_block,
    read_json,
    read_option,
    template,
)
from megatron_vrl.tasks.task import Parsed, Task
from megatron_vrl.types import VideoSample

INSTRUCTION = "Answer with the letter of the best option."
TEMPLATE = template(option=LETTER)


def question(sample: VideoSample) -> str:
    return ask(sample, INSTRUCTION)


def ask(sample: VideoSample, instruction: str) -> str:
    options = "\n".join(f"({letter}) {option}" for letter, option in lettered(sample.options))
    return f"Question: {sample.query}\nOptions:\n{options}\n{instruction}"


def temporal_r1_question(sample: VideoSample) -> str:
    options = "".join(f"({letter}) {option}\n" for letter, option in lettered(sample.options))
    return f"Question:{sample.query}\nOption:\n{options}Only give the best option.\n"


def target(sample: VideoSample) -> str:
    answer = f'{{"option": "{sample.option}"}}'
    return f"<think>{sample.rationale}</think><answer>{answer}</answer>"


def parse(response: str, sample: VideoSample) -> Parsed:
    body, failure = read_block(response)
    if failure:
        return Parsed(failure=failure)
    value, not_json = read_json(body)
    text = body if not_json else value.get("option") if isinstance(value, dict) else value
    option, failure = read_option(text, sample.options)
    formatted = not failure and TEMPLATE.fullmatch(response.strip()) is not None
    return Parsed(option=option, formatted=formatted, failure=failure)


MULTIPLE_CHOICE = Task(
    name="multiple_choice",
    parts=("format", "accuracy"),
    question=question,
    temporal_r1_question=temporal_r1_question,
    target=target,
    parse=parse,
)
