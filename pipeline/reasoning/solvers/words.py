"""Solvers of tasks on letters and words; a word is taken apart letter by letter wherever a letter decides."""

from collections.abc import Mapping
from typing import Any

from pipeline.reasoning.solvers.trace import Trace


def letter_counting(metadata: Mapping[str, Any]) -> Trace:
    """Spell every word and number each hit: `banana: b a1 n a2 n a3`."""
    target = metadata["target_letter"].lower()
    num_hits = 0
    steps = []
    for word in metadata["span"]:
        letters = []
        for letter in word.lower():
            num_hits += letter == target
            letters.append(f"{letter}{num_hits}" if letter == target else letter)
        steps.append(f"{word}: {' '.join(letters)}.")
    return Trace(text=" ".join([*steps, f"Total {num_hits}."]), answer=str(num_hits))


def spell_backward(metadata: Mapping[str, Any]) -> Trace:
    """Spell the word, then spell it from its last letter."""
    word = metadata["word"]
    return Trace(text=f"{word}: {' '.join(word)}. From the end: {' '.join(word[::-1])}.", answer=word[::-1])


def word_sequence_reversal(metadata: Mapping[str, Any]) -> Trace:
    """Number the words, then count down."""
    numbered = [f"{number} {word}" for number, word in enumerate(metadata["words"], start=1)]
    text = f"{', '.join(numbered)}. From the end: {', '.join(reversed(numbered))}."
    return Trace(text=text, answer=", ".join(reversed(metadata["words"])))


def word_sorting(metadata: Mapping[str, Any]) -> Trace:
    """Write each word's shortest telling beginning, sort the beginnings, read off the words."""
    words = metadata["transformed_words"]
    ascending = metadata["direction"] == "ascending"
    beginnings = {word: _telling_beginning(word, words) for word in words}
    ordered = sorted(words, reverse=not ascending)
    listed = ", ".join(f"{beginnings[word]} {word}" for word in words)
    text = f"{listed}. In {metadata['direction']} order: {', '.join(beginnings[word] for word in ordered)}."
    return Trace(text=text, answer=", ".join(ordered))


def _telling_beginning(word: str, words: list[str]) -> str:
    others = [other for other in words if other != word]
    for length in range(1, len(word)):
        if not any(other.startswith(word[:length]) for other in others):
            return word[:length]
    return word
