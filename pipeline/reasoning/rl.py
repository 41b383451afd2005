"""The reinforcement-learning loop: sample groups, judge them, update the policy, watch it. Resumes bit for bit.

What a step does depends on (seed, step, rank) and on the weights alone: no state of a random generator outlives it.
The log-probabilities that ratios start from are the trainer's own; how far the sampler's lie from them is reported,
and corrected for by truncated importance weights. Where the reference samples, its own are compared with the sampler's.
"""

import functools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import write_atomically
from pipeline.errors import CheckpointError, DivergedError, RecipeError
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.reasoning.algorithms import JudgedRow, make_units, unit_weight, units_loss
from pipeline.reasoning.curriculum import Batch, plan_curriculum, worth_trying
from pipeline.reasoning.experience import (
    Prompt,
    Rollout,
    collect_rollout,
    draw_prompts,
    is_sampled_by_reference,
    sample_judged,
    score_rows,
)
from pipeline.reasoning.grpo import kl_k3
from pipeline.reasoning.held_out import held_out_rewards, require_prompts, split_held_out
from pipeline.reasoning.policy import batch_logprobs, batch_rows, by_prompt
from pipeline.reasoning.prompts import RLItem
from pipeline.reasoning.reward_model import RewardModel
from pipeline.reasoning.samplers import Sampler
from pipeline.reasoning.stop_rules import reason_to_stop
from pipeline.recipe import GRPO, RLOO, RPO, OnPolicyDistillation, RLConfig
from pipeline.training.distributed import barrier, sum_across_ranks, told_by_rank_0
from pipeline.training.engine import TrainEngine

_PASS_RATES = "pass_rates.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTraining:
    """What a training left behind: one curve row per step, samples in words, how far it went, and why it ended early.

    `final_kl` is what the curve's column `kl` is, after the last update: KL(policy || reference), nats per token, or
    KL(reference || policy) where the reference samples. `held_out` is what held-out prompts earn then.
    `pass_rates` are those of the starting policy, in the order of the prompts; empty where none were asked for.
    """

    curve: tuple[dict[str, float], ...]
    samples: tuple[dict[str, Any], ...]
    pass_rates: tuple[float, ...]
    final_kl: float
    held_out: dict[str, float]
    num_samples: int
    stopped: str | None


def units_per_update(config: RLConfig, *, world_size: int) -> int:
    """Return on how many units (samples, or pairs of them) one optimizer step is taken, over all ranks.

    Raises:
        RecipeError: when prompts do not divide over ranks, or units over updates.
    """
    if config.prompts_per_step % world_size:
        raise RecipeError(
            f"rl.prompts_per_step is {config.prompts_per_step}, which {world_size} ranks do not divide: "
            f"run with {math.gcd(config.prompts_per_step, world_size)} ranks, or change it"
        )
    units_per_prompt = 1 if isinstance(config.algorithm, RPO) else config.samples_per_prompt
    units_per_rank = config.prompts_per_step // world_size * units_per_prompt
    if units_per_rank % config.updates_per_rollout:
        raise RecipeError(
            f"a rollout has {units_per_rank} {'pairs' if units_per_prompt == 1 else 'samples'} per rank, which "
            f"rl.updates_per_rollout = {config.updates_per_rollout} does not divide: change one of them"
        )
    return config.prompts_per_step * units_per_prompt // config.updates_per_rollout


def train_policy(
    engine: TrainEngine,
    *,
    sampler: Sampler,
    reference: HeterogeneousLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: RewardModel | None,
    items: Sequence[RLItem],
    config: RLConfig,
    work_dir: Path,
    checkpoint_interval_steps: int,
    sample_interval_steps: int,
    reporter: Reporter,
) -> PolicyTraining:
    """Train until `config.steps` or a stop rule, continuing from the newest checkpoint if there is one.

    `sampler` gives the replies of the engine's model as it is at each step.

    Raises:
        DataError: when too few prompts are left to train on.
        DivergedError: when the loss or the gradient is no longer finite.
        CheckpointError: when another sampler made what it would continue from; see also TrainEngine.load_latest.
    """
    trained_items, held_out = split_held_out(items, config=config)
    pass_rates: list[float] = []
    curriculum: list[Batch] | None = None
    if config.difficulty is not None:
        pass_rates = load_or_measure_pass_rates(
            engine,
            trained_items,
            sampler=sampler,
            tokenizer=tokenizer,
            config=config,
            path=work_dir / _PASS_RATES,
            reporter=reporter,
        )
        kept = worth_trying(
            pass_rates,
            min_pass_rate=config.difficulty.min_pass_rate,
            max_pass_rate=config.difficulty.max_pass_rate,
        )
        reporter.note(f"{len(kept)} of {len(trained_items)} prompts are neither too hard nor too easy to learn from")
        require_prompts(len(kept), config=config)
        trained_items = [trained_items[place] for place in kept]
        if config.difficulty.curriculum is not None:
            curriculum = plan_curriculum(
                [pass_rates[place] for place in kept],
                num_steps=config.steps,
                prompts_per_step=config.prompts_per_step,
                config=config.difficulty.curriculum,
                seed=config.seed,
            )
    checkpoints_dir = work_dir / "checkpoints"
    state = engine.load_latest(checkpoints_dir, reporter=reporter) or {
        "sampler": sampler.name,
        "curve": [],
        "samples": [],
    }
    _require_sampler(state["sampler"], now=sampler.name, path=checkpoints_dir)
    sampler.refresh()
    curve: list[dict[str, float]] = state["curve"]
    samples: list[dict[str, Any]] = state["samples"]
    final_kl = math.nan
    held_out_at_end: dict[str, float] = {}
    stopped: str | None = None
    is_distillation = isinstance(config.algorithm, OnPolicyDistillation)
    watch_held_out = functools.partial(
        held_out_rewards,
        engine,
        held_out,
        sampler=sampler,
        tokenizer=tokenizer,
        reward_model=reward_model,
        config=config,
    )
    for step in range(len(curve) + 1, config.steps + 1):
        num_updates_before = engine.num_steps
        watched_held_out = watch_held_out(step=step, before=curve[-1] if curve else None)
        rollout = collect_rollout(
            engine,
            sampler=sampler,
            reference=reference,
            tokenizer=tokenizer,
            reward_model=reward_model,
            prompts=draw_prompts(trained_items, config=config, step=step, curriculum=curriculum),
            config=config,
            step=step,
        )
        tokens_before = int(curve[-1]["tokens"]) if curve else 0
        watched = _watch(rollout, engine=engine, config=config) | watched_held_out
        if curriculum is not None:
            watched["aimed_pass_rate"] = curriculum[step - 1].aimed_pass_rate
        updated = _update(engine, rollout.rows, config=config, step=step)
        sampler.refresh()
        curve.append({"step": step, "tokens": tokens_before + int(watched.pop("num_tokens")), **updated, **watched})
        samples += [{"step": step, **sample} for sample in rollout.samples]
        reporter.step(
            step,
            config.steps,
            what="rollouts",
            **{
                name: curve[-1][name]
                for name in ("reward", "accuracy", "format_rate", "held_out_reward", "kl", "loss", "entropy")
            },
        )
        if step % sample_interval_steps == 1 or sample_interval_steps == 1:
            reporter.note(sample_text(samples[-1]))
        stopped = reason_to_stop(curve, rules=config.stop, is_distillation=is_distillation)
        if step == config.steps or stopped is not None:
            final_kl = _final_kl(engine, rollout.rows, config=config)
            _require_finite(step, config=config, final_kl=final_kl)
            held_out_at_end = watch_held_out(step=step, before=None)
        elif engine.num_steps // checkpoint_interval_steps > num_updates_before // checkpoint_interval_steps:
            engine.save(checkpoints_dir, {"sampler": sampler.name, "curve": curve, "samples": samples})
        if stopped is not None:
            reporter.note(f"stopped at step {step} of {config.steps}: {stopped}")
            break
    return PolicyTraining(
        curve=tuple(curve),
        samples=tuple(samples),
        pass_rates=tuple(pass_rates),
        final_kl=final_kl,
        held_out=held_out_at_end,
        num_samples=len(curve) * config.prompts_per_step * config.samples_per_prompt,
        stopped=stopped,
    )


def load_or_measure_pass_rates(
    engine: TrainEngine,
    items: Sequence[RLItem],
    *,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    config: RLConfig,
    path: Path,
    reporter: Reporter,
) -> list[float]:
    """Return the share of right replies to each item, thinking on, by the policy as training starts.

    Every rank calls this before the first step; they share the items. The file at `path` holds what was measured, so
    that a run which was killed goes on behind it.

    Raises:
        CheckpointError: when another sampler measured it.
    """
    assert config.difficulty is not None
    rates: list[float] = []
    saved = told_by_rank_0(path.read_text(encoding="utf-8") if path.is_file() else "")
    if saved:
        found = json.loads(saved)
        _require_sampler(found["sampler"], now=sampler.name, path=path)
        rates = [float(rate) for rate in found["rates"]]
    size = config.prompts_per_step
    for start in range(len(rates), len(items), size):
        tried = items[start : start + size]
        own = range(engine.rank, len(tried), engine.world_size)
        groups = sample_judged(
            sampler,
            [Prompt(item=tried[place], thinking=True) for place in own],
            eos_token_ids=engine.model.architecture.eos_token_ids,
            tokenizer=tokenizer,
            reward_model=None,
            config=config,
            num_samples=config.difficulty.num_samples,
            seed=("pass rates", config.seed, start, engine.rank),
        )
        num_right = [0.0] * len(tried)
        for place, group in zip(own, groups, strict=True):
            num_right[place] = float(sum(judged.verdict.is_right for judged in group))
        rates += [
            number / config.difficulty.num_samples for number in sum_across_ranks(num_right, device=engine.device)
        ]
        if engine.rank == 0:
            write_atomically(path, json.dumps({"sampler": sampler.name, "rates": rates}).encode())
        reporter.step(len(rates), len(items), what="prompts tried for their pass rate")
    barrier()
    return rates


def sample_text(sample: Mapping[str, Any]) -> str:
    """Return one sampled completion as a line for people: what was asked, said, wanted, and earned."""
    question, completion = (" ".join(str(sample[name]).split()) for name in ("question", "completion"))
    return (
        f"step {sample['step']}, {sample['task']}, thinking {sample['mode']}: {question} -> {completion} "
        f"(wanted {sample['answer']}, reward {sample['reward']:g})"
    )


def _require_sampler(written: str, *, now: str, path: Path) -> None:
    """Refuse to go on from what another sampler's replies left: for one seed, two samplers give different ones."""
    if written != now:
        raise CheckpointError(
            f"{path} was made with the sampler {written}, execution.sampler is {now}: set it to {written} to continue, "
            f"or delete {path.parent} to train from the start"
        )


def _update(engine: TrainEngine, judged: Sequence[JudgedRow], *, config: RLConfig, step: int) -> dict[str, float]:
    """Take the step's optimizer updates, each on its share of the units, and return what they were taken with."""
    units = make_units(judged, algorithm=config.algorithm, num_samples=config.samples_per_prompt)
    shuffled = random.Random(f"{config.seed}/{step}/{engine.rank}").sample(units, len(units))
    # Dealt prompt by prompt: every update has as many samples of each, and those share their prompt's computation.
    dealt = by_prompt(shuffled, row_of=lambda unit: unit[0].row)
    losses, clipped, info = [], [], None
    for number in range(config.updates_per_rollout):
        chosen = dealt[number :: config.updates_per_rollout]
        weight = sum(unit_weight(unit, algorithm=config.algorithm) for unit in chosen)
        num_tokens = sum(len(row.row.completion_ids) for unit in chosen for row in unit)
        totals = sum_across_ranks([weight, float(num_tokens)], device=engine.device)
        total_weight = max(totals[0], 1.0)  # an update of pairs without a preferred one weighs nothing
        sums = [0.0, 0.0]
        for first in range(0, len(chosen), engine.micro_batch_size):
            micro = chosen[first : first + engine.micro_batch_size]
            batch = batch_rows([row.row for unit in micro for row in unit], device=engine.device)
            found = units_loss(
                batch_logprobs(engine.forward, batch, temperature=config.temperature),
                batch,
                micro,
                algorithm=config.algorithm,
                max_importance_weight=config.max_importance_weight,
            )
            engine.backward(found.loss / total_weight)
            sums = [sums[0] + found.loss.item(), sums[1] + found.num_clipped.item()]
        info = engine.step()
        loss_sum, num_clipped = sum_across_ranks(sums, device=engine.device)
        loss = loss_sum / total_weight
        _require_finite(step, config=config, loss=loss, grad_norm=info.grad_norm)
        losses.append(loss)
        clipped.append(num_clipped / totals[1])
    assert info is not None
    return {
        "loss": sum(losses) / len(losses),
        "learning_rate": info.learning_rate,
        "grad_norm": info.grad_norm,
        "clip_fraction": sum(clipped) / len(clipped),
    }


def _require_finite(step: int, *, config: RLConfig, **values: float) -> None:
    if not all(map(math.isfinite, values.values())):
        found = ", ".join(f"{name} {value}" for name, value in values.items())
        anchor = ", or raise rl.algorithm.kl_weight" if isinstance(config.algorithm, GRPO | RLOO) else ""
        raise DivergedError(f"rl step {step} has {found}: lower rl.optimizer.learning_rate{anchor}")


def _watch(rollout: Rollout, *, engine: TrainEngine, config: RLConfig) -> dict[str, float]:
    """Return the monitors of a step over all ranks; token means are over sampled tokens."""
    rows = rollout.rows
    # A sampler is held against the weights it samples with: against others the difference is learning.
    trainers = [row.reference if is_sampled_by_reference(config) else row.old for row in rows]
    sums = {
        "num_samples": float(len(rows)),
        "num_groups": float(rollout.num_groups),
        "num_tokens": float(sum(len(row.row.completion_ids) for row in rows)),
        "reward": sum(row.reward for row in rows),
        "squared_reward": sum(row.reward**2 for row in rows),
        "model_reward": sum(row.model_reward for row in rows),
        "zero_groups": rollout.num_zero_advantage_groups,
        "terminated": sum(row.verdict.is_terminated for row in rows),
        "well_formed": sum(row.verdict.is_well_formed for row in rows),
        "right": sum(row.verdict.is_right for row in rows),
        "verifier_errors": sum(row.verdict.has_verifier_failed for row in rows),
        "kl": sum(_kl_sum(row.old.logprobs, row, config=config) for row in rows),
        "entropy": sum(row.old.entropies.double().sum().item() for row in rows),
        "mismatch": sum(
            (trainer.logprobs - row.sampler_logprobs).abs().double().sum().item()
            for trainer, row in zip(trainers, rows, strict=True)
        ),
    }
    total = dict(
        zip(sums, sum_across_ranks([float(value) for value in sums.values()], device=engine.device), strict=True)
    )
    mean_reward = total["reward"] / total["num_samples"]
    return {
        "num_tokens": total["num_tokens"],
        "reward": mean_reward,
        "reward_std": math.sqrt(max(total["squared_reward"] / total["num_samples"] - mean_reward**2, 0.0)),
        **({"model_reward": total["model_reward"] / total["num_samples"]} if config.reward_model is not None else {}),
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


def _final_kl(engine: TrainEngine, judged: Sequence[JudgedRow], *, config: RLConfig) -> float:
    """Return the KL on the last rollout's tokens, nats per token, after the last update."""
    now = score_rows(engine.model, [row.row for row in judged], config=config, engine=engine)
    kl_sum = sum(_kl_sum(statistics.logprobs, row, config=config) for statistics, row in zip(now, judged, strict=True))
    num_tokens = sum(len(row.row.completion_ids) for row in judged)
    kl_total, tokens_total = sum_across_ranks([kl_sum, float(num_tokens)], device=engine.device)
    return kl_total / tokens_total


def _kl_sum(logprobs: Tensor, row: JudgedRow, *, config: RLConfig) -> float:
    """Return the KL from the model that sampled the row to the other: samples of one give no other direction."""
    sampled_with, other = logprobs, row.reference.logprobs
    if is_sampled_by_reference(config):
        sampled_with, other = other, sampled_with
    return kl_k3(logprobs=sampled_with, reference_logprobs=other).double().sum().item()
