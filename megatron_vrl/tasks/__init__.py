"""What can be asked about a video. A new task is one file and one row here.

`SYSTEM_PROMPTS` are the choices of `data.system_prompt`. `think` gives the instruction of
Temporal-R1 in its order (think first, tags, JSON) in our own words; like the released one it does
not name the JSON keys. `answer` leaves the think block empty instead of leaving it out, so one
format rule serves both: imitate `task.target(replace(sample, rationale=""))` under it.
"""

from megatron_vrl.tasks.grounded_qa import GROUNDED_QA
from megatron_vrl.tasks.multiple_choice import MULTIPLE_CHOICE
from megatron_vrl.tasks.task import Parsed, Task
from megatron_vrl.tasks.temporal_grounding import TEMPORAL_GROUNDING

__all__ = ["SYSTEM_PROMPTS", "TASKS", "Parsed", "Task"]

TASKS: dict[str, Task] = {
    "temporal_grounding": TEMPORAL_GROUNDING,
    "multiple_choice": MULTIPLE_CHOICE,
    "grounded_qa": GROUNDED_QA,
}

SYSTEM_PROMPTS: dict[str, str | None] = {
    "none": None,  # the chat template's own
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
