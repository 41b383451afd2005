"""Packed token windows in memory and on disk: what every training and scoring stage reads.

On disk a split is a safetensors file of int32: https://github.com/huggingface/safetensors#format.

Letters: N windows, R windows of a part, T tokens per window.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError

IGNORED_LABEL = -100

_NAMES = ("labels", "position_ids", "tokens")  # in the order in which safetensors lays them out
_LENGTH_BYTES = 8  # of the number at the start of a file that says how long its header is
_PART_TOKENS = 2**20  # whole sets are gone through in parts of about so many

Split = str  # "train", "validation", or long_context_split(...)


def long_context_split(sequence_length: int) -> str:
    """Return the name of a mixture's training windows of that length, beside its `train`."""
    return f"train-{sequence_length}"


def blend_split(name: str) -> Split:
    """Return the name of a toggle dataset's training windows for one blend."""
    return f"train-{name}"


class Int32Windows(Tensor):
    """Whole numbers held as int32, as a rule mapped from a file, that are int64 to whoever computes with them.

    Slices are views of the same kind. A choice of rows is copied as int64; any other operation is one on an int64 copy
    of the view, so nothing that is written to it stays. A training holds the windows of a batch, however large its set.
    """

    @classmethod
    def of(cls, held: Tensor) -> "Int32Windows":
        """Return a view of an int32 tensor."""
        return held.as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation as the class says; called by torch."""
        if func == _GETTERS["dtype"]:
            return torch.int64
        if func in _TOLD_BY_SHAPE:
            return _as_held(func, *args)
        if func is Tensor.__getitem__ and isinstance(args[0], cls):
            part = _as_held(func, *args)
            return cls.of(part) if _is_slice(args[1]) else part.long()
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


# Answered without a copy of everything.
_GETTERS = {name: getattr(Tensor, name).__get__ for name in ("shape", "ndim", "device", "dtype")}
_TOLD_BY_SHAPE = {Tensor.__len__, Tensor.numel, Tensor.size, Tensor.dim, *_GETTERS.values()}


def _as_held(func: Callable[..., Any], *args: Any) -> Any:
    """Run an operation on the int32 values: with no types to ask, it does not come back to Int32Windows."""
    return Tensor.__torch_function__(func, (), args)


def _is_slice(index: Any) -> bool:
    return all(isinstance(one, (int, slice)) for one in (index if isinstance(index, tuple) else (index,)))


def _widened(value: Any) -> Any:
    if isinstance(value, Int32Windows):
        return _as_held(Tensor.long, value)
    if isinstance(value, (list, tuple)):
        values = map(_widened, value)
        return list(values) if isinstance(value, list) else tuple(values)
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTokens:
    """Windows of tokens, int64, shape (N, T); Int32Windows where they are many.

    Labels stand at the token they name, as in Hugging Face models: position t predicts `labels_NT[:, t + 1]`, so the
    first label of a window is never asked for. -100 carries no loss. Position ids restart at 0 where attention must not
    look further back.
    """

    tokens_NT: Tensor
    labels_NT: Tensor
    position_ids_NT: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("labels", self.labels_NT), ("position ids", self.position_ids_NT)):
            if tensor.shape != self.tokens_NT.shape:
                raise ValueError(f"{name} have shape {tuple(tensor.shape)}, tokens {tuple(self.tokens_NT.shape)}")

    def __len__(self) -> int:
        """Return the number of windows."""
        return self.tokens_NT.shape[0]

    @property
    def sequence_length(self) -> int:
        """Tokens per window."""
        return self.tokens_NT.shape[1]

    @property
    def num_tokens(self) -> int:
        """All tokens, padding included."""
        return self.tokens_NT.numel()

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that carry loss after the shift by one."""
        return sum(int((labels_RT[:, 1:] != IGNORED_LABEL).sum()) for labels_RT in _parts(self.labels_NT))

    def take(self, num_tokens: int) -> "PackedTokens":
        """Return the first windows that together hold at least `num_tokens` tokens, as views of these.

        Raises:
            DataError: when there are fewer.
        """
        num_windows = math.ceil(num_tokens / self.sequence_length)
        if num_windows > len(self):
            raise DataError(
                f"{num_tokens:,} tokens asked of a set of {self.num_tokens:,} ({len(self):,} windows of "
                f"{self.sequence_length:,}): ask for fewer, or enlarge the mixture in the recipe"
            )
        return self.rows(slice(num_windows))

    def rows(self, rows: slice) -> "PackedTokens":
        """Return these windows, as views."""
        return PackedTokens(
            tokens_NT=self.tokens_NT[rows],
            labels_NT=self.labels_NT[rows],
            position_ids_NT=self.position_ids_NT[rows],
        )


def save_packed(directory: Path, split: Split, packed: PackedTokens) -> Path:
    """Write one split as int32 safetensors and return its path."""
    path = directory / f"{split}.safetensors"
    directory.mkdir(parents=True, exist_ok=True)
    # In a file of another name first: somebody may have the old one mapped.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(_header(packed))
        for tensor_NT in (packed.labels_NT, packed.position_ids_NT, packed.tokens_NT):
            for part_RT in _parts(tensor_NT):
                file.write(part_RT.to(torch.int32).contiguous().numpy().data)
    temporary.replace(path)
    return path


def load_packed(directory: Path, split: Split) -> PackedTokens:
    """Map one split of a mixture or sample set: its windows are read from disk when somebody computes with them.

    Raises:
        DataError: when the directory has no such split.
    """
    path = directory / f"{split}.safetensors"
    if not path.is_file():
        raise DataError(f"{path} is missing: {directory} holds no packed {split} tokens")
    # Not safe_open(): it maps for writing, which Linux refuses for a file larger than the memory.
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    data_start = _LENGTH_BYTES + int.from_bytes(mapped[:_LENGTH_BYTES].tobytes(), "little")
    entries: dict[str, dict[str, Any]] = json.loads(mapped[_LENGTH_BYTES:data_start].tobytes())

    def windows(name: str) -> Tensor:
        begin, end = entries[name]["data_offsets"]
        held = mapped[data_start + begin : data_start + end].view(np.int32).reshape(entries[name]["shape"])
        with warnings.catch_warnings():
            # torch warns of arrays that cannot be written to; Int32Windows writes to copies alone.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return Int32Windows.of(torch.from_numpy(held))

    labels_NT, position_ids_NT, tokens_NT = map(windows, _NAMES)
    return PackedTokens(tokens_NT=tokens_NT, labels_NT=labels_NT, position_ids_NT=position_ids_NT)


def _header(packed: PackedTokens) -> bytes:
    """Return what the safetensors library writes before the values, the length of the header included."""
    shape, size = list(packed.tokens_NT.shape), packed.num_tokens * torch.int32.itemsize
    entries = {
        name: {"dtype": "I32", "shape": shape, "data_offsets": [place * size, (place + 1) * size]}
        for place, name in enumerate(_NAMES)
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _parts(tensor_NT: Tensor) -> Iterator[Tensor]:
    """Give all windows, some at a time."""
    num_rows = max(1, _PART_TOKENS // max(1, tensor_NT.shape[1]))
    return (tensor_NT[start : start + num_rows] for start in range(0, tensor_NT.shape[0], num_rows))
