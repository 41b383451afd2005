"""The answer that a free reply comes to, taken out by a rule that knows the reference's kind alone. Pure, no torch."""

import re

# A minus sign behind a digit, a letter or a bracket subtracts: 9-6 ends in 6.
_NUMBER = re.compile(r"(?:(?<![\w)\]])[-\u2212])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_QUOTED_AT_END = re.compile(r"[\"\u201c`]([^\"\u201c\u201d`]+)[\"\u201d`][\s.!*_]*$")
_AROUND_WORDS = ".,;:!?*_`\"'()[]{}<>\u2018\u2019\u201c\u201d"


def extract_answer(reply: str, *, reference: str) -> str:
    r"""Return the answer in a reply without its thought, empty where there is none.

    Of the last \boxed{...} where there is one, else of the whole reply: the last number when the reference is a
    number; otherwise all that is boxed, or the quotation that ends the reply, or its last word.
    """
    boxed = _BOXED.findall(reply)
    text = _LATEX_TEXT.sub(r"\1", boxed[-1]) if boxed else reply
    if _NUMBER.fullmatch(reference.strip()):
        numbers = _NUMBER.findall(text)
        return numbers[-1].replace(",", "").replace("\u2212", "-") if numbers else ""
    if boxed:
        return text.strip()
    quoted = _QUOTED_AT_END.search(text)
    if quoted:
        return quoted[1].strip(_AROUND_WORDS + " ")
    words = [word for word in (part.strip(_AROUND_WORDS) for part in text.split()) if word]
    return words[-1] if words else ""
