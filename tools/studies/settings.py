"""Settings of the comparison of SFT and GRPO: all that was fixed before seeds 2 and 3 ran.

| setting | value | chosen on |
|-|-|-|
| cold start | the quickstart's warm-up on clean labels, dev mIoU 0.40 | before the study |
| jitter | 0.75 of an interval's length | seed 1, after looking at three kinds of noise |
| short SFT | 170 steps, rate 5e-4, cosine | seed 1 |
| GRPO | 90 steps, rate 4e-4, cosine, entropy 1e-2, 32 prompts x 8 | seed 1, of three settings |
| GRPO with the annotation | weight 8, rate 6e-4, entropy 1e-3 | the quickstart, exact labels |
| SFT for equal seconds | best of three rates | dev of `TUNING_SEED`, by the study itself |
| coefficient of KL | 0.04 (GRPO's in DeepSeekMath, arXiv 2402.03300) | not tuned |
| wrong labels | 40 % | not tuned |

A budget in seconds is that of the arm `sft_grpo`: short SFT, then GRPO. The arm `sft_updates` has
the rate of the short SFT. The seconds of a selection count for no arm: all arms of the condition
train on the same selected pool.
"""

from dataclasses import dataclass

TUNING_SEED = 1
SFT_RATES = (1e-4, 5e-4, 1.5e-3)
SHORT_SFT_RATE = 5e-4
STEPS = {"sft": 170, "grpo": 90}  # of the arm `sft_grpo`
DEV_METRIC = "temporal_grounding/miou"
DEV_EVALUATIONS = 10  # of an SFT phase that is stopped by dev

SFT = {
    "sft.optimizer.decay": "cosine",
    "sft.stop_metric": DEV_METRIC,
    "sft.stop_at": "null",
    "sft.restarts": 0,
}
GRPO = {
    "grpo.optimizer.lr": 4e-4,
    "grpo.optimizer.decay": "cosine",
    "grpo.evaluate_every": 30,
    "algorithm.entropy": 1e-2,
    "algorithm.kl": 0.0,
    "algorithm.ground_truth_answer": "none",
    "rollout.prompts_per_step": 32,
    "rollout.group_size": 8,
}
KL = {"algorithm.kl": 0.04}
ANNOTATION = {
    "algorithm.ground_truth_answer": "in_group",
    "algorithm.ground_truth_weight": 8.0,
    "algorithm.entropy": 1e-3,
    "grpo.optimizer.lr": 6e-4,
}
SELECTION = {"selection.min_std": 0.05, "selection.min_mean": 0.1}
ALL_JOBS = {
    "observe.wandb": "disabled",
    "observe.samples_per_step": 0,
    "rollout.save": "false",
    "checkpoint.keep": 3,  # the last SFT step, the start of GRPO, the end
}


ARMS = {  # name -> title; an arm of a condition starts from the cold start unless it says more
    "cold": "cold start",
    "sft": "short SFT, stopped by dev",
    "more_sft": "SFT, equal seconds",
    "more_sft_best": "SFT, equal seconds, stopped by dev",
    "grpo": "GRPO, equal seconds",
    "sft_grpo": "short SFT, then GRPO",
    "grpo_annotation": "GRPO with the annotation in the group, equal seconds",
    "sft_updates": "SFT, as many updates as GRPO",
    "grpo_kl": "GRPO with KL to the start, as many updates as GRPO",
    "grpo_kl_seconds": "GRPO with KL to the start, equal seconds",
}
SFT_ARMS = ("sft", "more_sft", "more_sft_best", "sft_updates")
GRPO_ARMS = ("grpo", "sft_grpo", "grpo_annotation", "grpo_kl", "grpo_kl_seconds")
COMPARED = ("cold", "sft", "more_sft", "more_sft_best", "grpo", "sft_grpo", "grpo_annotation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Pool that the arms train on."""

    title: str
    samples: float = 1.0  # a fraction of the quickstart's pool
    count: int = 0  # of samples, in place of a fraction
    jitter: float = 0.0  # of make_synthetic.misaligned
    wrong: float = 0.0  # fraction of samples with a wrong label
    is_selected: bool = False  # keep what passes `SELECTION` by answers of the cold start
    is_grounding_only: bool = False
    arms: tuple[str, ...] = COMPARED


LARGEST_POOL = 3.0  # of `Condition.samples`
JITTER = 0.75
WRONG = 0.4
CONDITIONS = {
    "exact": Condition(title="exact labels"),
    "jitter": Condition(title="labels misaligned in time", jitter=JITTER),
    "small64": Condition(title="64 samples, exact labels", count=64),
    "small256": Condition(title="256 samples, exact labels", count=256),
    "large": Condition(
        title="pool three times as large, labels misaligned in time",
        samples=LARGEST_POOL,
        jitter=JITTER,
    ),
    "wrong": Condition(title=f"{WRONG:.0%} wrong labels", wrong=WRONG),
    "wrong_selected": Condition(
        title=f"{WRONG:.0%} wrong labels, pool selected by the variance of rewards",
        wrong=WRONG,
        is_selected=True,
    ),
    "retention": Condition(
        title="retention: grounding alone, labels misaligned in time",
        jitter=JITTER,
        is_grounding_only=True,
        arms=(
            "cold",
            "sft_updates",
            "more_sft",
            "more_sft_best",
            "grpo",
            "grpo_kl",
            "grpo_kl_seconds",
        ),
    ),
}
