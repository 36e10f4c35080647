"""Algorithm presets: values that a paper sets for keys of section `algorithm`.

A preset applies to keys that a config leaves out. All other keys, and GRPO, use the defaults of
config/run.py. docs/algorithms.md shows the table; each file in algorithms/ names its source.
Presets leave out keys that depend on the user's answer lengths.
"""

from typing import Any, Literal

AlgorithmName = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
]

ALGORITHM_PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"kl": 0.0, "entropy": 0.0, "normalisation": "constant_length"},
    "dapo": {
        "clip_high": 0.28,
        "kl": 0.0,
        "entropy": 0.0,
        "dynamic_sampling_rounds": 9,
        "mask_truncated": True,
    },
    "gspo": {
        "clip": 3e-4,
        "clip_high": 4e-4,
        "kl": 0.0,
        "entropy": 0.0,
        "normalisation": "sequence_mean",
    },
    "cispo": {"clip": 1.0, "clip_high": 4.0, "kl": 0.0, "entropy": 0.0},
    "rloo": {
        "kl": 0.03,
        "kl_estimator": "k1",
        "kl_in": "reward",
        "entropy": 0.0,
        "normalisation": "sequence_sum",
    },
    "reinforce_plus_plus": {"kl_estimator": "k1", "kl_in": "reward", "entropy": 0.0},
    "reinforce_plus_plus_baseline": {"kl": 1e-3, "kl_estimator": "k2", "entropy": 0.0},
}
