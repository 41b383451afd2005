"""How much a text repeats itself: one measure, for the data that is trained on and for the replies that come of it."""

from collections.abc import Sequence


def repeated_share(words: Sequence[str], *, num_words: int) -> float:
    """Return the share of runs of `num_words` words that stood in the text before; 0 for a text of fewer words."""
    runs = [tuple(words[start : start + num_words]) for start in range(len(words) - num_words + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
