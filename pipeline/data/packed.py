"""Packed token windows in memory and on disk: what every training and scoring stage reads.

Letters: N windows, T tokens per window.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import DataError

IGNORED_LABEL = -100

Split = str  # "train", "validation", or long_context_split(...)


def long_context_split(sequence_length: int) -> str:
    """Return the name of a mixture's training windows of that length, beside its `train`."""
    return f"train-{sequence_length}"


def blend_split(name: str) -> Split:
    """Return the name of a toggle dataset's training windows for one blend."""
    return f"train-{name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTokens:
    """Windows of tokens, int64, shape (N, T).

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
        return int((self.labels_NT[:, 1:] != IGNORED_LABEL).sum())

    def take(self, num_tokens: int) -> "PackedTokens":
        """Return the first windows that together hold at least `num_tokens` tokens.

        Raises:
            DataError: when there are fewer.
        """
        num_windows = math.ceil(num_tokens / self.sequence_length)
        if num_windows > len(self):
            raise DataError(
                f"{num_tokens:,} tokens asked of a set of {self.num_tokens:,} ({len(self):,} windows of "
                f"{self.sequence_length:,}): ask for fewer, or enlarge the mixture in the recipe"
            )
        return PackedTokens(
            tokens_NT=self.tokens_NT[:num_windows],
            labels_NT=self.labels_NT[:num_windows],
            position_ids_NT=self.position_ids_NT[:num_windows],
        )


def save_packed(directory: Path, split: Split, packed: PackedTokens) -> Path:
    """Write one split as int32 safetensors and return its path."""
    path = directory / f"{split}.safetensors"
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        "tokens": packed.tokens_NT,
        "labels": packed.labels_NT,
        "position_ids": packed.position_ids_NT,
    }
    save_file({name: tensor.to(torch.int32).contiguous() for name, tensor in tensors.items()}, path)
    return path


def load_packed(directory: Path, split: Split) -> PackedTokens:
    """Read one split of a mixture or sample set.

    Raises:
        DataError: when the directory has no such split.
    """
    path = directory / f"{split}.safetensors"
    if not path.is_file():
        raise DataError(f"{path} is missing: {directory} holds no packed {split} tokens")
    with safe_open(path, framework="pt") as file:
        return PackedTokens(
            tokens_NT=file.get_tensor("tokens").long(),
            labels_NT=file.get_tensor("labels").long(),
            position_ids_NT=file.get_tensor("position_ids").long(),
        )
