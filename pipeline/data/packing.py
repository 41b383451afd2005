"""From token sequences to windows of equal length: documents cut where a window ends, samples kept whole. No files.

Letters: N windows, T tokens per window, S tokens in a stretch of one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.chat import ChatSample
from pipeline.data.packed import IGNORED_LABEL, Int32Windows, PackedTokens
from pipeline.errors import DataError


def pack_documents(
    documents: Iterable[Sequence[int] | NDArray[np.int32]],
    *,
    rows: Sequence[int],
    sequence_length: int,
    separator_id: int,
) -> PackedTokens:
    """Join documents, each followed by the separator, and cut the stream into as many windows as there are `rows`.

    The k-th window of the stream becomes window rows[k], as soon as it is full; what is left over is dropped. Every
    token carries loss and positions run from 0 to T-1: attention may look into the document before, as in pre-training.

    Raises:
        DataError: when the documents do not fill the windows.
    """
    num_tokens = len(rows) * sequence_length
    tokens_NT = np.empty((len(rows), sequence_length), dtype=np.int32)
    separator_S = np.array([separator_id], dtype=np.int32)
    num_filled = 0
    for document in documents:
        stretch_S = np.concatenate([np.asarray(document, dtype=np.int32), separator_S])[: num_tokens - num_filled]
        while len(stretch_S):
            window, start = divmod(num_filled, sequence_length)
            part_S = stretch_S[: sequence_length - start]
            tokens_NT[rows[window], start : start + len(part_S)] = part_S
            num_filled += len(part_S)
            stretch_S = stretch_S[len(part_S) :]
    if num_filled < num_tokens:
        raise DataError(f"{len(rows):,} windows of {sequence_length:,} tokens asked of {num_filled:,} tokens")
    held_NT = Int32Windows.of(torch.from_numpy(tokens_NT))
    # Labels and position ids follow from these: one tensor is both, and a row of positions stands for all.
    positions_NT = torch.arange(sequence_length, dtype=torch.int32).expand(held_NT.shape)
    return PackedTokens(tokens_NT=held_NT, labels_NT=held_NT, position_ids_NT=Int32Windows.of(positions_NT))


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePacking:
    """Samples in windows; `dropped` are the indices of those that no window can hold."""

    packed: PackedTokens
    dropped: tuple[int, ...]
    num_padding_tokens: int


def pack_samples(samples: Sequence[ChatSample], *, sequence_length: int, pad_id: int) -> SamplePacking:
    """Put each sample, whole, into the first window with room for it, in the given order (greedy first fit).

    Position ids restart with every sample, which keeps samples from seeing each other. Labels are -100 on tokens that
    are not trained and on each sample's first token, which nothing precedes. Padding forms a segment of its own at the
    end of a window: `pad_id` with label -100, masked by place and not by id.
    """
    windows: list[list[int]] = []
    rooms = _Rooms(len(samples), room=sequence_length)
    dropped: list[int] = []
    for index, sample in enumerate(samples):
        if len(sample.ids) > sequence_length:
            dropped.append(index)
            continue
        window = rooms.take(len(sample.ids))
        if window == len(windows):
            windows.append([])
        windows[window].append(index)
    tokens_NT = np.full((len(windows), sequence_length), pad_id, dtype=np.int32)
    labels_NT = np.full_like(tokens_NT, IGNORED_LABEL)
    position_ids_NT = np.empty_like(tokens_NT)
    places_T = np.arange(sequence_length, dtype=np.int32)
    num_padding_tokens = 0
    for row, indices in enumerate(windows):
        start = 0
        for index in indices:
            # numpy reads a tuple of 600 numbers in a tenth of the time that torch.tensor() takes.
            ids_S = np.array(samples[index].ids, dtype=np.int32)
            is_trained_S = np.array(samples[index].trained_mask)
            is_trained_S[0] = False
            end = start + len(ids_S)
            tokens_NT[row, start:end] = ids_S
            labels_NT[row, start:end] = np.where(is_trained_S, ids_S, IGNORED_LABEL)
            position_ids_NT[row, start:end] = places_T[: len(ids_S)]
            start = end
        position_ids_NT[row, start:] = places_T[: sequence_length - start]
        num_padding_tokens += sequence_length - start
    packed = PackedTokens(
        tokens_NT=Int32Windows.of(torch.from_numpy(tokens_NT)),
        labels_NT=Int32Windows.of(torch.from_numpy(labels_NT)),
        position_ids_NT=Int32Windows.of(torch.from_numpy(position_ids_NT)),
    )
    return SamplePacking(packed=packed, dropped=tuple(dropped), num_padding_tokens=num_padding_tokens)


class _Rooms:
    """The room left in each of as many windows as there may be, in a tree whose nodes hold the most below them."""

    def __init__(self, num_windows: int, *, room: int) -> None:
        self._num_leaves = 1 << num_windows.bit_length()
        # Node n has the children 2n and 2n + 1; the leaves come last.
        self._most = [room] * (2 * self._num_leaves)

    def take(self, length: int) -> int:
        """Return the first window with room for `length`, which is no more than a whole one's, and make it less."""
        node = 1
        while node < self._num_leaves:
            node *= 2
            if self._most[node] < length:
                node += 1
        window = node - self._num_leaves
        self._most[node] -= length
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return window
