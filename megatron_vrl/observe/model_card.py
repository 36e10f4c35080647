"""Model card of an export: README.md with base, recipe, data, results and how to load it.

The front matter has the keys that the Hugging Face hub reads. Paths are shortened to their last
part, so that no folder of the machine is published.
"""

import subprocess
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import yaml

from megatron_vrl.config import RunConfig, Source
from megatron_vrl.observe.report import result_tables
from megatron_vrl.observe.summary import Table, installed_versions
from megatron_vrl.rewards.weights import reward_weights
from megatron_vrl.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
USE = """\
## Use

    vllm serve THIS_FOLDER
    mvrl ask --checkpoint THIS_FOLDER --video clip.mp4 --question "the dog runs"

`transformers` loads the folder with `AutoModelForImageTextToText` and `AutoProcessor`.
`inference.yaml` has the system prompt, the sampling of frames and the maximum answer length that
the model was trained with."""


def model_card(cfg: RunConfig, results: Table, trivial: Table) -> str:
    """Return the text of README.md.

    results  "base", "sft" or "grpo" -> split -> metric -> value
    trivial  split -> trivial baseline -> metric -> value
    """
    base = Path(cfg.model.checkpoint).name
    front = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["video", "reinforcement-learning", "grpo", "megatron_vrl"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {Path(cfg.run.out_dir).name}",
        f"{base}, tuned with {_program()}.",
        "## Recipe\n\n" + _table(("", ""), _recipe(cfg, _tasks(results))),
        *_results(results, trivial),
        USE,
    ]
    return "\n\n".join(parts) + "\n"


def _program() -> str:
    """Return name, version and commit of this program; without a checkout no commit."""
    version = installed_versions().get("megatron_vrl", "")
    head = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = subprocess.run(head, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"megatron_vrl {version}".strip() + (f", commit {commit}" if commit else "")


def _tasks(results: Table) -> set[str]:
    """Return the tasks that were evaluated; all if none was."""
    names = {n.split("/")[0] for stage in results.values() for row in stage.values() for n in row}
    return names & set(TASKS) or set(TASKS)


def _recipe(cfg: RunConfig, tasks: Container[str]) -> Iterator[tuple[str, str]]:
    """Yield the rows of the recipe: what was trained, on what, with which reward."""
    if cfg.sft.steps:
        rate = cfg.sft.optimizer.lr
        yield "SFT", f"at most {cfg.sft.steps} steps of {cfg.sft.batch_size} samples, rate {rate:g}"
        yield "SFT data", _files(cfg.data.sft)
    if cfg.grpo.steps:
        prompts, answers = cfg.rollout.prompts_per_step, cfg.rollout.group_size
        rate = cfg.grpo.optimizer.lr
        yield (
            f"RL ({cfg.algorithm.name})",
            f"{cfg.grpo.steps} steps of {prompts} prompts x {answers} answers, rate {rate:g}, "
            f"KL {cfg.algorithm.kl:g}, temperature {cfg.rollout.temperature:g}",
        )
        yield "RL data", _files(cfg.data.train)
        for task, weights in reward_weights(cfg.rewards).items():
            if task in tasks:
                yield f"reward of {task}", ", ".join(f"{w:g} {n}" for n, w in weights.items())
    yield "video", f"{cfg.video.fps:g} frames per second, at most {cfg.video.max_frames} frames"
    model = cfg.model
    if model.lora.rank:
        yield "LoRA", f"rank {model.lora.rank}, alpha {model.lora.alpha:g}, merged into the weights"
    frozen = {
        "vision tower": model.freeze_vision,
        "merger": model.freeze_merger,
        "language model": model.freeze_language,
    }
    yield "frozen", ", ".join(part for part, is_frozen in frozen.items() if is_frozen) or "nothing"
    yield "seed", str(cfg.run.seed)


def _files(sources: Iterable[Source]) -> str:
    """Return the names of the annotation files."""
    return ", ".join(Path(source.json_path).name for source in sources)


def _results(results: Table, trivial: Table) -> Iterator[str]:
    """Yield a section with a table for each split that was evaluated."""
    for found in result_tables({"results": results, "trivial": trivial}):
        rows = [(label, *cells) for label, _, cells in found.rows]
        yield f"## Results on `{found.split}`\n\n" + _table(("", *found.columns), rows)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ("-",) * len(heads), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
