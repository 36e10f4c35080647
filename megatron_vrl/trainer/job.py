"""The main job: base evaluation, warm-up, GRPO, evaluation of each, export, report.

A part that a checkpoint says is finished is not repeated, so the same command line continues a
run that was stopped and, on a finished one, only says where its report is.
"""

import os
from pathlib import Path

from megatron_vrl.checkpoint.hf_load import save_hf
from megatron_vrl.config import RunConfig
from megatron_vrl.config.inference import inference_files
from megatron_vrl.context import RunContext, build
from megatron_vrl.errors import CheckpointError, RunInUse, UserError
from megatron_vrl.evaluation.during_training import evaluate, trivial_answers
from megatron_vrl.models.fusion import gradient_fusion
from megatron_vrl.observe.clock import peak_rss_bytes
from megatron_vrl.observe.metrics import StepMetrics
from megatron_vrl.observe.report import build_report
from megatron_vrl.observe.sinks import Sinks, open_sinks
from megatron_vrl.observe.summary import write_summary
from megatron_vrl.parallel.mesh import gather_objects, raise_on_all_ranks, world_axis
from megatron_vrl.process.run_lock import Owner
from megatron_vrl.process.signals import begin_steps
from megatron_vrl.trainer.dry_run import check, padding_notes
from megatron_vrl.trainer.grpo import train_grpo
from megatron_vrl.trainer.grpo_overlapped import train_overlapped
from megatron_vrl.trainer.preemption import stop_if_asked
from megatron_vrl.trainer.record import record
from megatron_vrl.trainer.run_dir import check_run_dir, check_writable
from megatron_vrl.trainer.sft import train_sft
from megatron_vrl.trainer.state import (
    RunState,
    finish_saving,
    is_done,
    load_stage_weights,
    restored,
    save,
)
from megatron_vrl.types import VideoSample

Splits = dict[str, list[VideoSample]]


def run_job(cfg: RunConfig) -> Path:
    """Do what is left of the run and return its report. Every rank calls it."""
    out_dir = Path(cfg.run.out_dir)
    check_run_dir(cfg, trains=True)
    if is_finished(cfg):
        return out_dir / "report.html"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check(cfg, world, here=True)  # mistakes cost seconds, not an engine start
    check_writable(cfg.run.out_dir, keep=True)
    owner = Owner(out_dir, int(os.environ.get("RANK", "0")), cfg.run.lock_timeout_s)
    ctx = build(cfg)
    owner.join()
    state = restored(ctx)
    load_stage_weights(ctx, state)
    splits = {name: ctx.samples(sources) for name, sources in cfg.data.evaluation.items()}
    with raise_on_all_ranks(ctx.mesh):
        sinks = open_sinks(
            out_dir,
            cfg.observe,
            cfg.model_dump(mode="json"),
            out_dir.name,
            rank=ctx.mesh.rank,
            resume=state.next_row,
        )
    sinks.say(f"Output lies in {out_dir}{_resuming(state)}.")
    for note in padding_notes(ctx.arch, cfg):
        sinks.say(note)
    state.add_seconds(ctx.clock.take())
    failure: UserError | None = None
    try:
        _stages(ctx, state, sinks, splits)
        finish_saving(ctx)
    except UserError as error:
        failure = error
        if not isinstance(error, CheckpointError | RunInUse):
            if state.step > 0:
                save(ctx, state)  # every rank raises it together: keep what was learned
            finish_saving(ctx)
    finally:
        ctx.saver.abandon()  # unless all is written, the run ends of something else
    with raise_on_all_ranks(
        ctx.mesh
    ):  # torchrun ends all ranks when one has gone, and closing takes time
        sinks.close()
        owner.release()
    if failure is not None:
        raise failure
    return _conclude(ctx, state, splits)


def is_finished(cfg: RunConfig) -> bool:
    """Return whether the run has finished and has its report."""
    return is_done(cfg.run.out_dir) and (Path(cfg.run.out_dir) / "report.html").exists()


def _resuming(state: RunState) -> str:
    if state.stage == "base":
        return ""
    if state.stage == "done":
        return "; resuming after the last step"
    return f"; resuming at step {state.step + 1} of {state.stage}"


def _stages(ctx: RunContext, state: RunState, sinks: Sinks, splits: Splits) -> None:
    cfg = ctx.cfg
    dev = splits.get("dev", [])
    if state.stage == "base":
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
            train = train_overlapped if cfg.rollout.max_staleness else train_grpo
            train(ctx, state, sinks, dev)
            save(ctx, state)
            _evaluate_stage(ctx, state, sinks, splits)
        state.begin("done")
    export = Path(cfg.run.out_dir) / "export"
    save_hf(ctx.policy.chunks, ctx.hf_dir, export, inference_files(cfg))
    save(ctx, state)


def _evaluate_stage(ctx: RunContext, state: RunState, sinks: Sinks, splits: Splits) -> None:
    """Score the weights that the stage ended with on every reported split that has no results.

    A run that is stopped here goes on with the split that was under way.
    """
    state.evaluating = "stage"
    table = state.results.setdefault(state.stage, {})
    for name, samples in splits.items():
        if name == "dev" or name in table:
            continue
        begin_steps()  # an interrupt waits for the end of a batch
        with ctx.clock("evaluate"):
            table[name] = evaluate(ctx, samples, state.version, state.step)
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
    """summary.json and report.html; rank 0 writes."""
    cfg, out_dir = ctx.cfg, Path(ctx.cfg.run.out_dir)
    state.add_seconds(ctx.clock.take())
    peaks = gather_objects(world_axis(ctx.mesh), peak_rss_bytes())
    with raise_on_all_ranks(ctx.mesh):
        if ctx.mesh.rank == 0:
            write_summary(
                out_dir,
                results=state.results,
                trivial={
                    name: trivial_answers(samples, cfg.rewards)
                    for name, samples in splits.items()
                    if name != "dev"
                },
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
