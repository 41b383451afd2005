"""Prompts that say nearly the same: MinHash finds candidates, the exact Jaccard index decides.

The set of a text are its word n-grams (shingles), lower-cased. A MinHash signature agrees with another at each place
with a probability equal to the sets' Jaccard index J; cut into b bands of r places, two signatures share a band with
probability 1 - (1 - J^r)^b.

Source: Broder, "On the resemblance and containment of documents" (1997).
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.reasoning.filtering import Verdicts
from pipeline.reasoning.rows import TraceRow

# 32 bands of 4: a pair at J = 0.8 is missed once in ten million, one at 0.5 is looked at in 87% of the cases.
_NUM_BANDS = 32
_BAND_ROWS = 4
_SEEDS = np.random.default_rng(1997).integers(0, 2**64, size=_NUM_BANDS * _BAND_ROWS, dtype=np.uint64)
_WORD = re.compile(r"\w+")


def near_duplicates_flaws(rows: Sequence[TraceRow], *, shingle_words: int, min_jaccard: float) -> Verdicts:
    """Drop every row of a prompt that nearly repeats another one's; the prompt that came first is kept.

    Prompts made from a reasoning task share their wording by construction and pass: they are told apart as whole
    questions.
    """
    prompts: dict[str, str] = {}
    for row in rows:
        if row.item is None:
            prompts.setdefault(row.prompt_id, row.prompt_text)
    ids = list(prompts)
    repeated = {
        ids[later]
        for later in near_duplicates(
            [prompts[id_] for id_ in ids], shingle_words=shingle_words, min_jaccard=min_jaccard
        )
    }
    return ["prompt nearly repeats another" if row.prompt_id in repeated else None for row in rows]


def near_duplicates(texts: Sequence[str], *, shingle_words: int, min_jaccard: float) -> list[int]:
    """Return the places of texts whose Jaccard index with a text kept before them is at least `min_jaccard`."""
    sets = [_shingles(text, num_words=shingle_words) for text in texts]
    buckets: dict[tuple[int, bytes], list[int]] = {}
    repeated: list[int] = []
    for place, shingles in enumerate(sets):
        signature = _signature(shingles)
        keys = [(band, signature[band * _BAND_ROWS : (band + 1) * _BAND_ROWS].tobytes()) for band in range(_NUM_BANDS)]
        candidates = sorted({other for key in keys for other in buckets.get(key, [])})
        if any(_jaccard(shingles, sets[other]) >= min_jaccard for other in candidates):
            repeated.append(place)
            continue
        for key in keys:
            buckets.setdefault(key, []).append(place)
    return repeated


def _shingles(text: str, *, num_words: int) -> frozenset[int]:
    words = _WORD.findall(text.lower())
    length = min(num_words, len(words))
    grams = {" ".join(words[start : start + length]) for start in range(len(words) - length + 1)}
    return frozenset(int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "little") for gram in grams)


def _jaccard(first: frozenset[int], second: frozenset[int]) -> float:
    return len(first & second) / len(first | second) if first | second else 1.0


def _signature(shingles: frozenset[int]) -> NDArray[np.uint64]:
    """Return the smallest hash of the set under each of as many hash functions: h_k(x) = mix(x ^ seed_k)."""
    values = np.array(sorted(shingles), dtype=np.uint64)
    if not len(values):
        return _SEEDS
    # The finaliser of splitmix64; with a linear map in its place the smallest values are no random ones, and pairs are
    # missed.
    mixed = values[None, :] ^ _SEEDS[:, None]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).min(axis=1)
