"""Which windows a step trains on: a pure function of the step, so that resuming needs no state of the data."""

import functools
import math
from dataclasses import dataclass

import torch

from pipeline.data.packed import PackedTokens
from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """The windows of each step, in order, over one epoch, or over as many reshuffled epochs as the steps need.

    With `shuffle_seed` None the data is read once, as it lies. Otherwise epoch e is the permutation of seed + e.
    """

    data: PackedTokens
    global_batch_size: int
    num_steps: int
    shuffle_seed: int | None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one global batch."""
        return self.global_batch_size * self.data.sequence_length

    @property
    def num_epochs(self) -> float:
        """How often the data is gone through."""
        return self.num_steps * self.global_batch_size / len(self.data)

    def rows(self, step: int) -> list[int]:
        """Return the windows of the step, counted from 0; `global_batch_size` of them."""
        first = step * self.global_batch_size
        positions = range(first, first + self.global_batch_size)
        if self.shuffle_seed is None:
            return list(positions)
        return [self._shuffled_row(position) for position in positions]

    def _shuffled_row(self, position: int) -> int:
        epoch, index = divmod(position, len(self.data))
        assert self.shuffle_seed is not None
        return _permutation(len(self.data), self.shuffle_seed + epoch)[index]


def plan_batches(
    data: PackedTokens, *, tokens: int, global_batch_size: int, shuffle_seed: int | None, what: str
) -> BatchPlan:
    """Return the plan of a training of `tokens` tokens; what is left of an incomplete last step is not trained on.

    Raises:
        DataError: when the tokens do not fill one step, or exceed data that is to be read once.
    """
    tokens_per_step = global_batch_size * data.sequence_length
    num_steps = tokens // tokens_per_step
    if num_steps == 0:
        raise DataError(
            f"{what}.tokens is {tokens:,}, one step is {tokens_per_step:,} tokens (global_batch_size "
            f"{global_batch_size} x {data.sequence_length:,} tokens): raise the tokens or lower the batch"
        )
    if len(data) == 0:
        raise DataError(f"{what} has no windows to train on: raise the tokens of its data in the recipe")
    if shuffle_seed is None and num_steps * global_batch_size > len(data):
        raise DataError(
            f"{what}.tokens is {tokens:,}, the data holds {data.num_tokens:,} tokens and is read once: "
            "enlarge the mixture or train on fewer tokens"
        )
    return BatchPlan(data=data, global_batch_size=global_batch_size, num_steps=num_steps, shuffle_seed=shuffle_seed)


def with_replay(blend: PackedTokens, text: PackedTokens, *, share: float, what: str) -> PackedTokens:
    """Return a blend with windows of plain text between its own, evenly, so that they are `share` of all.

    The blend keeps its order; the text is read from its beginning, and again where it is too short.

    Raises:
        DataError: when the text has no windows, or windows of another length.
    """
    num_replayed = math.floor(share / (1 - share) * len(blend) + 0.5)
    if num_replayed == 0:
        return blend
    if len(text) == 0 or text.sequence_length != blend.sequence_length:
        raise DataError(
            f"{what}.replay_share is {share:g}: the pre-training mixture has {len(text):,} windows of "
            f"{text.sequence_length:,} tokens, the blend windows of {blend.sequence_length:,}; give both the same "
            "sequence_length, or set the share to 0"
        )
    # The k-th of n replayed windows belongs behind (k + 1/2) / n of the blend.
    places = [(index / len(blend), index) for index in range(len(blend))]
    places += [((index + 0.5) / num_replayed, len(blend) + index) for index in range(num_replayed)]
    order = [index for _, index in sorted(places)]
    read = torch.arange(num_replayed) % len(text)
    return PackedTokens(
        tokens_NT=torch.cat([blend.tokens_NT, text.tokens_NT[read]])[order],
        labels_NT=torch.cat([blend.labels_NT, text.labels_NT[read]])[order],
        position_ids_NT=torch.cat([blend.position_ids_NT, text.position_ids_NT[read]])[order],
    )


@functools.lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int) -> list[int]:
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()
