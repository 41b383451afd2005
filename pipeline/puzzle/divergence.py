"""How far a changed model's predictions are from its parent's, summed over tokens from final hidden states.

    kl               mean over tokens of KL(P || Q) = sum_v p (log p - log q)    P the parent's next-token distribution
    lm_loss          mean over predicted tokens of -log q(next token)
    hidden_cosine    mean over tokens of 1 - cos(h_p, h_q), h the states that the head reads
    top1_error       share of tokens at which the parent's likeliest next token is not the likeliest
    task_error       share of wrong answers to the recipe's task, where it has one (pipeline.puzzle.score_functions)

Letters: B rows, T tokens, V vocab_size, S tokens in a slice or a piece of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipeline.data.packed import IGNORED_LABEL
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM

# Logits are held for this many tokens at a time, 96 MiB of 49,152 words in float32. A CPU multiplied 128 at a time at
# 0.73 of the rate of 512, and 1,024 hardly faster.
SLICE_TOKENS = 512
# On a CPU what follows the logits is bound by memory: a piece of 32 tokens stays in cache from one pass over it to the
# next, which takes half the time of passes over the whole slice. A GPU would only start more kernels.
PIECE_TOKENS = 32
# What the parent says is the same for every candidate. 1 GiB holds it for 2,700 tokens and 49,152 words.
MAX_KEPT_BYTES = 2**30


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ParentSlice:
    """What the parent says at some tokens; the normaliser is the log of the sum of the logits' exponentials."""

    logits_SV: Tensor
    normaliser_S1: Tensor
    probability_SV: Tensor
    top_S: Tensor

    @classmethod
    def of(cls, logits_SV: Tensor) -> Self:
        """Return it from float32 logits."""
        probability_SV = logits_SV.log_softmax(dim=-1)
        # log_softmax() is at hand and logsumexp() takes 7 times as long on a CPU; argmax() 1.6 times as long as max().
        normaliser_S1 = logits_SV[:, :1] - probability_SV[:, :1]
        return cls(
            logits_SV=logits_SV,
            normaliser_S1=normaliser_S1,
            probability_SV=probability_SV.exp_(),
            top_S=logits_SV.max(dim=-1).indices,
        )

    def piece(self, tokens: slice) -> "ParentSlice":
        """Return some of its tokens."""
        return ParentSlice(
            logits_SV=self.logits_SV[tokens],
            normaliser_S1=self.normaliser_S1[tokens],
            probability_SV=self.probability_SV[tokens],
            top_S=self.top_S[tokens],
        )


class ParentSlices:
    """The parent's slices by their first token, made when first asked for; the first are kept, up to MAX_KEPT_BYTES."""

    def __init__(self) -> None:
        self._kept: dict[int, ParentSlice] = {}
        self._num_bytes = 0

    def get(self, first_token: int, logits_SV: Callable[[], Tensor]) -> ParentSlice:
        """Return the slice; its logits are asked for where it is not kept."""
        kept = self._kept.get(first_token)
        if kept is None:
            kept = ParentSlice.of(logits_SV().float())
            num_bytes = kept.logits_SV.nbytes + kept.probability_SV.nbytes
            if self._num_bytes + num_bytes <= MAX_KEPT_BYTES:
                self._kept[first_token] = kept
                self._num_bytes += num_bytes
        return kept


def add_divergences(
    sums: Sequence[DivergenceSums],
    model: HeterogeneousLlamaForCausalLM,
    finals: Sequence[Tensor],
    parent_BTD: Tensor,
    labels_BT: Tensor,
    *,
    parent_slices: ParentSlices,
    first_token: int,
) -> None:
    """Add what each model's states behind its last layer (`finals`, before the norm) say about the same rows.

    With logits z, their difference d = z_q - z_p and its mean m = sum_v p d,

        KL(P || Q) = log sum_v p e^(d - m) = log(1 + sum_v p (e^(d - m) - 1))    log q = log p + d - m - KL

    The sum is never below 0 and as small as KL itself, so nothing cancels, whatever all logits moved by together; one
    exponential over the vocabulary is all that a model costs beyond its logits.

    Args:
        sums: of each model, to be added to.
        model: the parent, whose norm and head all share.
        finals: each model's states.
        parent_BTD: the parent's own.
        labels_BT: the tokens, those that are not predicted marked.
        parent_slices: what earlier calls on the same tokens kept of the parent.
        first_token: the place of these rows among all tokens, by which that is found.
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
        parent = parent_slices.get(first_token + start, lambda part=part: model.lm_head(parent_hidden[part]))
        for one, final in zip(sums, hidden, strict=True):
            logits_SV = model.lm_head(final[part]).float()
            size = PIECE_TOKENS if logits_SV.device.type == "cpu" else len(logits_SV)
            for place in range(0, len(logits_SV), size):
                piece = slice(place, place + size)
                _add_piece(one, logits_SV[piece], parent.piece(piece), next_all[part][piece])


def _add_piece(sums: DivergenceSums, logits_SV: Tensor, parent: ParentSlice, next_S: Tensor) -> None:
    """Add one model's KL, loss and disagreements at some tokens; overwrites its logits."""
    # Of a tie the parent's is one; max() with its indices takes five times as long as amax().
    agrees_S = _at(logits_SV, parent.top_S) >= logits_SV.amax(dim=-1)
    change_SV = logits_SV.sub_(parent.logits_SV)
    scratch_SV = torch.mul(parent.probability_SV, change_SV)
    change_SV -= scratch_SV.sum(dim=-1, keepdim=True)
    torch.expm1(change_SV, out=scratch_SV)
    kl_S = scratch_SV.mul_(parent.probability_SV).sum(dim=-1).log1p()
    if not bool(kl_S.isfinite().all()):
        # e^88 is the largest float32; a model whose logits moved further apart takes the slower, safe sum.
        kl_S = (change_SV + parent.logits_SV - parent.normaliser_S1).logsumexp(dim=-1)
    target_S = _at(change_SV, next_S) + _at(parent.logits_SV, next_S) - parent.normaliser_S1[:, 0]
    is_predicted_S = next_S != IGNORED_LABEL
    sums.kl += kl_S.double().sum().item()
    sums.lm_loss += (kl_S - target_S)[is_predicted_S].double().sum().item()
    sums.num_disagreements += len(agrees_S) - int(agrees_S.sum())
    sums.num_tokens += len(kl_S)
    sums.num_predicted += int(is_predicted_S.sum())


def _at(values_SV: Tensor, tokens_S: Tensor) -> Tensor:
    """Return each row's value at its token; at token 0 where there is none."""
    return values_SV.gather(-1, tokens_S.clamp(min=0)[:, None])[:, 0]
