"""From token sequences to windows of equal length: documents cut where a window ends, samples kept whole. No files.

Letters: N windows, T tokens per window.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.chat import ChatSample
from pipeline.data.packed import IGNORED_LABEL, PackedTokens


def pack_documents(documents: Iterable[Sequence[int]], *, sequence_length: int, separator_id: int) -> PackedTokens:
    """Join documents, each followed by the separator, and cut the stream into windows; what is left over is dropped.

    Every token carries loss and positions run from 0 to T-1: attention may look into the document before, as in
    pre-training.
    """
    stream: list[int] = []
    for document in documents:
        stream.extend(document)
        stream.append(separator_id)
    num_windows = len(stream) // sequence_length
    tokens = torch.tensor(stream[: num_windows * sequence_length], dtype=torch.int64)
    return full_windows(tokens.reshape(num_windows, sequence_length))


def full_windows(tokens_NT: Tensor) -> PackedTokens:
    """Return windows in which every token carries loss and attention sees the whole window."""
    return PackedTokens(
        tokens_NT=tokens_NT,
        labels_NT=tokens_NT.clone(),
        position_ids_NT=torch.arange(tokens_NT.shape[1]).expand(tokens_NT.shape).contiguous(),
    )


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
    room: list[int] = []
    open_windows: list[int] = []
    dropped: list[int] = []
    # A window with less room than the shortest sample can take nothing more: leaving it out of the scan changes no
    # placement, and keeps the scan short.
    shortest = min((len(sample.ids) for sample in samples), default=0)
    for index, sample in enumerate(samples):
        length = len(sample.ids)
        if length > sequence_length:
            dropped.append(index)
            continue
        window = next((window for window in open_windows if room[window] >= length), None)
        if window is None:
            window = len(windows)
            windows.append([])
            room.append(sequence_length)
            open_windows.append(window)
        windows[window].append(index)
        room[window] -= length
        if room[window] < shortest:
            open_windows.remove(window)
    tokens_NT = torch.full((len(windows), sequence_length), pad_id, dtype=torch.int64)
    labels_NT = torch.full_like(tokens_NT, IGNORED_LABEL)
    position_ids_NT = torch.zeros_like(tokens_NT)
    for row, indices in enumerate(windows):
        start = 0
        for index in indices:
            sample = samples[index]
            end = start + len(sample.ids)
            ids = torch.tensor(sample.ids)
            is_trained = torch.tensor(sample.trained_mask)
            is_trained[0] = False
            tokens_NT[row, start:end] = ids
            labels_NT[row, start:end] = torch.where(is_trained, ids, IGNORED_LABEL)
            position_ids_NT[row, start:end] = torch.arange(end - start)
            start = end
        position_ids_NT[row, start:] = torch.arange(sequence_length - start)
    packed = PackedTokens(tokens_NT=tokens_NT, labels_NT=labels_NT, position_ids_NT=position_ids_NT)
    return SamplePacking(packed=packed, dropped=tuple(dropped), num_padding_tokens=sum(room))
