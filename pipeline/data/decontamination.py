"""Which texts share words with the evaluation sets: hashed word n-grams, the same for every tokenizer.

Text is lower-cased and cut into runs of letters and digits. Every n consecutive words of an evaluation text are one
n-gram. A text of fewer words is one shorter n-gram as a whole when it has at least MIN_ITEM_WORDS words; still shorter
ones ("the capital of France") occur anywhere by chance and are left out.
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

MIN_ITEM_WORDS = 8

_WORD = re.compile(r"[^\W_]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of an n-gram loses bits of its hash

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, slots=True)
class NgramSet:
    """Sorted hashes of n-grams, by their number of words."""

    hashes: Mapping[int, Hashes]

    def __len__(self) -> int:
        """Return the number of distinct n-grams of all lengths."""
        return sum(len(hashes) for hashes in self.hashes.values())

    def shares_ngram(self, text: str) -> bool:
        """Return whether any n-gram of the set stands in the text."""
        words = _word_hashes(text)
        for num_words, ngrams in _ngrams_by_length(words, lengths=sorted(self.hashes)):
            known = self.hashes[num_words]
            places = np.minimum(np.searchsorted(known, ngrams), len(known) - 1)
            if bool((known[places] == ngrams).any()):
                return True
        return False


def build_ngrams(texts: Iterable[str], *, num_words: int) -> NgramSet:
    """Return the n-grams of `num_words` words of all texts, and short texts as one n-gram each."""
    found: dict[int, list[Hashes]] = {}
    for text in texts:
        words = _word_hashes(text)
        length = min(num_words, len(words))
        if length < min(num_words, MIN_ITEM_WORDS):
            continue
        for _, ngrams in _ngrams_by_length(words, lengths=[length]):
            found.setdefault(length, []).append(ngrams)
    return NgramSet(hashes={length: np.unique(np.concatenate(parts)) for length, parts in sorted(found.items())})


def save_ngrams(path: Path, ngrams: NgramSet) -> None:
    """Write n-grams as Parquet with the columns num_words and ngram (a 64-bit hash)."""
    lengths = [np.full(len(hashes), length, dtype=np.uint16) for length, hashes in ngrams.hashes.items()]
    frame = pl.DataFrame(
        {
            "num_words": np.concatenate([np.empty(0, dtype=np.uint16), *lengths]),
            "ngram": np.concatenate([np.empty(0, dtype=np.uint64), *ngrams.hashes.values()]),
        },
        schema={"num_words": pl.UInt16, "ngram": pl.UInt64},
    )
    frame.write_parquet(path)


def read_ngrams(path: Path) -> NgramSet:
    """Read what save_ngrams wrote."""
    frame = pl.read_parquet(path).sort("num_words", "ngram")
    return NgramSet(
        hashes={
            int(length): frame.filter(pl.col("num_words") == length)["ngram"].to_numpy()
            for length in frame["num_words"].unique().sort()
        }
    )


def _ngrams_by_length(words: Hashes, *, lengths: list[int]) -> Iterator[tuple[int, Hashes]]:
    """Yield the hashes of all n-grams for each length, ascending.

    h_n(i) = h_{n-1}(i) * m + w(i + n - 1) modulo 2**64, for all i at once.
    """
    if not len(words):
        return
    current = words
    for num_words in range(1, max(lengths, default=0) + 1):
        if num_words > len(words):
            return
        if num_words > 1:
            current = current[:-1] * _MULTIPLIER + words[num_words - 1 :]
        if num_words in lengths:
            yield num_words, current


def _word_hashes(text: str) -> Hashes:
    return np.array([_word_hash(word) for word in _WORD.findall(text.lower())], dtype=np.uint64)


@functools.lru_cache(maxsize=2**18)
def _word_hash(word: str) -> int:
    # Not hash(): that differs between processes.
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
