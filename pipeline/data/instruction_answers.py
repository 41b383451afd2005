"""An answer that follows a set of instructions, word by word: proof that they can be followed together. Pure.

It reads like nothing anyone would write. Where a set cannot be followed, the answer does not follow it: whoever asks
judges it as any other.
"""

import json
import math

from pipeline.data.instructions import (
    EndsWith,
    IncludeKeywords,
    Instruction,
    KeywordFrequency,
    LetterFrequency,
    NumBullets,
    NumParagraphs,
    NumSections,
    NumSentences,
    NumWords,
    StartsWith,
    count_words,
)

# No word of one list is in another or in a phrase, none holds a rare letter, and no phrase holds a comma.
INCLUDED = (
    *("river", "garden", "window", "morning", "market", "teacher", "winter", "letter", "mountain", "bread", "music"),
    *("village", "summer", "doctor", "island", "lantern", "harbour", "kitchen", "silver", "journey", "shadow"),
)
EXCLUDED = ("very", "really", "good", "important", "because", "however", "many", "always", "never", "great", "often")
FIRST_PHRASES = ("Here is my answer", "Let me tell you", "To begin with", "In my opinion", "The short version is")
LAST_PHRASES = ("I hope this helps.", "Is there anything else?", "That is all.", "Thank you for asking.", "The end.")
RARE_LETTERS = "jqxz"

_FILLER = "then"
_DENSE = {
    **{"a": "banana", "e": "evergreen", "i": "initiation", "n": "nonsense", "o": "moonroot"},
    **{"r": "terror", "s": "assess", "t": "statement"},
}


def write_answer(instructions: tuple[Instruction, ...]) -> str:
    """Return an answer that follows all of them wherever that can be done."""
    by_kind = {one.kind: one for one in instructions}
    keywords: list[str] = []
    for one in instructions:
        if isinstance(one, IncludeKeywords):
            keywords += one.words
        if isinstance(one, KeywordFrequency) and one.relation != "at_most":
            keywords += [one.word] * one.count
    text = _layout(by_kind, words=keywords)
    letters = by_kind.get("letter_frequency")
    if isinstance(letters, LetterFrequency) and letters.relation == "at_least":
        dense = _DENSE[letters.letter]
        lacking = max(0, letters.count - text.lower().count(letters.letter))
        keywords += [dense] * math.ceil(lacking / dense.count(letters.letter))
        text = _layout(by_kind, words=keywords)
    length = by_kind.get("num_words")
    if isinstance(length, NumWords) and length.relation != "at_most":
        keywords += [_FILLER] * max(0, length.count - count_words(text))
        text = _layout(by_kind, words=keywords)
    if "all_lowercase" in by_kind:
        return text.lower()
    return text.upper() if "all_uppercase" in by_kind else text


def _layout(by_kind: dict[str, Instruction], *, words: list[str]) -> str:
    """Return the words in the lines, sentences and marks that are asked for; every word but the first stands in one."""
    if "json_only" in by_kind:
        return json.dumps({"answer": " ".join(words)})
    lines = [""] * _num_lines(by_kind)
    sentences = [[_FILLER] for _ in range(max(_num_sentences(by_kind, at_least=len(lines)), 1))]
    if words:
        sentences[0] = list(words)
    first, last = by_kind.get("starts_with"), by_kind.get("ends_with")
    if isinstance(first, StartsWith):
        sentences[0] = [first.phrase, *(sentences[0] if words else [])]
    written = [" ".join(sentence) + "." for sentence in sentences]
    if isinstance(last, EndsWith) and "postscript" not in by_kind:
        kept = sentences[-1] if words or isinstance(first, StartsWith) or len(sentences) > 1 else []
        written[-1] = " ".join([*kept, last.phrase])
    for place, sentence in enumerate(written):
        line = min(place, len(lines) - 1)
        lines[line] = f"{lines[line]} {sentence}".strip()
    bullets, sections = by_kind.get("num_bullets"), by_kind.get("num_sections")
    if isinstance(bullets, NumBullets):
        lines[: bullets.count] = [f"- {line}" for line in lines[: bullets.count]]
    if isinstance(sections, NumSections):
        lines[: sections.count] = [f"Section {place}\n{line}" for place, line in enumerate(lines[: sections.count], 1)]
    if "title" in by_kind:
        lines[0] = f"{lines[0]} <<Notes>>" if isinstance(first, StartsWith) else f"<<Notes>>\n{lines[0]}"
    if "postscript" in by_kind:
        lines.append(f"P.S. {last.phrase if isinstance(last, EndsWith) else _FILLER}")
    text = ("\n\n" if "num_paragraphs" in by_kind else "\n").join(lines)
    return f'"{text}"' if "quoted" in by_kind else text


def _num_lines(by_kind: dict[str, Instruction]) -> int:
    found = 1
    for kind in ("num_paragraphs", "num_bullets", "num_sections"):
        one = by_kind.get(kind)
        if isinstance(one, NumBullets | NumSections):
            found = max(found, one.count)
        if isinstance(one, NumParagraphs) and one.relation != "at_most":
            found = one.count
    return found


def _num_sentences(by_kind: dict[str, Instruction], *, at_least: int) -> int:
    wanted = by_kind.get("num_sentences")
    if isinstance(wanted, NumSentences) and wanted.relation != "at_most":
        return max(wanted.count, at_least)
    return at_least
