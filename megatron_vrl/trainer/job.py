"""Main job: base evaluation, SFT, GRPO, an evaluation after each, export and report.

A stage that a checkpoint records as finished is not repeated. The same command resumes a run that
was stopped. For a finished run it only returns the path of the report.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vrl.checkpoint.hf_load import save_hf
from megatron_vrl.checkpoint.peft_files import save_peft
from megatron_vrl.config import RunConfig
from megatron_vrl.config.inference import inference_files
from megatron_vrl.context import RunContext, build, build_policy
from megatron_vrl.errors import CheckpointError, RunInUse, UserError
from megatron_vrl.evaluation.during_training import evaluate, trivial_answers
from megatron_vrl.models.fusion import gradient_fusion
from megatron_vrl.observe.clock import peak_rss_bytes
from megatron_vrl.observe.metrics import StepMetrics
from megatron_vrl.observe.model_card import model_card
from megatron_vrl.observe.report import build_report
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.observe.summary import write_summary
from megatron_vrl.parallel.mesh import gather_objects, raise_on_all_ranks, world_axis
from megatron_vrl.process.run_lock import Owner
from megatron_vrl.process.signals import begin_steps
from megatron_vrl.storage.files import write_file
from megatron_vrl.trainer.dry_run import check, padding_notes
from megatron_vrl.trainer.grpo import train_grpo
from megatron_vrl.trainer.preemption import stop_if_asked
from megatron_vrl.trainer.record import record
from megatron_vrl.trainer.restore import load_stage, restore
from megatron_vrl.trainer.run_dir import check_run_dir, check_writable
from megatron_vrl.trainer.run_scope import run_scope
from megatron_vrl.trainer.sft import train_sft
from megatron_vrl.trainer.state import RunState, finish_saving, is_done, save
from megatron_vrl.types import Sample

Splits = dict[str, list[Sample]]


def run_job(cfg: RunConfig) -> Path:
    """Do what is left of the job and return the path of its report. Every rank calls it."""
    out_dir = Path(cfg.run.out_dir)
    check_run_dir(cfg, trains=True)
    if is_finished(cfg):
        return out_dir / "report.html"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    checked = check(cfg, world, here=True)  # mistakes cost seconds, not an engine start
    check_writable(cfg.run.out_dir, keep=True)
    owner = Owner(out_dir, int(os.environ.get("RANK", "0")), cfg.run.lock_timeout_s)
    trained = build_policy(cfg, checked)
    owner.join()
    restored = restore(cfg, trained)
    ctx = build(cfg, checked, trained)
    load_stage(cfg, trained, restored)
    state = restored.state
    with raise_on_all_ranks(ctx.mesh):
        splits = {
            name: ctx.datasets.load(sources, ctx.reader.duration_s)
            for name, sources in cfg.data.evaluation.items()
        }
    with run_scope(ctx, owner, state.next_row) as sinks:
        sinks.log(f"Output lies in {out_dir}{_resuming(state)}.")
        for note in padding_notes(ctx.arch, cfg):
            sinks.log(note)
        state.add_seconds(ctx.clock.take())
        with _saved_on_error(ctx, state):
            _stages(ctx, state, sinks, splits)
            finish_saving(ctx)
    return _conclude(ctx, state, splits)


@contextmanager
def _saved_on_error(ctx: RunContext, state: RunState) -> Iterator[None]:
    """Save the run if the block raises a UserError, which all ranks raise together.

    An error of a checkpoint or of the run directory's lock saves nothing.
    """
    try:
        yield
    except UserError as error:
        if not isinstance(error, CheckpointError | RunInUse):
            if state.step > 0:
                save(ctx, state)
            finish_saving(ctx)
        raise
    finally:
        ctx.saver.abandon()  # a writer is left only if the run ends with another error


def is_finished(cfg: RunConfig) -> bool:
    """Return whether the job is done and its report is written."""
    return is_done(cfg.run.out_dir) and (Path(cfg.run.out_dir) / "report.html").exists()


def _resuming(state: RunState) -> str:
    if state.stage == "base":
        return ""
    if state.stage == "done":
        return "; resuming after the last step"
    return f"; resuming at step {state.step + 1} of {state.stage}"


def _stages(ctx: RunContext, state: RunState, sinks: Sinks, splits: Splits) -> None:
    """Run the stages that are left, then export the weights and save the run as done."""
    cfg = ctx.cfg
    dev = splits.get("dev", [])
    if state.stage == "base":
        if cfg.evaluation.before_training:
            _evaluate_stage(ctx, state, sinks, splits)
        state.begin("sft")
    if state.stage == "sft":
        if cfg.sft.steps:
            if state.evaluating != "stage":
                train_sft(ctx, state, sinks, dev)
            _evaluate_stage(ctx, state, sinks, splits)
        state.begin("grpo")
        save(ctx, state)
        stop_if_asked(ctx.mesh, state.step)
    if state.stage == "grpo":
        if cfg.grpo.steps:
            train_grpo(ctx, state, sinks, dev)
            save(ctx, state)
            _evaluate_stage(ctx, state, sinks, splits)
        state.begin("done")
    export = Path(cfg.run.out_dir) / "export"
    save_hf(ctx.policy.chunks, ctx.hf_dir, export, inference_files(cfg))
    if cfg.model.lora.rank:
        save_peft(ctx.policy, export.with_name("adapter"))
    save(ctx, state)


def _evaluate_stage(ctx: RunContext, state: RunState, sinks: Sinks, splits: Splits) -> None:
    """Evaluate the weights at the end of a stage on every reported split that has no results.

    Answers are written to OUT/evaluations/STAGE-SPLIT.jsonl.
    A run that was stopped here resumes with the split that was being evaluated.
    """
    state.evaluating = "stage"
    table = state.results.setdefault(state.stage, {})
    for name, samples in splits.items():
        if name == "dev" or name in table:
            continue
        begin_steps()  # from here on an interrupt waits for the end of a batch
        with ctx.clock("evaluate"):
            answers = Path(ctx.cfg.run.out_dir) / "evaluations" / f"{state.stage}-{name}.jsonl"
            table[name] = evaluate(ctx, samples, state.version, state.step, answers)
        spent = ctx.clock.take()
        state.add_seconds(spent)
        row = StepMetrics(
            phase="eval",
            step=state.step,
            values=table[name],
            seconds=spent,
            split=name,
            during=state.stage,
        )
        record(ctx, sinks, row)


def _conclude(ctx: RunContext, state: RunState, splits: Splits) -> Path:
    """Write summary.json, the export's model card and report.html on rank 0.

    Return the path of the report.
    """
    cfg, out_dir = ctx.cfg, Path(ctx.cfg.run.out_dir)
    state.add_seconds(ctx.clock.take())
    peaks = gather_objects(world_axis(ctx.mesh), peak_rss_bytes())
    with raise_on_all_ranks(ctx.mesh):
        if ctx.mesh.rank == 0:
            trivial = {
                name: trivial_answers(samples, cfg.rewards)
                for name, samples in splits.items()
                if name != "dev"
            }
            card = model_card(cfg, state.results, trivial)
            write_file(out_dir / "export" / "README.md", card)
            write_summary(
                out_dir,
                results=state.results,
                trivial=trivial,
                seconds=state.seconds,
                seed=cfg.run.seed,
                peak_rss_bytes=max(peaks),
                extra={
                    "warm_up_restarts": state.attempt,
                    "peak_rss_bytes_all_ranks": sum(peaks),
                    "ranks": ctx.mesh.world,
                    "weight_gradients": gradient_fusion(
                        cfg.model, ctx.mesh.device.type == "cuda"
                    ).description,
                },
            )
            build_report(out_dir)
    return out_dir / "report.html"
