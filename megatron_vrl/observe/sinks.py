"""Where a run's numbers go while it runs: metrics.jsonl, wandb, a progress bar, cards.

Only rank 0 writes; every other rank holds a `Sinks` without writers and calls it all the same.
The report is built afterwards from the files alone, so wandb may be switched off.
"""

import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_vrl.config import Observe
from megatron_vrl.errors import UserError
from megatron_vrl.observe.metrics import Phase, StepMetrics
from megatron_vrl.observe.samples import Card, CardFile
from megatron_vrl.storage.files import RowFile, write_file


class Writer(Protocol):
    def begin(self, phase: Phase, steps: int, done: int) -> None: ...
    def write(self, row: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Sinks:
    def __init__(self, writers: list[Writer], cards: CardFile | None) -> None:
        self._writers, self._cards = writers, cards
        self._said: set[str] = set()

    def begin(self, phase: Phase, steps: int, done: int = 0) -> None:
        """A phase of `steps` steps starts, `done` of them by an earlier process."""
        for writer in self._writers:
            writer.begin(phase, steps, done)

    def write(self, metrics: StepMetrics) -> None:
        row = metrics.row()
        for writer in self._writers:
            writer.write(row)

    def say(self, sentence: str) -> None:
        """Tell the person who watches, without breaking a progress bar."""
        if self._writers:
            tqdm.write(sentence, file=sys.stderr)

    def say_once(self, kind: str, sentence: str) -> None:
        """The first of its kind alone."""
        if kind not in self._said:
            self._said.add(kind)
            self.say(sentence)

    def card(
        self, card: Card, frames: NDArray[np.uint8], timestamps_s: NDArray[np.float64]
    ) -> None:
        """`frames` [F, height, width, 3] RGB, `timestamps_s` [F]."""
        if self._cards:
            self._cards.append(card, frames, timestamps_s)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        if self._cards:
            self._cards.close()


def open_sinks(
    out_dir: Path,
    cfg: Observe,
    resolved_config: dict[str, Any],
    run_name: str,
    *,
    rank: int,
    resume: tuple[Phase, int] | None = None,
) -> Sinks:
    """`resume` is the (phase, step) that will be run next: rows from there on are taken back.

    Without it the run starts from nothing and so do its files. Call on every rank.
    """
    if rank != 0:
        return Sinks([], None)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_file(out_dir / "config.yaml", yaml.safe_dump(resolved_config, sort_keys=False))
    writers: list[Writer] = [Rows(RowFile(out_dir / "metrics.jsonl", resume)), Progress()]
    if cfg.wandb != "disabled":
        writers.append(Wandb(out_dir, cfg, resolved_config, run_name))
    return Sinks(writers, CardFile(out_dir, resume))


class Rows:
    def __init__(self, file: RowFile) -> None:
        self._file = file

    def begin(self, phase: Phase, steps: int, done: int) -> None:
        """Rows name their phase themselves."""

    def write(self, row: dict[str, Any]) -> None:
        self._file.append(row)

    def close(self) -> None:
        self._file.close()


class Progress:
    """One bar per phase: step, reward or loss, time left. In a log file a line every 30 s."""

    def __init__(self) -> None:
        self._phase, self._bar = "", tqdm(disable=True)

    def begin(self, phase: Phase, steps: int, done: int) -> None:
        self._bar.close()
        interval_s = 0.1 if sys.stderr.isatty() else 30.0
        self._phase = phase
        self._bar = tqdm(
            desc=phase, total=steps, initial=done, mininterval=interval_s, dynamic_ncols=True
        )

    def write(self, row: dict[str, Any]) -> None:
        if row["phase"] != self._phase:
            return
        name = "reward" if "reward" in row else "loss"
        if row.get(name) is not None:
            self._bar.set_postfix_str(f"{name} {row[name]:.3f}", refresh=False)
        self._bar.update(row["step"] - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class Wandb:
    """Offline runs lie in OUT_DIR/wandb/offline-run-*; `wandb sync` uploads them later. A resumed
    run is a second one of the same group: an offline file cannot be continued."""

    def __init__(
        self, out_dir: Path, cfg: Observe, resolved_config: dict[str, Any], run_name: str
    ) -> None:
        import wandb  # half a second, and only for rank 0

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
        for phase in ("sft", "grpo", "eval"):
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")

    def begin(self, phase: Phase, steps: int, done: int) -> None:
        """Rows name their phase themselves."""

    def write(self, row: dict[str, Any]) -> None:
        group = "/".join(filter(None, (row["phase"], row.get("during"), row.get("split"))))
        numbers = {k: v for k, v in row.items() if isinstance(v, float)}
        numbers |= {f"seconds/{k}": v for k, v in row["seconds"].items()}
        logged = {f"{group}/{k}": v for k, v in numbers.items()}
        self._run.log({f"{row['phase']}/step": row["step"], **logged})

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # `finish` may return before its service has written the file
