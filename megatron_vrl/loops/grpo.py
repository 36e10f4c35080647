"""Reinforcement learning, synchronous: take prompts, roll out, score, drop what teaches nothing,
pack, update, hand the weights over, report, save."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_vrl.algorithms import ALGORITHMS
from megatron_vrl.batching.pack import Answer, Group, MicroBatch
from megatron_vrl.build import Parts
from megatron_vrl.data.mix import SampleStream
from megatron_vrl.loops.cards import write_cards
from megatron_vrl.loops.record import evaluate_dev, record
from megatron_vrl.loops.state import RunState, keep_reference, save_if_due, start_phase
from megatron_vrl.model.head import Distribution
from megatron_vrl.observe.metrics import StepMetrics
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.parallel.mesh import gather_objects
from megatron_vrl.rewards import score, weights_of
from megatron_vrl.rollout.engine import SamplingSpec
from megatron_vrl.training.batches import plan_batches
from megatron_vrl.training.policy import Update
from megatron_vrl.types import Prompt, Rollout, ScoredGroup, VideoSample


def train_grpo(parts: Parts, state: RunState, sinks: Sinks, dev: list[VideoSample]) -> None:
    """Run GRPO from `state.step` to its end. Every rank calls it."""
    cfg, clock = parts.cfg, parts.clock
    stream = SampleStream(parts.samples(cfg.data.train), cfg.run.seed)
    stream.restore(state.stream)
    if cfg.algorithm.kl > 0:
        keep_reference(parts, state)
    start_phase(parts, state, cfg.grpo.optimizer, cfg.grpo.steps)
    sinks.begin("grpo", cfg.grpo.steps, state.step)
    while state.step < cfg.grpo.steps:
        samples = parts.rank_share(stream.take(cfg.rollout.prompts_per_step))
        with clock("encode"):
            prompts = parts.encode(samples)
        with clock("sync"):
            parts.push_weights(state.version)
        with clock("rollout"):
            answers = parts.generate(prompts, _sampling(parts, state))
        with clock("score"):
            groups = parts.gather_replica(_scored(parts, samples, prompts, answers))
        with clock("update"):
            update = _update(parts, groups, state.step)
        state.step += 1
        state.stream = stream.state
        state.version += 1
        values = _summary(parts, groups, update)
        spent = clock.take()
        state.add_seconds(spent)
        row = StepMetrics(phase="grpo", step=state.step, values=values, seconds=spent)
        record(parts, sinks, row)
        write_cards(parts, sinks, groups[: cfg.observe.cards_per_step], state.step)
        if cfg.grpo.evaluate_every and state.step % cfg.grpo.evaluate_every == 0:
            evaluate_dev(parts, state, sinks, dev, during="grpo")
        save_if_due(parts, state)


def _sampling(parts: Parts, state: RunState) -> SamplingSpec:
    cfg = parts.cfg
    entropy = [cfg.run.seed, state.step, parts.mesh.rank]  # every step and rank its own
    return SamplingSpec(
        n=cfg.rollout.group_size,
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        max_tokens=cfg.rollout.max_response_tokens,
        seed=int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1),
    )


def _scored(
    parts: Parts,
    samples: Sequence[VideoSample],
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Rollout]],
) -> list[ScoredGroup]:
    cfg, weights = parts.cfg.rewards, weights_of(parts.cfg.rewards)
    algorithm = ALGORITHMS[parts.cfg.algorithm.name]
    groups = []
    for sample, prompt, rollouts in zip(samples, prompts, answers, strict=True):
        scores = [score(sample, r.text, cfg.mode, weights[sample.task]) for r in rollouts]
        rewards = np.array([total for _, total in scores])
        groups.append(
            ScoredGroup(
                sample=sample,
                prompt=prompt,
                rollouts=tuple(rollouts),
                parts={name: np.array([p[name] for p, _ in scores]) for name in scores[0][0]},
                rewards=rewards,
                advantages=algorithm.advantages(rewards, sample.id),
            )
        )
    return groups


def _update(parts: Parts, groups: Sequence[ScoredGroup], step: int) -> Update | None:
    """One optimizer update; None when no group of any rank teaches anything."""
    cfg = parts.cfg
    algorithm = ALGORITHMS[cfg.algorithm.name]
    useful = [g for g in groups if algorithm.teaches(g.advantages)]
    kept = useful if cfg.algorithm.drop_uniform_groups else groups
    batches = plan_batches(
        [_group(g) for g in kept],
        _group(groups[0]),
        cfg.batch,
        parts.mesh,
        cfg.algorithm.normalisation,
    )
    if not batches:
        return None

    def token_loss(
        logprobs: Tensor, entropy: Tensor, batch: MicroBatch, reference: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        advantages = torch.from_numpy(batch.advantage).to(logprobs.device)
        loss, metrics = algorithm.token_loss(
            logprobs, logprobs.detach(), advantages, reference, entropy, cfg.algorithm
        )
        engine = torch.from_numpy(batch.engine_logprob).to(logprobs.device)
        gap = (logprobs.detach() - engine).abs()
        return loss, metrics | {"logprob_gap": gap, "logprob_gap_max": gap}

    sampled = Distribution(
        temperature=cfg.rollout.temperature, banned=parts.engine.banned_token_ids
    )
    return parts.policy.update(batches, token_loss, sampled, step)


def _group(scored: ScoredGroup) -> Group:
    return Group(
        prompt=scored.prompt,
        answers=tuple(
            Answer(
                token_ids=rollout.token_ids,
                advantage=float(advantage),
                engine_logprobs=rollout.logprobs,
            )
            for rollout, advantage in zip(scored.rollouts, scored.advantages, strict=True)
        ),
    )


def _summary(parts: Parts, groups: Sequence[ScoredGroup], update: Update | None) -> dict[str, Any]:
    """The step's numbers over all ranks."""
    own: dict[str, list[float]] = {}
    for group in groups:
        rows = {f"parts/{name}": values.tolist() for name, values in group.parts.items()}
        rows["format_rate"] = rows["parts/format"]
        rows["reward"] = group.rewards.tolist()
        rows["response_tokens"] = [len(r.token_ids) for r in group.rollouts]
        rows["truncated_share"] = [float(r.finish == "length") for r in group.rollouts]
        rows["uniform_groups"] = [float(not group.advantages.any())]
        for name, values in rows.items():
            own.setdefault(name, []).extend(values)
    everywhere = gather_objects(parts.mesh.data, own)
    names = dict.fromkeys(name for rows in everywhere for name in rows)
    summary: dict[str, Any] = {
        name: float(np.mean([v for rows in everywhere for v in rows.get(name, [])]))
        for name in names
    }
    summary["updates_left_out"] = float(update is None or not update.applied)
    if update is not None:
        summary |= {"loss": update.loss, "grad_norm": update.grad_norm, "lr": update.lr}
        summary |= update.metrics
    return summary
