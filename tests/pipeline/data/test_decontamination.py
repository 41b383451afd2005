"""Word n-grams against a brute-force search over tuples of words."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.decontamination import MIN_ITEM_WORDS, build_ngrams, read_ngrams, save_ngrams


def words_of(text: str) -> list[str]:
    return re.sub(r"[\W_]+", " ", text.lower()).split()


def shares_by_brute_force(evaluated: list[str], text: str, num_words: int) -> bool:
    words = words_of(text)
    for item in map(words_of, evaluated):
        length = min(num_words, len(item))
        if length < min(num_words, MIN_ITEM_WORDS):
            continue
        wanted = {tuple(item[i : i + length]) for i in range(len(item) - length + 1)}
        if any(tuple(words[i : i + length]) in wanted for i in range(len(words) - length + 1)):
            return True
    return False


@pytest.mark.parametrize("seed", range(50))
def test_shared_ngrams_agree_with_brute_force(seed: int):
    """Three words only, so that texts share long runs by chance, and nearly share others."""
    rng = random.Random(seed)
    text = lambda length: " ".join(rng.choice(["a", "b", "c"]) for _ in range(length))  # noqa: E731
    evaluated = [text(rng.randint(1, 20)) for _ in range(8)]
    ngrams = build_ngrams(evaluated, num_words=10)
    for _ in range(40):
        candidate = text(rng.randint(0, 200))
        assert ngrams.shares_ngram(candidate) == shares_by_brute_force(evaluated, candidate, 10)


def test_shared_ngrams_ignore_case_punctuation_and_line_breaks():
    ngrams = build_ngrams(["The quick brown fox jumps over the lazy dog, and then it sleeps."], num_words=13)
    assert ngrams.shares_ngram("... THE quick (brown) fox_jumps\nover the 'lazy' dog -- and then it sleeps! Yes")
    assert not ngrams.shares_ngram("the quick brown fox jumps over the lazy cat and then it sleeps")


def test_short_items_count_as_one_ngram_and_very_short_ones_not_at_all():
    eight, seven = "one two three four five six seven eight", "uno due tre quattro cinque sei sette"
    ngrams = build_ngrams([eight, seven], num_words=13)
    assert list(ngrams.hashes) == [8]
    assert ngrams.shares_ngram(f"zero {eight} nine")
    assert not ngrams.shares_ngram("one two three four five six seven nine")
    assert not ngrams.shares_ngram(seven)


def test_no_evaluation_text_shares_nothing():
    assert not build_ngrams([], num_words=13).shares_ngram("any text at all")


def test_ngrams_come_back_from_disk_as_they_were(tmp_path: Path):
    for texts in ([" ".join(map(str, range(40))), "one two three four five six seven eight"], []):
        ngrams = build_ngrams(texts, num_words=13)
        save_ngrams(tmp_path / "ngrams.parquet", ngrams)
        loaded = read_ngrams(tmp_path / "ngrams.parquet")
        assert list(loaded.hashes) == list(ngrams.hashes)
        assert all(np.array_equal(loaded.hashes[n], ngrams.hashes[n]) for n in ngrams.hashes)
        assert len(loaded) == len(ngrams)
