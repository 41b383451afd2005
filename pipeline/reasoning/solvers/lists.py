"""Solvers of tasks on lists of numbers: one decision per entry."""

from collections.abc import Mapping
from typing import Any

from pipeline.reasoning.solvers.trace import Trace


def number_filtering(metadata: Mapping[str, Any]) -> Trace:
    """Compare each number with the bound, then say whether it stays."""
    bound = float(metadata["filter_value"])
    verb, _, side = metadata["operation"].partition("_")
    kept = []
    steps = []
    for text in metadata["original_numbers"]:
        value = float(text)
        word = "larger" if value > bound else "smaller" if value < bound else "equal"
        stays = (word == side) == (verb == "keep")
        steps.append(f"{text} is {word}: {'keep' if stays else 'drop'}.")
        if stays:
            kept.append(text)
    return Trace(text=" ".join(steps), answer=str(kept))


def number_sorting(metadata: Mapping[str, Any]) -> Trace:
    """Selection sort: the smallest (or largest) of what is left, each time."""
    ascending = metadata["direction"] == "ascending"
    left = [str(number) for number in metadata["original_numbers"]]
    ordered = []
    steps = []
    while left:
        chosen = min(left, key=float) if ascending else max(left, key=float)
        left.remove(chosen)
        ordered.append(chosen)
        steps.append(f"{'Smallest' if ascending else 'Largest'} left: {chosen}.")
    return Trace(text=" ".join(steps), answer=str(ordered))
