"""Group-relative policy optimisation: advantages within a group and the clipped, KL-anchored token loss. Pure.

Letters: P prompts, S samples of one prompt, B samples, T completion tokens, V vocab_size.

With r_i the reward of sample i of a group and pi_old the policy that sampled it,

    A_i   = r_i - b_i                      b_i: mean reward of the other samples, or of the whole group
    rho_t = pi(y_t) / pi_old(y_t)
    L     = mean over tokens of  -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)  +  kl_weight * k3_t
    k3_t  = q_t - log q_t - 1              q_t = pi_ref(y_t) / pi(y_t); estimates KL(pi || pi_ref), never negative

Differentiated at sampled tokens, as published, k3 pulls as KL(pi_ref || pi) does: over answers with rewards r the
optimum is pi = kl_weight pi_ref / (kl_weight + E[r] - r).

Source: GRPO (DeepSeekMath, section 4.1) as Llama-Nemotron uses it in section 5; k3 after Schulman, "Approximating KL
divergence". The mean is over tokens, so a long answer weighs as much as its tokens do.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Baseline = Literal["leave_one_out", "group_mean"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLoss:
    """Sums over trained tokens; divide by the number of tokens of the whole update for its mean."""

    loss: Tensor
    kl: Tensor
    num_clipped: Tensor


def group_advantages(rewards_PS: Tensor, *, baseline: Baseline, normalise_by_std: bool) -> Tensor:
    """Return the advantage of every sample within its group, [P, S], float32.

    A group in which all rewards are equal has zero advantage throughout, so it teaches nothing; with
    `normalise_by_std` the others are divided by the sample standard deviation (n - 1) of their group.
    """
    rewards_PS = rewards_PS.float()
    num_samples = rewards_PS.shape[1]
    mean_P1 = rewards_PS.mean(dim=1, keepdim=True)
    centred_PS = rewards_PS - mean_P1
    # r_i - (sum - r_i) / (S - 1) = (r_i - mean) * S / (S - 1)
    advantages_PS = centred_PS * (num_samples / (num_samples - 1)) if baseline == "leave_one_out" else centred_PS
    varies_P1 = (rewards_PS != rewards_PS[:, :1]).any(dim=1, keepdim=True)
    if normalise_by_std:
        std_P1 = rewards_PS.std(dim=1, keepdim=True)
        advantages_PS = advantages_PS / torch.where(varies_P1, std_P1, torch.ones_like(std_P1))
    return torch.where(varies_P1, advantages_PS, torch.zeros_like(advantages_PS))


def share_zero_advantage_groups(rewards_PS: Tensor) -> float:
    """Return the share of groups whose rewards are all equal."""
    return (rewards_PS == rewards_PS[:, :1]).all(dim=1).float().mean().item()


def kl_k3(*, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return the k3 estimate of KL(policy || reference) at each token that the policy sampled, nats, elementwise.

    Of tokens that the reference sampled, its mean is chi-squared minus KL, which a few tokens decide; with the two
    models swapped it estimates KL(reference || policy) from them.
    """
    log_ratio = reference_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def clipped_loss(
    *,
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    weights_BT: Tensor,
    trained_BT: Tensor,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
) -> TokenLoss:
    """Return the loss of the module's docstring, summed over the tokens where `trained_BT` is true.

    Advantages may be one per row, [B, 1]. `weights_BT` multiplies the surrogate's gradient token by token. The KL
    only holds the policy back and is not weighted.
    """
    # Padding is taken out before the exponentials: exp of its arbitrary log-ratio can be inf, and inf * 0 is NaN.
    logprobs_BT = logprobs_BT.masked_fill(~trained_BT, 0.0)
    old_logprobs_BT = old_logprobs_BT.masked_fill(~trained_BT, 0.0)
    reference_logprobs_BT = reference_logprobs_BT.masked_fill(~trained_BT, 0.0)
    ratio_BT = torch.exp(logprobs_BT - old_logprobs_BT)
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    surrogate_BT = weights_BT * torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    kl_BT = kl_k3(logprobs=logprobs_BT, reference_logprobs=reference_logprobs_BT)
    is_clipped_BT = clipped_BT * advantages_BT < ratio_BT * advantages_BT
    return TokenLoss(
        loss=((kl_weight * kl_BT - surrogate_BT) * trained_BT).sum(),
        kl=(kl_BT * trained_BT).sum().detach(),
        num_clipped=(is_clipped_BT & trained_BT).sum(),
    )


def importance_weights(*, old_logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, max_weight: float) -> Tensor:
    """Return min(pi_old(y_t) / pi_sampler(y_t), max_weight), [B, T]: what a sampler with other kernels makes of it.

    Truncation bounds the variance at the price of a bias (Ionides 2008, "Truncated importance sampling").
    """
    return torch.exp(old_logprobs_BT - sampler_logprobs_BT).clamp(max=max_weight)


def token_logprobs(logits_BTV: Tensor, *, ids_BT: Tensor, temperature: float) -> Tensor:
    """Return log pi(ids) at each position, [B, T], in float32: bfloat16 has too few digits for a ratio near one."""
    # cross_entropy() keeps one tensor of the logits' size and writes the gradient in one pass over it; a gather and a
    # logsumexp() keep two and take three.
    return -F.cross_entropy(
        _tempered(logits_BTV, temperature).flatten(0, 1), ids_BT.flatten(), reduction="none"
    ).unflatten(0, ids_BT.shape)


def token_statistics(logits_BTV: Tensor, *, ids_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log pi(ids) and the entropy of the distribution at each position, [B, T] each, float32; no gradients."""
    with torch.no_grad():
        logprobs_BTV = _tempered(logits_BTV, temperature).log_softmax(dim=2)
        chosen_BT = logprobs_BTV.gather(2, ids_BT.unsqueeze(2)).squeeze(2)
        return chosen_BT, -torch.linalg.vecdot(logprobs_BTV.exp(), logprobs_BTV)


def _tempered(logits_BTV: Tensor, temperature: float) -> Tensor:
    return logits_BTV.float() if temperature == 1 else logits_BTV.float() / temperature
