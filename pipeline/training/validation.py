"""What a training is judged by: loss or divergence on windows that nothing trains on, before and after.

Every rank measures all of them: they are few, and under ZeRO 3 the ranks must run the model together.
"""

from collections.abc import Callable, Iterator

import torch

from pipeline.data.packed import IGNORED_LABEL, PackedTokens
from pipeline.errors import DataError
from pipeline.training.losses import TokenSum, cross_entropy, kl_divergence
from pipeline.training.objectives import Batch, RunModel, take_batch


def validation_rows(data: PackedTokens, *, max_rows: int) -> PackedTokens:
    """Return the first windows of a validation split: always the same ones."""
    return data.take(min(max_rows, len(data)) * data.sequence_length)


def mean_cross_entropy(model: RunModel, data: PackedTokens, *, batch_size: int, device: torch.device) -> float:
    """Return the next-token loss per trained token, in nats."""
    return _mean(
        lambda batch: cross_entropy(model(**batch.model_inputs()).logits, batch.labels_BT),
        data,
        batch_size=batch_size,
        device=device,
    )


def mean_kl(
    student: RunModel, data: PackedTokens, *, teacher: RunModel, batch_size: int, device: torch.device
) -> float:
    """Return KL(teacher || student) per token, in nats."""

    def loss(batch: Batch) -> TokenSum:
        teacher_logits_BTV = teacher(**batch.model_inputs()).logits
        student_logits_BTV = student(**batch.model_inputs()).logits
        return kl_divergence(student_logits_BTV, teacher_logits_BTV, batch.labels_BT != IGNORED_LABEL)

    return _mean(loss, data, batch_size=batch_size, device=device)


def require_masked(data: PackedTokens, *, what: str) -> float:
    """Return the share of tokens that carry loss, in a set where prompts must not and answers must.

    Raises:
        DataError: when none or all of them do.
    """
    share = data.num_trained_tokens / data.num_tokens
    if not 0 < data.num_trained_tokens < data.labels_NT[:, 1:].numel():
        raise DataError(
            f"{what}: {data.num_trained_tokens:,} of {data.num_tokens:,} tokens carry loss; wanted some, and not all: "
            "the mask must keep the assistant's tokens and drop the prompts; check the chat template"
        )
    return share


@torch.no_grad()
def _mean(loss: Callable[[Batch], TokenSum], data: PackedTokens, *, batch_size: int, device: torch.device) -> float:
    total = num_tokens = 0.0
    for batch in _batches(data, batch_size=batch_size, device=device):
        part = loss(batch)
        total += float(part.total)
        num_tokens += float(part.num_tokens)
    return total / num_tokens


def _batches(data: PackedTokens, *, batch_size: int, device: torch.device) -> Iterator[Batch]:
    for first in range(0, len(data), batch_size):
        yield take_batch(data, range(first, min(first + batch_size, len(data))), device=device)
