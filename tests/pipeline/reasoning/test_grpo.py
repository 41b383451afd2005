"""GRPO: advantages by hand, the loss against its formula and autograd's gradient, k3 against exact KL, and a bandit."""

import math

import pytest
import torch

from pipeline.reasoning.grpo import (
    clipped_loss,
    group_advantages,
    kl_k3,
    share_zero_advantage_groups,
    token_logprobs,
    token_statistics,
)


def test_group_advantages_leave_one_out_matches_hand_computation():
    advantages = group_advantages(
        torch.tensor([[1.0, 0.0, 0.0, 1.0]]), baseline="leave_one_out", normalise_by_std=False
    )
    # The others' means are 1/3 for a winner and 2/3 for a loser.
    assert torch.allclose(advantages, torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3]]))


def test_group_advantages_group_mean_with_std_matches_hand_computation():
    advantages = group_advantages(torch.tensor([[3.0, 1.0, 2.0]]), baseline="group_mean", normalise_by_std=True)
    # mean 2, sample variance (1 + 1 + 0) / 2 = 1
    assert torch.allclose(advantages, torch.tensor([[1.0, -1.0, 0.0]]))


def test_group_advantages_equal_rewards_teach_nothing():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.0, 1.0, 1.0]])
    for normalise in (False, True):
        advantages = group_advantages(rewards, baseline="leave_one_out", normalise_by_std=normalise)
        assert advantages[0].tolist() == [0.0, 0.0, 0.0]
        assert torch.isfinite(advantages).all()
    assert share_zero_advantage_groups(rewards) == 0.5


def test_group_advantages_groups_do_not_mix():
    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    whole = group_advantages(rewards, baseline="leave_one_out", normalise_by_std=True)
    for index in range(5):
        alone = group_advantages(rewards[index : index + 1], baseline="leave_one_out", normalise_by_std=True)
        assert torch.equal(whole[index : index + 1], alone)
    assert torch.allclose(whole.sum(dim=1), torch.zeros(5), atol=1e-6)


def _formula(
    new: float, old: float, reference: float, advantage: float, *, low: float, high: float, weight: float
) -> float:
    ratio = math.exp(new - old)
    surrogate = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    q = math.exp(reference - new)
    return -surrogate + weight * (q - math.log(q) - 1)


def test_clipped_loss_matches_the_formula_token_by_token():
    generator = torch.Generator().manual_seed(1)
    new, old, reference = (-torch.rand(3, 4, generator=generator, dtype=torch.float64) * 2 for _ in range(3))
    advantages = torch.tensor([1.5, -0.7, 0.0], dtype=torch.float64)
    trained = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)

    got = clipped_loss(
        logprobs_BT=new,
        old_logprobs_BT=old,
        reference_logprobs_BT=reference,
        advantages_BT=advantages.unsqueeze(1),
        weights_BT=torch.ones(()),
        trained_BT=trained,
        clip_low=0.2,
        clip_high=0.28,
        kl_weight=0.3,
    )

    wanted = sum(
        _formula(
            new[b, t].item(),
            old[b, t].item(),
            reference[b, t].item(),
            advantages[b].item(),
            low=0.2,
            high=0.28,
            weight=0.3,
        )
        for b in range(3)
        for t in range(4)
        if trained[b, t]
    )
    assert got.loss.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient", "is_clipped"),
    [
        (1.0, 2.0, -2.0, 0),
        (1.5, 2.0, 0.0, 1),  # already pushed up far enough
        (1.5, -2.0, 3.0, 0),  # went up although it was bad: nothing holds the correction back
        (0.5, -2.0, 0.0, 1),
        (0.5, 2.0, -1.0, 0),
    ],
)
def test_clipped_loss_gradient_stops_where_the_clip_binds(
    ratio: float, advantage: float, gradient: float, is_clipped: int
):
    logprobs = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    loss = clipped_loss(
        logprobs_BT=logprobs,
        old_logprobs_BT=torch.tensor([[-1.0]]),
        reference_logprobs_BT=logprobs.detach(),
        advantages_BT=torch.tensor([[advantage]]),
        weights_BT=torch.ones(()),
        trained_BT=torch.tensor([[True]]),
        clip_low=0.2,
        clip_high=0.28,
        kl_weight=1.0,
    )
    loss.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-5)
    assert loss.num_clipped.item() == is_clipped


def test_clipped_loss_padding_however_extreme_changes_nothing():
    logprobs = torch.tensor([[-1.0, -500.0]], requires_grad=True)
    loss = clipped_loss(
        logprobs_BT=logprobs,
        old_logprobs_BT=torch.tensor([[-1.0, 0.0]]),
        reference_logprobs_BT=torch.tensor([[-1.0, 0.0]]),
        advantages_BT=torch.tensor([[1.0]]),
        weights_BT=torch.ones(()),
        trained_BT=torch.tensor([[True, False]]),
        clip_low=0.2,
        clip_high=0.2,
        kl_weight=0.1,
    )
    loss.loss.backward()
    assert loss.loss.item() == -1.0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]


def test_kl_k3_expectation_is_the_exact_kl():
    generator = torch.Generator().manual_seed(2)
    policy, reference = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    estimates = kl_k3(logprobs=policy, reference_logprobs=reference)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=policy), torch.distributions.Categorical(logits=reference)
    )
    assert (estimates >= 0).all()
    assert (policy.exp() * estimates).sum().item() == pytest.approx(exact.item(), rel=1e-12)


def test_token_logprobs_and_entropies_match_torch_distributions():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[0, 1, 2], [3, 4, 0]])
    oracle = torch.distributions.Categorical(logits=logits / 0.7)
    assert torch.allclose(token_logprobs(logits, ids_BT=ids, temperature=0.7), oracle.log_prob(ids), atol=1e-6)
    logprobs, entropies = token_statistics(logits, ids_BT=ids, temperature=0.7)
    assert torch.allclose(logprobs, oracle.log_prob(ids), atol=1e-6)
    assert torch.allclose(entropies, oracle.entropy(), atol=1e-6)


def _train_bandit(*, kl_weight: float, num_steps: int) -> torch.Tensor:
    """A policy over 4 arms with rewards 0, 0.2, 1, 0.5; returns its probabilities after training."""
    generator = torch.Generator().manual_seed(4)
    rewards = torch.tensor([0.0, 0.2, 1.0, 0.5])
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    reference = torch.zeros(4).log_softmax(0)
    for _ in range(num_steps):
        with torch.no_grad():
            old = logits.log_softmax(0)
            arms = torch.multinomial(old.exp(), 64, replacement=True, generator=generator)
            advantages = group_advantages(
                rewards[arms].reshape(4, 16), baseline="leave_one_out", normalise_by_std=False
            ).flatten()
        for _ in range(2):
            loss = clipped_loss(
                logprobs_BT=logits.log_softmax(0)[arms].unsqueeze(1),
                old_logprobs_BT=old[arms].unsqueeze(1),
                reference_logprobs_BT=reference[arms].unsqueeze(1),
                advantages_BT=advantages.unsqueeze(1),
                weights_BT=torch.ones(()),
                trained_BT=torch.ones(64, 1, dtype=torch.bool),
                clip_low=0.2,
                clip_high=0.28,
                kl_weight=kl_weight,
            )
            optimizer.zero_grad()
            (loss.loss / 64).backward()
            optimizer.step()
    return logits.detach().softmax(0)


def test_bandit_without_anchor_finds_the_best_arm():
    assert _train_bandit(kl_weight=0.0, num_steps=150)[2].item() > 0.97


def test_bandit_with_heavy_anchor_stays_near_its_start():
    probabilities = _train_bandit(kl_weight=5.0, num_steps=150)
    assert probabilities.argmax().item() == 2
    assert probabilities.max().item() < 0.45
