"""What one update minimises: GRPO, RLOO, RPO or on-policy distillation, over rows that were sampled and judged. Pure.

Letters: U units, B rows, T completion tokens, P pairs, S samples of a prompt.

A unit is what a loss needs together: one row, or for RPO the best and the worst row of a group. The loss of an update
is a sum over its units divided by their weight over all ranks: tokens, rows, or pairs.

    grpo                     mean over tokens of the clipped surrogate and k3, as in pipeline.reasoning.grpo
    rloo                     mean over rows of  -A_i log pi(y_i),
                             A_i leave-one-out of  r_i - kl_weight log(pi_old / pi_ref)
    rpo                      mean over pairs of a distance between  D = beta (log-ratio of chosen - of rejected)
                             and  D* = reward_scale (r_chosen - r_rejected)
    on_policy_distillation   mean over tokens of the clipped surrogate,  A_t = log pi_teacher(y_t) - log pi_old(y_t)

Sources: RLOO after Ahmadian et al. 2024, section 3; RPO after Sun et al. 2025 ("Reward-aware preference optimization"),
as Llama-Nemotron uses both in section 6; on-policy distillation after Agarwal et al. 2024 (reverse KL, sampled tokens).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.reasoning.grpo import TokenLoss, clipped_loss, group_advantages, importance_weights
from pipeline.reasoning.policy import RowBatch, RowStatistics, SampledRow
from pipeline.reasoning.rewards import Verdict
from pipeline.recipe import GRPO, RLOO, RPO, OnPolicyDistillation, RLAlgorithm, RPODivergence


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedRow:
    """A sampled completion with all that its update needs; log-probabilities are those before the update."""

    row: SampledRow
    sampler_logprobs: Tensor
    verdict: Verdict
    model_reward: float
    reward: float
    advantage: float
    old: RowStatistics
    reference: RowStatistics


Unit = tuple[JudgedRow, ...]


def with_advantages(rows: Sequence[JudgedRow], *, algorithm: RLAlgorithm, num_samples: int) -> list[JudgedRow]:
    """Return rows, group after group of `num_samples`, with the advantage that the algorithm gives each."""
    rewards = torch.tensor([row.reward for row in rows], dtype=torch.float32)
    match algorithm:
        case GRPO():
            baseline, normalise = algorithm.baseline, algorithm.normalise_by_std
        case RLOO():
            log_ratios = [(row.old.logprobs - row.reference.logprobs).sum() for row in rows]
            rewards = rewards - algorithm.kl_weight * torch.stack(log_ratios)
            baseline, normalise = "leave_one_out", False
        case RPO() | OnPolicyDistillation():
            return list(rows)
    advantages_PS = group_advantages(rewards.reshape(-1, num_samples), baseline=baseline, normalise_by_std=normalise)
    return [replace(row, advantage=value) for row, value in zip(rows, advantages_PS.flatten().tolist(), strict=True)]


def make_units(rows: Sequence[JudgedRow], *, algorithm: RLAlgorithm, num_samples: int) -> list[Unit]:
    """Return the units of a rollout whose rows stand group after group; of equal rewards the first is taken."""
    if not isinstance(algorithm, RPO):
        return [(row,) for row in rows]
    units: list[Unit] = []
    for start in range(0, len(rows), num_samples):
        group = rows[start : start + num_samples]
        units.append((max(group, key=lambda row: row.reward), min(group, key=lambda row: row.reward)))
    return units


def unit_weight(unit: Unit, *, algorithm: RLAlgorithm) -> float:
    """Return what a unit counts in the mean; a pair of equal rewards prefers neither, and counts nothing."""
    match algorithm:
        case RPO():
            return float(unit[0].reward > unit[1].reward)
        case RLOO():
            return 1.0
        case GRPO() | OnPolicyDistillation():
            return float(sum(len(row.row.completion_ids) for row in unit))


def units_loss(
    logprobs_BT: Tensor,
    batch: RowBatch,
    units: Sequence[Unit],
    *,
    algorithm: RLAlgorithm,
    max_importance_weight: float,
) -> TokenLoss:
    """Return the loss of a micro-batch summed over its units; row b of the batch is the b-th row of all units."""
    rows = [row for unit in units for row in unit]
    old_BT = batch.spread([row.old.logprobs for row in rows])
    reference_BT = batch.spread([row.reference.logprobs for row in rows])
    advantages_B1 = torch.tensor([[row.advantage] for row in rows], device=logprobs_BT.device)
    weights_BT = importance_weights(
        old_logprobs_BT=old_BT,
        sampler_logprobs_BT=batch.spread([row.sampler_logprobs for row in rows]),
        max_weight=max_importance_weight,
    )
    match algorithm:
        case GRPO():
            return clipped_loss(
                logprobs_BT=logprobs_BT,
                old_logprobs_BT=old_BT,
                reference_logprobs_BT=reference_BT,
                advantages_BT=advantages_B1,
                weights_BT=weights_BT,
                trained_BT=batch.sampled_BK,
                clip_low=algorithm.clip_low,
                clip_high=algorithm.clip_high,
                kl_weight=algorithm.kl_weight,
            )
        case OnPolicyDistillation():
            return clipped_loss(
                logprobs_BT=logprobs_BT,
                old_logprobs_BT=old_BT,
                reference_logprobs_BT=reference_BT,
                advantages_BT=reference_BT - old_BT,
                weights_BT=weights_BT,
                trained_BT=batch.sampled_BK,
                clip_low=algorithm.clip_low,
                clip_high=algorithm.clip_high,
                kl_weight=0.0,
            )
        case RLOO():
            loss = -(weights_BT * advantages_B1 * logprobs_BT * batch.sampled_BK).sum()
        case RPO():
            log_ratios_B = ((logprobs_BT - reference_BT) * batch.sampled_BK).sum(dim=1)
            rewards_B = torch.tensor([row.reward for row in rows], device=logprobs_BT.device)
            loss = rpo_loss(
                chosen_log_ratios_P=log_ratios_B[0::2],
                rejected_log_ratios_P=log_ratios_B[1::2],
                reward_gaps_P=rewards_B[0::2] - rewards_B[1::2],
                algorithm=algorithm,
            )
    none = torch.zeros((), device=logprobs_BT.device)
    return TokenLoss(loss=loss, kl=none, num_clipped=none)


def rpo_loss(
    *, chosen_log_ratios_P: Tensor, rejected_log_ratios_P: Tensor, reward_gaps_P: Tensor, algorithm: RPO
) -> Tensor:
    """Return the summed distance between the policy's preference D and the rewards' D*; pairs without a gap count 0.

    A log-ratio is log pi(y) - log pi_ref(y) of a whole completion. With B(x) the Bernoulli of sigmoid(x):
    squared (D - D*)^2; backward_kl KL(B(D*) || B(D)); forward_kl KL(B(D) || B(D*)).
    """
    preference_P = algorithm.beta * (chosen_log_ratios_P - rejected_log_ratios_P)
    wanted_P = algorithm.reward_scale * reward_gaps_P
    distances: dict[RPODivergence, Callable[[Tensor, Tensor], Tensor]] = {
        "squared": lambda policy, rewards: (policy - rewards) ** 2,
        "backward_kl": lambda policy, rewards: _bernoulli_kl(rewards, policy),
        "forward_kl": _bernoulli_kl,
    }
    return (distances[algorithm.divergence](preference_P, wanted_P) * (reward_gaps_P > 0)).sum()


def _bernoulli_kl(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(B(first) || B(second)) of Bernoulli logits; log-sigmoids keep it finite where a probability is 0."""
    p = torch.sigmoid(first)
    return p * (F.logsigmoid(first) - F.logsigmoid(second)) + (1 - p) * (F.logsigmoid(-first) - F.logsigmoid(-second))
