"""The losses of every training, pure functions of tensors: KL and cross-entropy on logits, cosine on hidden states.

Each returns a TokenSum: the sum over the tokens that count, and how many they are. Who trains divides by the count of
the whole global batch (see pipeline.training.engine); who measures takes `.mean`.

Logits are the largest tensor of a training (49,152 entries a token for SmolLM2), so both logit losses go through them
in chunks of rows and form the gradient, which is known in closed form, on the way: fp32 copies exist for one chunk at a
time.

Letters: B batch, T tokens, D hidden_size, V vocab_size, N = B * T rows, R rows of one chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipeline.data.packed import IGNORED_LABEL

# 16 MiB of fp32 per temporary. Measured on two cores: 2^18 to 2^22 elements equally fast, 2^26 half as fast.
_CHUNK_NUM_ELEMENTS = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSum:
    """A loss summed over tokens, with gradients, and the number of those tokens."""

    total: Tensor
    num_tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean per token, in nats where the loss is."""
        return self.total / self.num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class _ChunkLoss:
    """The loss of some rows, summed, and its gradient with respect to their logits."""

    total: Tensor
    gradient_RV: Tensor


# Rows of a chunk (indices into N) and their logits in fp32 or better -> loss and gradient.
_ChunkFunction = Callable[[Tensor, Tensor], _ChunkLoss]


def kl_divergence(student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, mask_BT: Tensor) -> TokenSum:
    """Return the forward divergence from the teacher, over the tokens where the mask is true.

        KL(p_teacher || q_student) = sum_v p_v (log p_v - log q_v)        gradient by student logits: q - p

    Puzzle, equation 1; temperature 1. Computed in fp32 whatever the logits are; no gradient reaches the teacher.
    """
    teacher_NV = teacher_logits_BTV.detach().flatten(0, -2)

    def chunk_loss(rows_R: Tensor, student_RV: Tensor) -> _ChunkLoss:
        teacher_RV = teacher_NV[rows_R].to(student_RV.dtype)
        log_q_RV = F.log_softmax(student_RV, dim=-1)
        log_p_RV = F.log_softmax(teacher_RV, dim=-1)
        p_RV = log_p_RV.exp()
        total = (p_RV * log_p_RV.sub_(log_q_RV)).sum()
        return _ChunkLoss(total=total, gradient_RV=log_q_RV.exp_().sub_(p_RV))

    return _sum_over_rows(student_logits_BTV, mask_BT, chunk_loss)


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> TokenSum:
    """Return the next-token cross-entropy: position t is asked for the label at t + 1, -100 asks for nothing.

    - log q_t(label_{t+1})        gradient by logits: q - onehot(label)

    Computed in fp32 whatever the logits are.
    """
    targets_BT = next_token_targets(labels_BT)
    targets_N = targets_BT.flatten()

    def chunk_loss(rows_R: Tensor, logits_RV: Tensor) -> _ChunkLoss:
        log_q_RV = F.log_softmax(logits_RV, dim=-1)
        targets_R1 = targets_N[rows_R].unsqueeze(-1)
        total = -log_q_RV.gather(-1, targets_R1).sum()
        ones_R1 = torch.ones_like(targets_R1, dtype=log_q_RV.dtype)
        return _ChunkLoss(total=total, gradient_RV=log_q_RV.exp_().scatter_add_(-1, targets_R1, -ones_R1))

    return _sum_over_rows(logits_BTV, targets_BT != IGNORED_LABEL, chunk_loss)


def next_token_targets(labels_BT: Tensor) -> Tensor:
    """Return what each position must predict: the labels moved one to the left, nothing at the end."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL)


def cosine_loss(
    student_hidden_LBTD: Sequence[Tensor], teacher_hidden_LBTD: Sequence[Tensor], mask_BT: Tensor
) -> TokenSum:
    """Return the cosine distance of matched hidden states: summed over layers, then over the tokens of the mask.

        sum_l (1 - cos(h_student^l, h_teacher^l))

    Puzzle, equation 1. The layers are added, not averaged, as in the paper. Computed in fp32: a cosine near 1 has no
    digits left in bf16.
    """
    distances = [
        1 - F.cosine_similarity(_widened(student_BTD), _widened(teacher_BTD.detach()), dim=-1)
        for student_BTD, teacher_BTD in zip(student_hidden_LBTD, teacher_hidden_LBTD, strict=True)
    ]
    distance_BT = torch.stack(distances).sum(dim=0)
    return TokenSum(total=(distance_BT * mask_BT).sum(), num_tokens=mask_BT.sum())


def _sum_over_rows(logits_BTV: Tensor, mask_BT: Tensor, chunk_loss: _ChunkFunction) -> TokenSum:
    rows_N = mask_BT.flatten().nonzero().squeeze(-1)
    total: Any = _ChunkedLogitLoss.apply(logits_BTV.flatten(0, -2), rows_N, chunk_loss)
    return TokenSum(total=total, num_tokens=mask_BT.sum())


class _ChunkedLogitLoss(torch.autograd.Function):
    """Sums a loss over chunks of rows; the gradient is formed in the forward pass, in the dtype of the logits."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, rows_N: Tensor, chunk_loss: _ChunkFunction) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient_NV = torch.zeros_like(logits_NV) if needs_gradient else None
        total = torch.zeros((), dtype=_wide_dtype(logits_NV), device=logits_NV.device)
        num_rows = max(1, _CHUNK_NUM_ELEMENTS // logits_NV.shape[-1])
        for rows_R in rows_N.split(num_rows):
            chunk = chunk_loss(rows_R, _widened(logits_NV[rows_R]))
            total += chunk.total
            if gradient_NV is not None:
                gradient_NV[rows_R] = chunk.gradient_RV.to(gradient_NV.dtype)
        if gradient_NV is not None:
            ctx.save_for_backward(gradient_NV)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient_NV,) = ctx.saved_tensors
        (grad_total,) = grad_outputs
        return gradient_NV * grad_total.to(gradient_NV.dtype), None, None


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))
