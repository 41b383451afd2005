"""How far a changed model's predictions are from its parent's, summed over tokens from final hidden states.

    kl               mean over tokens of KL(P || Q) = sum_v p (log p - log q)    P the parent's next-token distribution
    lm_loss          mean over predicted tokens of -log q(next token)
    hidden_cosine    mean over tokens of 1 - cos(h_p, h_q), h the states that the head reads
    top1_error       share of tokens at which the likeliest next token is another
    task_error       share of wrong answers to the recipe's task, where it has one (pipeline.puzzle.score_functions)

Letters: B rows, T tokens, V vocab_size, S tokens in a slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.packed import IGNORED_LABEL
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM

# Logits are held for this many tokens at a time: 128 x 49,152 float32 values are 24 MiB.
SLICE_TOKENS = 128
# e^80 is just below the largest float32; a model whose logits moved further apart takes the slower, safe sum.
LARGEST_CHANGE = 80.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """The measures of one model, all but the task's on `num_tokens` tokens; None where there is no task."""

    kl: float
    lm_loss: float
    hidden_cosine: float
    top1_error: float
    num_tokens: int
    task_error: float | None = None


@dataclass(slots=True)
class DivergenceSums:
    """Sums over tokens of one model, added up group by group."""

    kl: float = 0.0
    lm_loss: float = 0.0
    hidden_cosine: float = 0.0
    num_disagreements: int = 0
    num_tokens: int = 0
    num_predicted: int = 0

    @property
    def measures(self) -> dict[str, float]:
        """The measures of the tokens added so far, by their names in Divergence."""
        return {
            "kl": self.kl / self.num_tokens,
            "lm_loss": self.lm_loss / self.num_predicted,
            "hidden_cosine": self.hidden_cosine / self.num_tokens,
            "top1_error": self.num_disagreements / self.num_tokens,
            "num_tokens": self.num_tokens,
        }


def add_divergences(
    sums: Sequence[DivergenceSums],
    model: HeterogeneousLlamaForCausalLM,
    finals: Sequence[Tensor],
    parent_BTD: Tensor,
    labels_BT: Tensor,
) -> None:
    """Add what each model's states behind its last layer (`finals`, before the norm) say about the same rows.

    With logits z, their difference d = z_q - z_p and its mean m = sum_v p d,

        KL(P || Q) = log sum_v p e^(d - m) = log(1 + sum_v p (e^(d - m) - 1))    log q = log p + d - m - KL

    The sum is never below 0 and as small as KL itself, so nothing cancels, whatever all logits moved by together; one
    exponential over the vocabulary is all that a model costs beyond its logits.
    """
    next_BT = torch.full_like(labels_BT, IGNORED_LABEL)
    next_BT[:, :-1] = labels_BT[:, 1:]
    next_all = next_BT.flatten().to(parent_BTD.device)
    parent_hidden = model.model.norm(parent_BTD).flatten(0, 1)
    hidden = [model.model.norm(final_BTD).flatten(0, 1) for final_BTD in finals]
    for one, final in zip(sums, hidden, strict=True):
        # In float32: the cosine of two bf16 vectors that hardly differ rounds to 1.
        cosine = torch.nn.functional.cosine_similarity(parent_hidden.float(), final.float(), dim=-1)
        one.hidden_cosine += (1 - cosine).double().sum().item()
    for start in range(0, len(next_all), SLICE_TOKENS):
        part = slice(start, start + SLICE_TOKENS)
        next_S = next_all[part]
        is_predicted_S = next_S != IGNORED_LABEL
        parent_SV = model.lm_head(parent_hidden[part]).float()
        # max() with its indices: argmax() took 1.6 times as long on a CPU, and logsumexp() 7 times log_softmax().
        parent_top_S = parent_SV.max(dim=-1).indices
        log_probability_SV = parent_SV.log_softmax(dim=-1)
        probability_SV = log_probability_SV.exp()
        parent_target_S = _at(log_probability_SV, next_S)
        for one, final in zip(sums, hidden, strict=True):
            change_SV = model.lm_head(final[part]).float()
            one.num_disagreements += int((change_SV.max(dim=-1).indices != parent_top_S).sum())
            change_SV -= parent_SV
            change_SV -= torch.linalg.vecdot(probability_SV, change_SV)[:, None]
            target_S = _at(change_SV, next_S) + parent_target_S
            kl_S = _log_mean_exp(change_SV, probability_SV, log_probability_SV)
            one.kl += kl_S.double().sum().item()
            one.lm_loss += (kl_S - target_S)[is_predicted_S].double().sum().item()
            one.num_tokens += len(next_S)
            one.num_predicted += int(is_predicted_S.sum())


def _at(values_SV: Tensor, tokens_S: Tensor) -> Tensor:
    """Return each row's value at its token; at token 0 where there is none."""
    return values_SV.gather(-1, tokens_S.clamp(min=0)[:, None])[:, 0]


def _log_mean_exp(change_SV: Tensor, probability_SV: Tensor, log_probability_SV: Tensor) -> Tensor:
    """Return log sum_v p e^d; overwrites `change_SV`."""
    if change_SV.max() > LARGEST_CHANGE:
        return (change_SV + log_probability_SV).logsumexp(dim=-1)
    return torch.linalg.vecdot(probability_SV, change_SV.expm1_()).log1p()
