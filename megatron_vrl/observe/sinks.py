"""Sinks: destinations of a run's metrics: metrics.jsonl, wandb, a progress bar, logged samples.

Only rank 0 writes. Every other rank has a `Sinks` without writers and makes the same calls. The
report is built later from the files, so wandb is optional.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml
from tqdm import tqdm

from megatron_vrl.config import Observe
from megatron_vrl.errors import UserError
from megatron_vrl.observe.metrics import Phase, StepMetrics
from megatron_vrl.observe.samples import LoggedSample, SampleLog
from megatron_vrl.storage.files import RowFile, write_file
from megatron_vrl.types import Visual


class Writer(Protocol):
    """One destination of metric rows."""

    def begin(self, phase: Phase, steps: int, done: int) -> None:
        """Start a phase of `steps` steps, of which `done` were completed before a restart."""

    def write(self, row: dict[str, Any]) -> None:
        """Write the metrics of one step."""

    def close(self) -> None:
        """Flush and close."""


class Sinks:
    """Passes each call to all writers."""

    def __init__(self, writers: list[Writer], samples: SampleLog | None) -> None:
        self._writers, self._samples = writers, samples
        self._logged_kinds: set[str] = set()

    def begin(self, phase: Phase, steps: int, done: int = 0) -> None:
        """Start a phase of `steps` steps, `done` of which were completed before a restart."""
        for writer in self._writers:
            writer.begin(phase, steps, done)

    def write(self, metrics: StepMetrics) -> None:
        """Write the metrics of one step to all writers."""
        row = metrics.row()
        for writer in self._writers:
            writer.write(row)

    def log(self, sentence: str) -> None:
        """Print a line on stderr without breaking the progress bar."""
        if self._writers:
            tqdm.write(sentence, file=sys.stderr)

    def log_once(self, kind: str, sentence: str) -> None:
        """Print the line if none of its `kind` was printed before."""
        if kind not in self._logged_kinds:
            self._logged_kinds.add(kind)
            self.log(sentence)

    def log_sample(self, sample: LoggedSample, visuals: Sequence[Visual]) -> None:
        """Log a whole sample with its videos and images."""
        if self._samples:
            self._samples.append(sample, visuals)

    def close(self) -> None:
        """Close all writers and the sample log."""
        for writer in self._writers:
            writer.close()
        if self._samples:
            self._samples.close()


def open_sinks(
    out_dir: Path,
    cfg: Observe,
    resolved_config: dict[str, Any],
    run_name: str,
    *,
    rank: int,
    resume: tuple[Phase, int] | None = None,
) -> Sinks:
    """Return the Sinks of this rank. Call on every rank.

    `resume` is the (phase, step) that runs next: rows from there on are removed from the files.
    None starts with empty files.
    """
    if rank != 0:
        return Sinks([], None)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_file(out_dir / "config.yaml", yaml.safe_dump(resolved_config, sort_keys=False))
    writers: list[Writer] = [Rows(RowFile(out_dir / "metrics.jsonl", resume)), Progress()]
    if cfg.wandb != "disabled":
        writers.append(Wandb(out_dir, cfg, resolved_config, run_name))
    return Sinks(writers, SampleLog(out_dir, resume))


class Rows:
    """Writes metrics.jsonl."""

    def __init__(self, file: RowFile) -> None:
        self._file = file

    def begin(self, phase: Phase, steps: int, done: int) -> None:
        """Do nothing: a row contains its phase."""

    def write(self, row: dict[str, Any]) -> None:
        """Append the row."""
        self._file.append(row)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Progress:
    """One progress bar per phase with step, reward or loss, and time left.

    Not a terminal: a line per 30 s.
    """

    def __init__(self) -> None:
        self._phase, self._bar = "", tqdm(disable=True)

    def begin(self, phase: Phase, steps: int, done: int) -> None:
        """Replace the bar by one of this phase."""
        self._bar.close()
        interval_s = 0.1 if sys.stderr.isatty() else 30.0
        self._phase = phase
        self._bar = tqdm(
            desc=phase, total=steps, initial=done, mininterval=interval_s, dynamic_ncols=True
        )

    def write(self, row: dict[str, Any]) -> None:
        """Move the bar to the row's step. Rows of other phases are ignored."""
        if row["phase"] != self._phase:
            return
        name, title = ("reward/mean", "reward") if "reward/mean" in row else ("sft/loss", "loss")
        if row.get(name) is not None:
            self._bar.set_postfix_str(f"{title} {row[name]:.3f}", refresh=False)
        self._bar.update(row["step"] - self._bar.n)

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()


class Wandb:
    """Logs to Weights & Biases.

    Offline runs are in OUT_DIR/wandb/offline-run-*; upload them with `wandb sync`. A resumed run is
    a new wandb run in the same group, because an offline file cannot be continued.
    """

    def __init__(
        self, out_dir: Path, cfg: Observe, resolved_config: dict[str, Any], run_name: str
    ) -> None:
        import wandb  # imported here: it takes half a second, and only rank 0 needs it

        settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True)
        try:
            self._run = wandb.init(
                project=cfg.project,
                name=run_name,
                group=run_name,
                dir=out_dir,
                mode=cfg.wandb,
                config=resolved_config,
                settings=settings,
            )
        except wandb.Error as error:
            raise UserError(
                f"observe.wandb={cfg.wandb} failed: {' '.join(str(error).split())} "
                "Run `wandb login`, or set observe.wandb=offline."
            ) from None
        self._run.define_metric("sft/*", step_metric="sft/step")
        for group in (
            "reward",
            "response_length",
            "actor",
            "rollout",
            "perf",
            "data",
            "fp8",
            "timing_s",
        ):
            self._run.define_metric(f"{group}/*", step_metric="grpo/step")

    def begin(self, phase: Phase, steps: int, done: int) -> None:
        """Do nothing: a row contains its phase."""

    def write(self, row: dict[str, Any]) -> None:
        """Log the row's metrics: GRPO's by their names, SFT's under sft/, evaluations under eval/.

        An evaluation of any stage is eval/SPLIT/METRIC, so that one curve shows all stages.
        """
        phase, split = row["phase"], row.get("split")
        prefix = {"grpo": "", "sft": "sft/", "eval": f"eval/{split}/"}[phase]
        metrics = {k: v for k, v in row.items() if isinstance(v, float)}
        metrics |= {f"timing_s/{k}": v for k, v in row["timing_s"].items()}
        logged = {k if k.startswith("sft/") else prefix + k: v for k, v in metrics.items()}
        self._run.log({f"{phase}/step": row["step"], **logged})

    def close(self) -> None:
        """Finish the run and stop wandb's service."""
        import wandb

        self._run.finish()
        wandb.teardown()  # waits for wandb's service to write the file; `finish` may not
