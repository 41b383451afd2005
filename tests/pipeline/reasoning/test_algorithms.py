"""RLOO, RPO and on-policy distillation: losses by hand, and bandits whose optimum has a closed form are reached."""

import math

import pytest
import torch
from pydantic import ValidationError

from pipeline.reasoning.algorithms import JudgedRow, make_units, rpo_loss, unit_weight, units_loss, with_advantages
from pipeline.reasoning.grpo import importance_weights
from pipeline.reasoning.policy import RowStatistics, SampledRow, batch_rows
from pipeline.reasoning.rewards import Verdict
from pipeline.recipe import GRPO, RLOO, RPO, OnPolicyDistillation, RLAlgorithm, RLConfig
from pipeline.recipe_file import load_recipe

CPU = torch.device("cpu")
NO_VERDICT = Verdict(is_terminated=True, accuracy=0.0, is_well_formed=False, has_verifier_failed=False, answer="")


def _row(
    reward: float, *, old: list[float], reference: list[float], sampler: list[float] | None = None, advantage: float = 0
) -> JudgedRow:
    return JudgedRow(
        row=SampledRow(prompt_ids=(9,), completion_ids=tuple(range(len(old)))),
        sampler_logprobs=torch.tensor(old if sampler is None else sampler),
        verdict=NO_VERDICT,
        model_reward=0.0,
        reward=reward,
        advantage=advantage,
        old=RowStatistics(logprobs=torch.tensor(old), entropies=torch.zeros(len(old))),
        reference=RowStatistics(logprobs=torch.tensor(reference), entropies=torch.zeros(len(old))),
    )


def test_rloo_advantages_have_the_kl_in_the_reward():
    algorithm = RLOO(kind="rloo", kl_weight=0.5)
    rows = [
        _row(1.0, old=[-1.0, -2.0], reference=[-1.0, -3.0]),  # 1 - 0.5 * (0 + 1) = 0.5
        _row(0.0, old=[-1.0], reference=[-2.0]),  # 0 - 0.5 * 1 = -0.5
        _row(1.0, old=[-1.0], reference=[-1.0]),  # 1
    ]
    advantages = [row.advantage for row in with_advantages(rows, algorithm=algorithm, num_samples=3)]
    # Each less the mean of the other two: 0.5 - 0.25, -0.5 - 0.75, 1 - 0.
    assert advantages == pytest.approx([0.25, -1.25, 1.0])


def test_rloo_loss_is_minus_advantage_times_log_probability_of_the_whole_row():
    rows = [
        _row(0, old=[-1.0, -2.0], reference=[-1.0, -1.0], advantage=2.0),
        _row(0, old=[-3.0], reference=[-1.0], advantage=-1.0),
    ]
    batch = batch_rows([row.row for row in rows], device=CPU)
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -50.0]], requires_grad=True)
    algorithm = RLOO(kind="rloo", kl_weight=0.0)
    found = units_loss(logprobs, batch, [(row,) for row in rows], algorithm=algorithm, max_importance_weight=2.0)
    assert found.loss.item() == pytest.approx(-2.0 * (-1 - 2) - -1.0 * -3)
    found.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-2.0, -2.0], [1.0, 0.0]]
    assert unit_weight((rows[0],), algorithm=algorithm) == 1.0


def test_importance_weights_are_trainer_over_sampler_and_capped():
    weights = importance_weights(
        old_logprobs_BT=torch.log(torch.tensor([[0.5, 0.2, 0.9]])),
        sampler_logprobs_BT=torch.log(torch.tensor([[0.25, 0.4, 0.1]])),
        max_weight=2.5,
    )
    assert weights.tolist() == [pytest.approx([2.0, 0.5, 2.5])]


def test_importance_weights_scale_the_gradient_of_each_token():
    algorithm = GRPO(
        kind="grpo", baseline="group_mean", normalise_by_std=False, clip_low=0.2, clip_high=0.2, kl_weight=0.0
    )
    row = _row(0, old=[-1.0, -1.0], reference=[-1.0, -1.0], sampler=[-1.0, -1.0 - math.log(3)], advantage=1.0)
    batch = batch_rows([row.row], device=CPU)
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    units_loss(logprobs, batch, [(row,)], algorithm=algorithm, max_importance_weight=2.0).loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [pytest.approx([-1.0, -2.0])]


@pytest.mark.parametrize("divergence", ["squared", "backward_kl", "forward_kl"])
def test_rpo_loss_matches_the_formulas(divergence: str):
    algorithm = RPO.model_validate(
        {"kind": "rpo", "divergence": divergence, "beta": 0.5, "reward_scale": 3.0, "online": True}
    )
    chosen, rejected, gaps = ([1.0, -0.4, 9.0], [-1.0, 0.3, -9.0], [0.6, 0.2, 0.0])
    wanted = 0.0
    for c, r, gap in zip(chosen, rejected, gaps, strict=True):
        if gap == 0:
            continue
        policy, rewards = 0.5 * (c - r), 3.0 * gap
        p, q = (1 / (1 + math.exp(-value)) for value in (policy, rewards))
        wanted += {
            "squared": (policy - rewards) ** 2,
            "backward_kl": q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
            "forward_kl": p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
        }[divergence]
    found = rpo_loss(
        chosen_log_ratios_P=torch.tensor(chosen, dtype=torch.float64),
        rejected_log_ratios_P=torch.tensor(rejected, dtype=torch.float64),
        reward_gaps_P=torch.tensor(gaps, dtype=torch.float64),
        algorithm=algorithm,
    )
    assert found.item() == pytest.approx(wanted, rel=1e-9)


def test_make_units_pairs_the_best_with_the_worst_of_each_group():
    algorithm = RPO(kind="rpo", divergence="squared", beta=1.0, reward_scale=1.0, online=True)
    rows = [_row(reward, old=[-1.0], reference=[-1.0]) for reward in (0.2, 1.0, 0.0, 0.5, 0.5, 0.5)]
    first, second = make_units(rows, algorithm=algorithm, num_samples=3)
    assert [row.reward for row in first] == [1.0, 0.0]
    assert [row.reward for row in second] == [0.5, 0.5]
    assert [unit_weight(unit, algorithm=algorithm) for unit in (first, second)] == [1.0, 0.0]


def test_rloo_with_several_updates_is_refused():
    data = load_recipe("tiny").rl.model_dump()
    with pytest.raises(ValidationError, match="rloo takes one update per rollout"):
        RLConfig.model_validate({**data, "algorithm": {"kind": "rloo", "kl_weight": 0.1}, "updates_per_rollout": 2})


REWARDS = torch.tensor([0.0, 0.2, 1.0, 0.5])
REFERENCE = torch.tensor([0.4, 0.3, 0.1, 0.2]).log()


# Of a sampler that was left behind: it hardly knows the best arm, and the second best twice as well as the policy.
STALE = torch.tensor([0.4, 0.15, 0.05, 0.4]).log()


def _train_bandit(
    algorithm: RLAlgorithm,
    *,
    num_steps: int,
    num_groups: int,
    learning_rate: float,
    sampler: torch.Tensor | None = None,
    max_importance_weight: float = 2.0,
) -> torch.Tensor:
    """A policy over four arms that starts at REFERENCE (uniform for a teacher); returns its last probabilities.

    The policy samples for itself, or a sampler of constant log-probabilities does.
    """
    generator = torch.Generator().manual_seed(4)
    is_taught = isinstance(algorithm, OnPolicyDistillation)
    logits = (torch.zeros(4) if is_taught else REFERENCE.clone()).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=num_steps)
    num_samples = 4
    for _ in range(num_steps):
        with torch.no_grad():
            old = logits.log_softmax(0)
            sampled_with = old if sampler is None else sampler
            arms = torch.multinomial(
                sampled_with.exp(), num_groups * num_samples, replacement=True, generator=generator
            )
        rows = [
            JudgedRow(
                row=SampledRow(prompt_ids=(9,), completion_ids=(arm,)),
                sampler_logprobs=sampled_with[arm : arm + 1],
                verdict=NO_VERDICT,
                model_reward=0.0,
                reward=REWARDS[arm].item(),
                advantage=0.0,
                old=RowStatistics(logprobs=old[arm : arm + 1], entropies=torch.zeros(1)),
                reference=RowStatistics(logprobs=REFERENCE[arm : arm + 1], entropies=torch.zeros(1)),
            )
            for arm in arms.tolist()
        ]
        rows = with_advantages(rows, algorithm=algorithm, num_samples=num_samples)
        units = make_units(rows, algorithm=algorithm, num_samples=num_samples)
        flat = [row.row for unit in units for row in unit]
        batch = batch_rows(flat, device=CPU)
        logprobs = logits.log_softmax(0)[batch.first_ids_B1]
        loss = units_loss(logprobs, batch, units, algorithm=algorithm, max_importance_weight=max_importance_weight).loss
        optimizer.zero_grad()
        (loss / sum(unit_weight(unit, algorithm=algorithm) for unit in units)).backward()
        optimizer.step()
        schedule.step()
    return logits.detach().softmax(0)


def test_bandit_rloo_reaches_the_anchored_optimum():
    # max E[r] - kl_weight KL(pi || ref) has the solution pi = ref exp(r / kl_weight) / Z.
    wanted = (REFERENCE + REWARDS / 0.5).softmax(0)
    found = _train_bandit(RLOO(kind="rloo", kl_weight=0.5), num_steps=200, num_groups=64, learning_rate=0.05)
    assert torch.allclose(found, wanted, atol=0.04)


def test_bandit_grpo_with_a_heavy_anchor_reaches_the_anchored_optimum():
    # k3's gradient on sampled tokens is that of KL(ref || pi), so what is reached is pi = w ref / (w + E[r] - r). Where
    # rewards are small beside w = kl_weight, that is ref exp(r / w) / Z to first order, here within 0.009.
    algorithm = GRPO(
        kind="grpo", baseline="leave_one_out", normalise_by_std=False, clip_low=0.2, clip_high=0.2, kl_weight=2.0
    )
    wanted = (REFERENCE + REWARDS / 2.0).softmax(0)
    exact = wanted
    for _ in range(50):
        exact = 2.0 * REFERENCE.exp() / (2.0 + exact @ REWARDS - REWARDS)
    found = _train_bandit(algorithm, num_steps=150, num_groups=32, learning_rate=0.05)
    assert torch.allclose(found, wanted, atol=0.02)
    assert torch.allclose(found, exact, atol=0.006)


@pytest.mark.parametrize(
    "algorithm",
    [
        GRPO(kind="grpo", baseline="leave_one_out", normalise_by_std=False, clip_low=0.2, clip_high=0.2, kl_weight=0.0),
        RLOO(kind="rloo", kl_weight=0.0),
    ],
    ids=["grpo", "rloo"],
)
def test_bandit_with_a_stale_sampler_finds_the_best_arm_by_importance_weights_alone(algorithm: RLAlgorithm):
    def best_arm(max_importance_weight: float) -> float:
        found = _train_bandit(
            algorithm,
            num_steps=150,
            num_groups=16,
            learning_rate=0.1,
            sampler=STALE,
            max_importance_weight=max_importance_weight,
        )
        return found[2].item()

    # Of 20 at most: 1 / 0.05.
    assert best_arm(20.0) > 0.95
    # Without weights above 1 what the sampler prefers stays.
    assert best_arm(1.0) < 0.5


@pytest.mark.parametrize("divergence", ["squared", "backward_kl", "forward_kl"])
def test_bandit_offline_rpo_reaches_the_same_preference_from_the_references_samples(divergence: str):
    algorithm = RPO.model_validate(
        {"kind": "rpo", "divergence": divergence, "beta": 1.0, "reward_scale": 2.0, "online": False}
    )
    wanted = (REFERENCE + 2.0 * REWARDS).softmax(0)
    found = _train_bandit(algorithm, num_steps=150, num_groups=16, learning_rate=0.05, sampler=REFERENCE)
    assert torch.allclose(found, wanted, atol=0.02)


@pytest.mark.parametrize("divergence", ["squared", "backward_kl"])
def test_bandit_rpo_reaches_the_rewards_own_preference(divergence: str):
    # Every pair is met when beta log(pi / ref) = reward_scale r + constant.
    algorithm = RPO.model_validate(
        {"kind": "rpo", "divergence": divergence, "beta": 1.0, "reward_scale": 2.0, "online": True}
    )
    wanted = (REFERENCE + 2.0 * REWARDS).softmax(0)
    found = _train_bandit(algorithm, num_steps=150, num_groups=16, learning_rate=0.05)
    assert torch.allclose(found, wanted, atol=0.02)


def test_bandit_distillation_reaches_the_teacher():
    algorithm = OnPolicyDistillation(kind="on_policy_distillation", clip_low=0.2, clip_high=0.2)
    found = _train_bandit(algorithm, num_steps=200, num_groups=32, learning_rate=0.05)
    assert torch.allclose(found, REFERENCE.exp(), atol=0.03)
