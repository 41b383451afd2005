"""What a model says of sampled completions: log-probabilities and entropies, row by row, and their batches.

Prompts and completions of different lengths stand in one right-padded batch; a causal model needs no mask for that.

Letters: B rows, T tokens, K positions from the first completion token of any row to the end, V vocab_size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.reasoning.grpo import token_statistics


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledRow:
    """A prompt and one completion of it."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBatch:
    """Rows padded on the right. `target_ids_BK` are the last K tokens; `sampled_BK` marks those that were sampled."""

    input_ids_BT: Tensor
    target_ids_BK: Tensor
    sampled_BK: Tensor

    @property
    def logits_to_keep(self) -> int:
        """One more than K: the logits before each target."""
        return self.target_ids_BK.shape[1] + 1

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """Return values of each row's completion tokens in their places, [B, K], zero elsewhere."""
        spread_BK = torch.zeros(self.sampled_BK.shape, dtype=torch.float32, device=self.sampled_BK.device)
        spread_BK[self.sampled_BK] = torch.cat(list(values)).to(spread_BK.device)
        return spread_BK


@dataclass(frozen=True, kw_only=True, slots=True)
class RowStatistics:
    """Log-probability and entropy at each completion token of one row, float32, on the CPU."""

    logprobs: Tensor
    entropies: Tensor


def batch_rows(rows: Sequence[SampledRow], *, device: torch.device) -> RowBatch:
    """Return rows as one batch."""
    width = max(row.num_tokens for row in rows)
    start = min(len(row.prompt_ids) for row in rows)
    input_ids = [[*row.prompt_ids, *row.completion_ids] + [0] * (width - row.num_tokens) for row in rows]
    sampled = [[len(row.prompt_ids) <= place < row.num_tokens for place in range(start, width)] for row in rows]
    input_ids_BT = torch.tensor(input_ids, device=device)
    return RowBatch(
        input_ids_BT=input_ids_BT,
        target_ids_BK=input_ids_BT[:, start:],
        sampled_BK=torch.tensor(sampled, device=device),
    )


def batch_logits(forward: Callable[..., object], batch: RowBatch) -> Tensor:
    """Return the logits that predict the batch's targets, [B, K, V]; `forward` is a causal language model."""
    output = forward(input_ids=batch.input_ids_BT, use_cache=False, logits_to_keep=batch.logits_to_keep)
    return output.logits[:, :-1]  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def row_statistics(
    forward: Callable[..., object],
    rows: Sequence[SampledRow],
    *,
    temperature: float,
    batch_size: int,
    device: torch.device,
) -> list[RowStatistics]:
    """Return what a model says of every row, without gradients; rows of like length share a batch."""
    found: dict[int, RowStatistics] = {}
    order = sorted(range(len(rows)), key=lambda index: rows[index].num_tokens)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = batch_rows([rows[index] for index in indices], device=device)
        logits_BKV = batch_logits(forward, batch)
        logprobs_BK, entropies_BK = token_statistics(logits_BKV, ids_BT=batch.target_ids_BK, temperature=temperature)
        for place, index in enumerate(indices):
            sampled_K = batch.sampled_BK[place]
            found[index] = RowStatistics(
                logprobs=logprobs_BK[place][sampled_K].cpu(), entropies=entropies_BK[place][sampled_K].cpu()
            )
    return [found[index] for index in range(len(rows))]
