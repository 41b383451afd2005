"""Losses against torch.distributions, torch's own losses and autograd in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data.packed import IGNORED_LABEL
from pipeline.training import losses
from pipeline.training.losses import cosine_loss, cross_entropy, kl_divergence


def _logits(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kl_matches_torch_distributions_in_value_and_gradient():
    student = _logits(2, 3, 11, seed=0).requires_grad_()
    teacher = _logits(2, 3, 11, seed=1)
    mask = torch.tensor([[True, False, True], [True, True, False]])

    kl = kl_divergence(student, teacher, mask)
    (gradient,) = torch.autograd.grad(kl.mean, student)

    expected = torch_kl(Categorical(logits=teacher), Categorical(logits=student))[mask].mean()
    (expected_gradient,) = torch.autograd.grad(expected, student)
    assert int(kl.num_tokens) == 4
    torch.testing.assert_close(kl.mean, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_kl_over_several_chunks_equals_the_unchunked_sum():
    vocab_size = losses._CHUNK_NUM_ELEMENTS // 16
    student = _logits(1, 50, vocab_size, seed=2).float().requires_grad_()
    teacher = _logits(1, 50, vocab_size, seed=3).float()
    mask = torch.ones(1, 50, dtype=torch.bool)

    total = kl_divergence(student, teacher, mask).total
    (gradient,) = torch.autograd.grad(total, student)

    reference = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(reference, student)
    torch.testing.assert_close(total, reference)
    torch.testing.assert_close(gradient, expected_gradient)


def test_cross_entropy_matches_torch_in_value_and_gradient():
    logits = _logits(2, 5, 13, seed=4).requires_grad_()
    labels = torch.tensor([[1, 2, IGNORED_LABEL, 4, 5], [IGNORED_LABEL, IGNORED_LABEL, 7, 8, 12]])

    loss = cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(loss.total, logits)

    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    (expected_gradient,) = torch.autograd.grad(reference, logits)
    assert int(loss.num_tokens) == 6
    torch.testing.assert_close(loss.total, reference)
    torch.testing.assert_close(gradient, expected_gradient)


def test_cosine_loss_adds_layers_and_averages_tokens():
    student = [_logits(2, 3, 4, seed=5).requires_grad_(), _logits(2, 3, 4, seed=6)]
    teacher = [_logits(2, 3, 4, seed=7), _logits(2, 3, 4, seed=8)]
    mask = torch.tensor([[True, True, False], [False, True, True]])

    loss = cosine_loss(student, teacher, mask)

    by_hand = 0.0
    for student_BTD, teacher_BTD in zip(student, teacher, strict=True):
        for row, token in mask.nonzero().tolist():
            a, b = student_BTD[row, token].detach(), teacher_BTD[row, token]
            by_hand += 1 - float(a @ b / (a.norm() * b.norm()))
    assert loss.mean.item() == pytest.approx(by_hand / 4)
    assert loss.total.requires_grad


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_logit_losses_hold_fp32_copies_of_one_chunk_only(loss: str):
    num_tokens, vocab_size = 64, losses._CHUNK_NUM_ELEMENTS // 16
    logits = torch.zeros(1, num_tokens, vocab_size, dtype=torch.bfloat16, requires_grad=True)
    with _LargestTensor() as largest:
        if loss == "kl":
            total = kl_divergence(logits, logits.detach(), torch.ones(1, num_tokens, dtype=torch.bool)).total
        else:
            total = cross_entropy(logits, torch.ones(1, num_tokens, dtype=torch.long)).total
        total.backward()
    assert largest.num_fp32_elements <= losses._CHUNK_NUM_ELEMENTS


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest fp32 tensor that any operation returned."""

    num_fp32_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.num_fp32_elements = max(self.num_fp32_elements, tensor.numel())
        return result
