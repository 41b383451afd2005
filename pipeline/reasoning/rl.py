"""The reinforcement-learning loop: sample groups, judge them, update the policy, watch it. Resumes bit for bit.

What a step does depends on (seed, step, rank) and on the weights alone: no state of a random generator outlives it.
The log-probabilities that ratios start from are the trainer's own; how far the sampler's lie from them is reported.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.data.reasoning_items import ReasoningItem
from pipeline.errors import DivergedError, RecipeError
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.reasoning.experience import JudgedRow, Rollout, collect_rollout, score_rows
from pipeline.reasoning.grpo import clipped_loss, kl_k3, token_logprobs
from pipeline.reasoning.policy import batch_logits, batch_rows
from pipeline.recipe import RLConfig
from pipeline.training.distributed import sum_across_ranks
from pipeline.training.engine import TrainEngine


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTraining:
    """What a training left behind: one curve row per step, samples in words, and how far the policy went."""

    curve: tuple[dict[str, float], ...]
    samples: tuple[dict[str, Any], ...]
    final_kl: float
    num_samples: int


def rows_per_update(config: RLConfig, *, world_size: int) -> int:
    """Return how many samples one optimizer step is taken on, over all ranks.

    Raises:
        RecipeError: when prompts do not divide over ranks, or samples over updates.
    """
    if config.prompts_per_step % world_size:
        raise RecipeError(
            f"rl.prompts_per_step is {config.prompts_per_step}, which {world_size} ranks do not divide: "
            f"run with {math.gcd(config.prompts_per_step, world_size)} ranks, or change it"
        )
    rows_per_rank = config.prompts_per_step // world_size * config.samples_per_prompt
    if rows_per_rank % config.updates_per_rollout:
        raise RecipeError(
            f"a rollout has {rows_per_rank} samples per rank, which rl.updates_per_rollout = "
            f"{config.updates_per_rollout} does not divide: change one of them"
        )
    return config.prompts_per_step * config.samples_per_prompt // config.updates_per_rollout


def train_policy(
    engine: TrainEngine,
    *,
    reference: HeterogeneousLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ReasoningItem],
    config: RLConfig,
    checkpoints_dir: Path,
    checkpoint_interval_steps: int,
    reporter: Reporter,
) -> PolicyTraining:
    """Train until `config.steps`, continuing from the newest checkpoint if there is one.

    Raises:
        DivergedError: when the loss or the gradient is no longer finite.
    """
    state = engine.load_latest(checkpoints_dir) or {"curve": [], "samples": []}
    curve: list[dict[str, float]] = state["curve"]
    samples: list[dict[str, Any]] = state["samples"]
    final_kl = math.nan
    for step in range(len(curve) + 1, config.steps + 1):
        num_updates_before = engine.num_steps
        rollout = collect_rollout(
            engine, reference=reference, tokenizer=tokenizer, items=items, config=config, step=step
        )
        tokens_before = int(curve[-1]["tokens"]) if curve else 0
        watched = _watch(rollout, engine=engine)
        updated = _update(engine, rollout.rows, config=config, step=step)
        curve.append({"step": step, "tokens": tokens_before + int(watched.pop("num_tokens")), **updated, **watched})
        samples += [{"step": step, **sample} for sample in rollout.samples]
        reporter.step(
            step,
            config.steps,
            what="rollouts",
            **{name: curve[-1][name] for name in ("reward", "accuracy", "format_rate", "kl", "loss", "entropy")},
        )
        if step == config.steps:
            final_kl = _kl_to_reference(engine, rollout.rows, config=config)
            _require_finite(step, final_kl=final_kl)
        elif engine.num_steps // checkpoint_interval_steps > num_updates_before // checkpoint_interval_steps:
            engine.save(checkpoints_dir, {"curve": curve, "samples": samples})
    return PolicyTraining(
        curve=tuple(curve),
        samples=tuple(samples),
        final_kl=final_kl,
        num_samples=config.steps * config.prompts_per_step * config.samples_per_prompt,
    )


def _update(engine: TrainEngine, judged: Sequence[JudgedRow], *, config: RLConfig, step: int) -> dict[str, float]:
    """Take the step's optimizer updates, each on its share of the samples, and return what they were taken with."""
    order = random.Random(f"{config.seed}/{step}/{engine.rank}").sample(range(len(judged)), len(judged))
    size = len(judged) // config.updates_per_rollout
    losses, clipped, info = [], [], None
    for start in range(0, len(judged), size):
        # Rows of like length share a micro-batch: less padding, the same sum.
        rows = sorted((judged[index] for index in order[start : start + size]), key=lambda row: row.row.num_tokens)
        num_tokens = sum_across_ranks([float(sum(len(row.row.completion_ids) for row in rows))], device=engine.device)[
            0
        ]
        sums = [0.0, 0.0]
        for first in range(0, size, engine.micro_batch_size):
            micro = rows[first : first + engine.micro_batch_size]
            batch = batch_rows([row.row for row in micro], device=engine.device)
            logits_BKV = batch_logits(engine.forward, batch)
            token_loss = clipped_loss(
                logprobs_BT=token_logprobs(logits_BKV, ids_BT=batch.target_ids_BK, temperature=config.temperature),
                old_logprobs_BT=batch.spread([row.old.logprobs for row in micro]),
                reference_logprobs_BT=batch.spread([row.reference.logprobs for row in micro]),
                advantages_B=torch.tensor([row.advantage for row in micro], device=engine.device),
                trained_BT=batch.sampled_BK,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                kl_weight=config.kl_weight,
            )
            engine.backward(token_loss.loss / num_tokens)
            sums = [sums[0] + token_loss.loss.item(), sums[1] + token_loss.num_clipped.item()]
        info = engine.step()
        loss, clip_fraction = (total / num_tokens for total in sum_across_ranks(sums, device=engine.device))
        _require_finite(step, loss=loss, grad_norm=info.grad_norm)
        losses.append(loss)
        clipped.append(clip_fraction)
    assert info is not None
    return {
        "loss": sum(losses) / len(losses),
        "learning_rate": info.learning_rate,
        "grad_norm": info.grad_norm,
        "clip_fraction": sum(clipped) / len(clipped),
    }


def _require_finite(step: int, **values: float) -> None:
    if not all(map(math.isfinite, values.values())):
        found = ", ".join(f"{name} {value}" for name, value in values.items())
        raise DivergedError(f"rl step {step} has {found}: lower rl.optimizer.learning_rate, or raise rl.kl_weight")


def _watch(rollout: Rollout, *, engine: TrainEngine) -> dict[str, float]:
    """Return the monitors of a step over all ranks; token means are over sampled tokens."""
    rows = rollout.rows
    sums = {
        "num_samples": float(len(rows)),
        "num_groups": float(rollout.num_groups),
        "num_tokens": float(sum(len(row.row.completion_ids) for row in rows)),
        "reward": sum(row.reward for row in rows),
        "squared_reward": sum(row.reward**2 for row in rows),
        "zero_groups": rollout.num_zero_advantage_groups,
        "terminated": sum(row.verdict.is_terminated for row in rows),
        "well_formed": sum(row.verdict.is_well_formed for row in rows),
        "right": sum(row.verdict.is_right for row in rows),
        "verifier_errors": sum(row.verdict.has_verifier_failed for row in rows),
        "kl": sum(_kl_sum(row.old.logprobs, row) for row in rows),
        "entropy": sum(row.old.entropies.double().sum().item() for row in rows),
        "mismatch": sum((row.old.logprobs - row.sampler_logprobs).abs().double().sum().item() for row in rows),
    }
    total = dict(
        zip(sums, sum_across_ranks([float(value) for value in sums.values()], device=engine.device), strict=True)
    )
    mean_reward = total["reward"] / total["num_samples"]
    return {
        "num_tokens": total["num_tokens"],
        "reward": mean_reward,
        "reward_std": math.sqrt(max(total["squared_reward"] / total["num_samples"] - mean_reward**2, 0.0)),
        "share_zero_advantage_groups": total["zero_groups"] / total["num_groups"],
        "kl": total["kl"] / total["num_tokens"],
        "entropy": total["entropy"] / total["num_tokens"],
        "mean_length_tokens": total["num_tokens"] / total["num_samples"],
        "truncation_rate": 1 - total["terminated"] / total["num_samples"],
        "format_rate": total["well_formed"] / total["num_samples"],
        "accuracy": total["right"] / total["num_samples"],
        "num_verifier_errors": total["verifier_errors"],
        "sampler_mismatch_nats": total["mismatch"] / total["num_tokens"],
    }


def _kl_to_reference(engine: TrainEngine, judged: Sequence[JudgedRow], *, config: RLConfig) -> float:
    """Return the policy's KL to its start on the last rollout's tokens, nats per token, after the last update."""
    now = score_rows(engine.model, [row.row for row in judged], config=config, device=engine.device)
    kl_sum = sum(_kl_sum(statistics.logprobs, row) for statistics, row in zip(now, judged, strict=True))
    num_tokens = sum(len(row.row.completion_ids) for row in judged)
    kl_total, tokens_total = sum_across_ranks([kl_sum, float(num_tokens)], device=engine.device)
    return kl_total / tokens_total


def _kl_sum(logprobs: Tensor, row: JudgedRow) -> float:
    return kl_k3(logprobs=logprobs, reference_logprobs=row.reference.logprobs).double().sum().item()
