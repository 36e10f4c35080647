"""Tasks: the kinds of questions about a video. A new task is one file and one entry of `TASKS`.

`SYSTEM_PROMPTS` are the choices of `data.system_prompt`:

- `temporal_r1` is the released text of Temporal-R1 (arXiv 2506.01908, `sys_prompt_map` of its
  evaluation). Its training script has a line break in place of one space.
- `think` gives the same instruction in other words. Like `temporal_r1`, it does not name the JSON
  keys of the answer.
- `think_text` is `think` without its last sentence: any text is an answer. It fits `short_answer`.
- `answer` asks for an empty think block, so that all prompts have the same response format. The
  SFT target is then `task.target(replace(sample, rationale=""))`.
- `answer_only` asks for the answer block alone, without a think block. It needs
  `rewards.mode: answer_only`, where the exact format is that block. The SFT target is the same.
- `none` sets no system prompt. The chat template of Qwen2.5-VL then writes "You are a helpful
  assistant.", as in Temporal-R1's evaluation of untrained models.
"""

from megatron_vrl.tasks.grounded_qa import GROUNDED_QA
from megatron_vrl.tasks.multi_segment_grounding import MULTI_SEGMENT_GROUNDING
from megatron_vrl.tasks.multiple_choice import MULTIPLE_CHOICE
from megatron_vrl.tasks.short_answer import SHORT_ANSWER
from megatron_vrl.tasks.task import Component, Task, Truth
from megatron_vrl.tasks.temporal_grounding import TEMPORAL_GROUNDING
from megatron_vrl.types import Sample

__all__ = ["SYSTEM_PROMPTS", "TASKS", "Component", "Task", "Truth", "can_be_asked"]

TASKS: dict[str, Task] = {
    "temporal_grounding": TEMPORAL_GROUNDING,
    "multiple_choice": MULTIPLE_CHOICE,
    "grounded_qa": GROUNDED_QA,
    "multi_segment_grounding": MULTI_SEGMENT_GROUNDING,
    "short_answer": SHORT_ANSWER,
}

SYSTEM_PROMPTS: dict[str, str | None] = {
    "none": None,  # the chat template writes its default system prompt
    "temporal_r1": (
        "You FIRST think about the reasoning process as an internal monologue and then provide the "
        "final answer. The reasoning process MUST BE enclosed within <think> </think> tags. The "
        "final answer MUST BE put in <answer> </answer> tags. Output the final answer in JSON "
        "format."
    ),
    "think": (
        "First think the question through as an inner monologue, then give the final answer. "
        "Put the reasoning inside <think> </think> and the final answer inside "
        "<answer> </answer>. The final answer must be JSON."
    ),
    "think_text": (
        "First think the question through as an inner monologue, then give the final answer. "
        "Put the reasoning inside <think> </think> and the final answer inside "
        "<answer> </answer>."
    ),
    "answer": (
        "Give the final answer at once, without reasoning: leave <think></think> empty and put "
        "the final answer inside <answer> </answer>. The final answer must be JSON."
    ),
    "answer_only": (
        "Give the final answer at once, without reasoning and without any other text: put it "
        "inside <answer> </answer>. The final answer must be JSON."
    ),
}


def can_be_asked(sample: Sample) -> bool:
    """Return whether the sample has a question and a ground truth to score answers with."""
    return bool(sample.query) and TASKS[sample.task].truth.is_in(sample)
