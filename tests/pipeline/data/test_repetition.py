"""Repetition by hand."""

import pytest

from pipeline.data.repetition import repeated_share


@pytest.mark.parametrize(
    ("words", "num_words", "expected"),
    [
        (list("abcdefgh") * 3, 8, 1 - 8 / 17),
        (list("abcabc"), 2, 2 / 5),
        (["a"] * 7, 8, 0.0),
        ([], 2, 0.0),
    ],
)
def test_repeated_share_matches_a_hand_count(words: list[str], num_words: int, expected: float):
    assert repeated_share(words, num_words=num_words) == pytest.approx(expected)
