"""Verifiable instructions: what each asks for in words, and whether an answer does it. Pure, no model, no files.

The kinds are those of IFEval as its paper describes them. What a word, a sentence and a paragraph is:

    word        letters and digits, with apostrophes and hyphens inside it
    sentence    what ends in . ! or ? before a space or the end, and what is left behind the last; "Dr. No" is two
    paragraph   what blank lines part

Keywords and phrases are found in any case; a keyword is found as a whole word. No answer, nothing is followed.
Source: Zhou et al. 2023 ("Instruction-following evaluation for large language models"), section 2.
"""

import json
import re
from typing import Annotated, Literal

from pydantic import Field

from pipeline.architecture import Frozen

Relation = Literal["at_least", "at_most", "exactly"]

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
# Possessive, and no second try inside a run of marks: a policy that writes 10,000 dots must not cost their square.
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"'\u201d\u2019)\]]*+(?:\s+|$)")
_BLANK_LINE = re.compile(r"\n\s*\n")
_BULLET = re.compile(r"^[ \t]*[*-][ \t]+\S", re.MULTILINE)
_HEADING = re.compile(r"^[ \t#*]*section[ \t]+(\d{1,4})\b", re.MULTILINE | re.IGNORECASE)
_TITLE = re.compile(r"<<([^<>\n]+)>>")
_POSTSCRIPT = re.compile(r"^[ \t]*p\.[ \t]?s\.[ \t]*\S", re.MULTILINE | re.IGNORECASE)
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n```", re.DOTALL | re.IGNORECASE)


def count_words(text: str) -> int:
    """Return how many words a text has."""
    return len(_WORD.findall(text))


def count_sentences(text: str) -> int:
    """Return how many sentences with a word in them a text has."""
    return sum(bool(_WORD.search(piece)) for piece in _SENTENCE_END.split(text))


def count_paragraphs(text: str) -> int:
    """Return how many paragraphs a text has."""
    return sum(bool(piece.strip()) for piece in _BLANK_LINE.split(text))


def count_keyword(text: str, word: str) -> int:
    """Return how often a word or phrase stands in a text as a whole."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _holds(number: int, relation: Relation, wanted: int) -> bool:
    return {"at_least": number >= wanted, "at_most": number <= wanted, "exactly": number == wanted}[relation]


def _amount(relation: Relation, number: int, noun: str) -> str:
    return f"{relation.replace('_', ' ')} {number} {noun}{'' if number == 1 else 's'}"


class NumWords(Frozen):
    """A number of words."""

    kind: Literal["num_words"]
    relation: Relation
    count: int

    def text(self) -> str:
        """Return the instruction in words."""
        return f"Write {_amount(self.relation, self.count, 'word')}."

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return _holds(count_words(answer), self.relation, self.count)


class NumSentences(Frozen):
    """A number of sentences."""

    kind: Literal["num_sentences"]
    relation: Relation
    count: int

    def text(self) -> str:
        """Return the instruction in words."""
        return f"Write {_amount(self.relation, self.count, 'sentence')}."

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return _holds(count_sentences(answer), self.relation, self.count)


class NumParagraphs(Frozen):
    """A number of paragraphs."""

    kind: Literal["num_paragraphs"]
    relation: Relation
    count: int

    def text(self) -> str:
        """Return the instruction in words."""
        return f"Write {_amount(self.relation, self.count, 'paragraph')}, with a blank line between paragraphs."

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return _holds(count_paragraphs(answer), self.relation, self.count)


class IncludeKeywords(Frozen):
    """Words that must be there."""

    kind: Literal["include_keywords"]
    words: Annotated[tuple[str, ...], Field(min_length=1)]

    def text(self) -> str:
        """Return the instruction in words."""
        return f"Include {_quoted_list(self.words, 'and')}."

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return all(count_keyword(answer, word) for word in self.words)


class KeywordFrequency(Frozen):
    """How often a word must be there."""

    kind: Literal["keyword_frequency"]
    word: str
    relation: Relation
    count: int

    def text(self) -> str:
        """Return the instruction in words."""
        return f'Use the word "{self.word}" {_amount(self.relation, self.count, "time")}.'

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return _holds(count_keyword(answer, self.word), self.relation, self.count)


class ExcludeKeywords(Frozen):
    """Words that must not be there."""

    kind: Literal["exclude_keywords"]
    words: Annotated[tuple[str, ...], Field(min_length=1)]

    def text(self) -> str:
        """Return the instruction in words."""
        return f"Do not use {_quoted_list(self.words, 'or')}."

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return not any(count_keyword(answer, word) for word in self.words)


class LetterFrequency(Frozen):
    """How often a letter must be there, in either case."""

    kind: Literal["letter_frequency"]
    letter: Annotated[str, Field(pattern=r"^[a-z]$")]
    relation: Relation
    count: int

    def text(self) -> str:
        """Return the instruction in words."""
        return f'Let the letter "{self.letter}" appear {_amount(self.relation, self.count, "time")}.'

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return _holds(answer.lower().count(self.letter), self.relation, self.count)


class AllLowercase(Frozen):
    """Letters, and no capital among them."""

    kind: Literal["all_lowercase"]

    def text(self) -> str:
        """Return the instruction in words."""
        return "Write in lowercase letters only."

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return answer.islower()


class AllUppercase(Frozen):
    """Letters, and nothing but capitals among them."""

    kind: Literal["all_uppercase"]

    def text(self) -> str:
        """Return the instruction in words."""
        return "Write in capital letters only."

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return answer.isupper()


class NoCommas(Frozen):
    """No comma."""

    kind: Literal["no_commas"]

    def text(self) -> str:
        """Return the instruction in words."""
        return "Do not use any commas."

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return "," not in answer


class StartsWith(Frozen):
    """A phrase at the very start; an opening quotation mark may stand before it."""

    kind: Literal["starts_with"]
    phrase: str

    def text(self) -> str:
        """Return the instruction in words."""
        return f'Start your answer with "{self.phrase}".'

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return answer.strip().lstrip('"').casefold().startswith(self.phrase.casefold())


class EndsWith(Frozen):
    """A phrase at the very end; a closing quotation mark may stand behind it."""

    kind: Literal["ends_with"]
    phrase: str

    def text(self) -> str:
        """Return the instruction in words."""
        return f'End your answer with exactly "{self.phrase}".'

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return answer.strip().rstrip('"').casefold().endswith(self.phrase.casefold())


class NumBullets(Frozen):
    """An exact number of lines that start with a dash or an asterisk and a space."""

    kind: Literal["num_bullets"]
    count: int

    def text(self) -> str:
        """Return the instruction in words."""
        return f'Write exactly {self.count} bullet points, each on a line that starts with "- ".'

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return len(_BULLET.findall(answer)) == self.count


class JSONOnly(Frozen):
    """One JSON object and nothing else; it may stand in a fenced block."""

    kind: Literal["json_only"]

    def text(self) -> str:
        """Return the instruction in words."""
        return "Your whole answer must be one JSON object."

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        text = answer.strip()
        fenced = _FENCE.fullmatch(text)
        try:
            return isinstance(json.loads(fenced[1] if fenced else text, parse_constant=_refuse_constant), dict)
        except (ValueError, RecursionError):  # a thousand brackets in a row are no object either
            return False


class Quoted(Frozen):
    """Double quotation marks around the whole answer."""

    kind: Literal["quoted"]

    def text(self) -> str:
        """Return the instruction in words."""
        return "Wrap your whole answer in double quotation marks."

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        text = answer.strip()
        return text.startswith('"') and text.endswith('"') and bool(text.strip('"').strip())


class Title(Frozen):
    """A title in double angle brackets."""

    kind: Literal["title"]

    def text(self) -> str:
        """Return the instruction in words."""
        return "Give your answer a title in double angle brackets, such as <<my title>>."

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return any(_WORD.search(title) for title in _TITLE.findall(answer))


class NumSections(Frozen):
    """Sections headed Section 1 to Section N, in order, each heading on a line of its own or at the start of one."""

    kind: Literal["num_sections"]
    count: int

    def text(self) -> str:
        """Return the instruction in words."""
        return (
            f'Write exactly {self.count} sections. Start each on a new line with "Section" and its number, such as '
            '"Section 1".'
        )

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return [int(number) for number in _HEADING.findall(answer)] == list(range(1, self.count + 1))


class Postscript(Frozen):
    """A line that starts with P.S. and goes on."""

    kind: Literal["postscript"]

    def text(self) -> str:
        """Return the instruction in words."""
        return 'At the end, add a postscript on a new line that starts with "P.S.".'

    def is_followed(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return bool(_POSTSCRIPT.search(answer))


Instruction = Annotated[
    NumWords
    | NumSentences
    | NumParagraphs
    | IncludeKeywords
    | KeywordFrequency
    | ExcludeKeywords
    | LetterFrequency
    | AllLowercase
    | AllUppercase
    | NoCommas
    | StartsWith
    | EndsWith
    | NumBullets
    | JSONOnly
    | Quoted
    | Title
    | NumSections
    | Postscript,
    Field(discriminator="kind"),
]


def are_followed(instructions: tuple[Instruction, ...], answer: str) -> tuple[bool, ...]:
    """Return of each instruction whether an answer follows it; one without words follows none."""
    return tuple(bool(answer.strip()) and one.is_followed(answer) for one in instructions)


def are_loosely_followed(instructions: tuple[Instruction, ...], answer: str) -> tuple[bool, ...]:
    """Return the same, where each may also be followed by the answer without asterisks, or its first or last line.

    What is around an answer ("Sure, here it is:", bold type) is then no mistake.
    """
    lines = answer.strip().split("\n")
    parts = ["\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    variants = [are_followed(instructions, variant) for part in parts for variant in (part, part.replace("*", ""))]
    return tuple(map(any, zip(*variants, strict=True)))


def _quoted_list(words: tuple[str, ...], joint: str) -> str:
    quoted = [f'"{word}"' for word in words]
    named = quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {joint} {quoted[-1]}"
    return f"the word{'' if len(quoted) == 1 else 's'} {named}"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
