"""study.json and table.md of the arms that are finished; other cells say "not run"."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vrl.storage.files import write_file
from studies.results import METRICS, SPLITS, Results
from studies.settings import ARMS, CONDITIONS

WITH_INTERVAL = ("mIoU",)
COMPARED = ("mIoU", "R@0.5", "MC acc.", "QA acc.")
SHOWN = [metric for metric in METRICS if metric != "QA mIoU"]  # study.json has it
COLUMNS = [(split, metric) for split in SPLITS for metric in SHOWN]


def read_records(out: Path) -> list[dict[str, Any]]:
    """Return the records of all finished arms of a study, whatever call ran them."""
    return [json.loads(file.read_text()) for file in sorted((out / "records").glob("*/*/*.json"))]


def write_results(out: Path, seeds: Sequence[int]) -> str:
    """Write OUT/study.json and OUT/table.md, and return the table."""
    results = Results(out, read_records(out))
    text = "\n".join(table(results, seeds)) + "\n"
    timing = out / "seconds.json"
    study = {
        "timing": json.loads(timing.read_text()) if timing.exists() else {},
        "arms": [
            {**record, "metrics": of_record(results, *key)}
            for key, record in results.records.items()
        ],
        "summary": summaries(results),
    }
    write_file(out / "study.json", json.dumps(study, indent=1) + "\n")
    write_file(out / "table.md", text)
    return text


def of_record(results: Results, condition: str, arm: str, seed: int) -> dict[str, Any]:
    """Return split -> metric -> mean over the questions of one seed."""
    return {
        split: {
            metric: float(results.values(condition, arm, split, metric, [seed]).mean())
            for metric in METRICS
        }
        for split in SPLITS
    }


def summaries(results: Results) -> dict[str, Any]:
    """Return condition -> {"arms", "differences"} with means and 95 % intervals."""
    found = {}
    for condition in dict.fromkeys(condition for condition, _, _ in results.records):
        arms = [arm for arm in CONDITIONS[condition].arms if results.seeds(condition, arm)]
        found[condition] = {
            "best_sft": results.best_sft(condition),
            "arms": {
                arm: {
                    split: {m: results.summary(condition, arm, split, m) for m in METRICS}
                    for split in SPLITS
                }
                for arm in arms
            },
            "differences": {
                f"{first} - {second}": {
                    split: {
                        m: results.difference(condition, (first, second), split, m)
                        for m in COMPARED
                    }
                    for split in SPLITS
                }
                for first, second in results.comparisons(condition)
            },
        }
    return found


def table(results: Results, seeds: Sequence[int]) -> list[str]:
    """Return Markdown: for each condition its arms, then the differences of GRPO and SFT."""
    lines = [
        "Percent: mean over seeds, greedy answers; in brackets the 95 % bootstrap interval over "
        "seeds and questions. Seconds: measured work, median over seeds; a busy machine takes "
        "longer. Equal seconds are equal by the seconds of a step, measured in turn. Differences "
        "are those to the SFT arm with the highest held-out mIoU, and to a GRPO arm's own start."
    ]
    for condition in CONDITIONS:
        lines += ["", f"### {CONDITIONS[condition].title}{_pool(results, condition)}", ""]
        if not any(results.seeds(condition, arm) for arm in ARMS):
            lines.append("*not run*")
            continue
        heads = ["arm", *(f"{SPLITS[s]} {metric}" for s, metric in COLUMNS)]
        lines += _rows([*heads, "steps", "seconds", "rate", "seeds"])
        lines += [
            "| " + " | ".join(_arm_row(results, condition, arm, seeds)) + " |"
            for arm in CONDITIONS[condition].arms
        ]
        if pairs := results.comparisons(condition):
            heads = [f"{SPLITS[s]} {metric}" for s in SPLITS for metric in COMPARED]
            lines += ["", *_rows(["paired difference", *heads, "seeds"])]
            lines += [
                "| " + " | ".join(_difference_row(results, condition, pair)) + " |"
                for pair in pairs
            ]
    return lines


def _rows(heads: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "|" + "-|" * len(heads)]


def _pool(results: Results, condition: str) -> str:
    """Return the size of the pool and how far its labels agree with the truth, over the seeds."""
    pools = [
        record["pool"]
        for (name, _, _), record in results.records.items()
        if name == condition and record["pool"]
    ]
    if not pools:
        return ""
    clips, iou = (statistics.mean(pool[key] for pool in pools) for key in ("clips", "label_miou"))
    right = [pool["label_accuracy"] for pool in pools if "label_accuracy" in pool]
    options = f", accuracy {100 * statistics.mean(right):.0f}" if right else ""
    return f" ({clips:.0f} clips; labels against the truth: mIoU {100 * iou:.1f}{options})"


def _arm_row(results: Results, condition: str, arm: str, seeds: Sequence[int]) -> list[str]:
    done = results.seeds(condition, arm)
    if not done:
        return [ARMS[arm], *["not run"] * len(COLUMNS), "", "", "", ""]
    records = [results.records[condition, arm, seed] for seed in done]
    cells = [
        cell(results.summary(condition, arm, split, metric), metric in WITH_INTERVAL)
        for split, metric in COLUMNS
    ]
    steps = ", ".join(dict.fromkeys(str(record["steps"]) for record in records))
    seconds = statistics.median(record["seconds"] for record in records)
    rate = f"{records[0]['rate']:g}" if records[0]["rate"] else ""
    return [ARMS[arm], *cells, steps, f"{seconds:.0f}", rate, _seeds(done, seeds)]


def _difference_row(results: Results, condition: str, pair: tuple[str, str]) -> list[str]:
    cells = [
        cell(results.difference(condition, pair, split, metric), True, "+")
        for split in SPLITS
        for metric in COMPARED
    ]
    title = f"{ARMS[pair[0]]} - {ARMS[pair[1]]}"
    return [title, *cells, str(len(results.seeds(condition, *pair)))]


def _seeds(done: Sequence[int], asked: Sequence[int]) -> str:
    """Return the number of finished seeds, with those that are asked for and not run."""
    missing = [str(seed) for seed in asked if seed not in done]
    return f"{len(done)}" + (f" ({', '.join(missing)} not run)" if missing else "")


def cell(summary: Mapping[str, float], with_interval: bool, sign: str = "") -> str:
    """Return a mean in percent, with its interval: "63.0 (58.1 to 67.4)"."""
    mean, low, high = (f"{100 * summary[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})" if with_interval else mean
