"""What can be asked about a video. A new task is one file and one row here.

`SYSTEM_PROMPTS` are the choices of `data.system_prompt`. `seed` is the released text of Temporal-R1
(arXiv 2506.01908, `sys_prompt_map` of its evaluation; its training script has a line break where
this has a space, which YAML folds away on the command line). `think` says the same in our words.
Neither names the JSON keys. `answer` leaves the think block empty instead of leaving it out, so one
format rule serves both: imitate `task.target(replace(sample, rationale=""))` under it. Under `none`
the chat template of Qwen2.5-VL says "You are a helpful assistant.", as the released evaluation of
untrained models does.
"""

from megatron_vrl.tasks.grounded_qa import GROUNDED_QA
from megatron_vrl.tasks.multiple_choice import MULTIPLE_CHOICE
from megatron_vrl.tasks.task import Parsed, Task
from megatron_vrl.tasks.temporal_grounding import TEMPORAL_GROUNDING
from megatron_vrl.types import VideoSample

__all__ = ["SYSTEM_PROMPTS", "TASKS", "Parsed", "Task", "can_be_asked"]

TASKS: dict[str, Task] = {
    "temporal_grounding": TEMPORAL_GROUNDING,
    "multiple_choice": MULTIPLE_CHOICE,
    "grounded_qa": GROUNDED_QA,
}

SYSTEM_PROMPTS: dict[str, str | None] = {
    "none": None,  # the chat template's own
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
    "answer": (
        "Give the final answer at once, without reasoning: leave <think></think> empty and put "
        "the final answer inside <answer> </answer>. The final answer must be JSON."
    ),
}


def can_be_asked(sample: VideoSample) -> bool:
    """Whether there is a question, and a truth to score its answer by."""
    parts = TASKS[sample.task].parts
    return bool(
        sample.query
        and (sample.intervals_s or "temporal_iou" not in parts)
        and (sample.option or "accuracy" not in parts)
    )
