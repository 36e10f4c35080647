"""Short answer: the model answers with a text, a number or a formula.

The question is shown as it is written. The SFT target is
`<think>...</think><answer>TEXT</answer>`. Three forms of an answer are read, and are in the exact
format after one think block:

  <answer>TEXT</answer>                as R1-V and EasyR1 ask for
  <answer>{"answer": "TEXT"}</answer>  JSON, as most choices of `data.system_prompt` ask for; a JSON
                                       string is read, too
  ... \\boxed{TEXT} ...                 no answer block, as verl's prompts for mathematics ask for

The last answer block after the thinking counts, else the last box. A box inside an answer block is
opened.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

from megatron_vrl.rewards import exact_match, format
from megatron_vrl.tasks.answer import BOX, free_template, read_block, read_boxed, read_json
from megatron_vrl.tasks.metrics import mean
from megatron_vrl.tasks.task import Task, Truth
from megatron_vrl.types import Parsed, Sample

TEMPLATE = free_template()


class ShortAnswer(BaseModel):
    """Truth of a sample: `sample.truth.answer`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    answer: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


def question(sample: Sample) -> str:
    return sample.query


def target(sample: Sample) -> str:
    return answer(sample.truth.answer, sample.rationale)


def answer(text: str, rationale: str = "") -> str:
    """Return the response with this answer."""
    return f"<think>{rationale}</think><answer>{text}</answer>"


def parse(response: str, sample: Sample) -> Parsed:
    text, failure = read_answer(response)
    if failure:
        return Parsed(failure=failure)
    return Parsed(value=text, formatted=TEMPLATE.fullmatch(response.strip()) is not None)


def read_answer(response: str) -> tuple[str, str]:
    """Return (text of the answer, failure); failure is "" or one sentence."""
    body, failure = read_block(response)
    if not failure:
        text = _json_answer(body)
        if BOX in text:
            text, failure = read_boxed(text)
    elif "<answer>" in (tail := response.rpartition("</think>")[2]) or "<think>" in tail:
        return "", failure
    else:
        text, failure = read_boxed(tail)
    text = text.strip()
    return text, failure or ("" if text else "the answer is empty")


def metrics(samples: Sequence[Sample], parsed: Sequence[Parsed]) -> dict[str, float]:
    pairs = zip(samples, parsed, strict=True)
    return {"accuracy": mean([exact_match.score(*pair) for pair in pairs])}


def baselines(samples: Sequence[Sample]) -> dict[str, list[str]]:
    """Return the most frequent answer; "whole video" repeats it, as for multiple choice."""
    texts = [exact_match.normalised(sample.truth.answer) for sample in samples]
    most_frequent, _ = Counter(texts).most_common(1)[0]
    truth = samples[texts.index(most_frequent)].truth.answer
    answers = [answer(truth)] * len(samples)
    return {"whole video": answers, "best constant": answers}


def _json_answer(body: str) -> str:
    """Return the text in {"answer": TEXT} or in a JSON string; `body` itself if it is neither."""
    value, failure = read_json(body)
    if isinstance(value, dict) and list(value) == ["answer"]:
        value = value["answer"]
        if isinstance(value, float):
            return str(int(value)) if value.is_integer() else repr(value)
    return value if isinstance(value, str) and not failure else body


SHORT_ANSWER = Task(
    name="short_answer",
    truth=Truth(record=ShortAnswer),
    question=question,
    target=target,
    parse=parse,
    components={"format": format.score, "accuracy": exact_match.score},
    default_weights={"format": 0.5, "accuracy": 0.5},
    correctness={"accuracy": "binary"},
    metrics=metrics,
    titles={"accuracy": ("short answers right", "%")},
    baselines=baselines,
)
