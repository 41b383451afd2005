"""Filters that read the words of a row alone: language, repetition, code that parses. Pure, no torch.

Nothing here runs what a model wrote.
"""

import ast
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection

from pipeline.data.chat import split_thinking
from pipeline.data.repetition import repeated_share
from pipeline.errors import RecipeError
from pipeline.reasoning.rows import TraceRow

CODE = "code"

# Common function words of each language; none stands in two of the lists.
_FUNCTION_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the of and to is that it for was with as be on by this are from have not which you in can",
        "de": "der und ist das nicht ein eine durch auf dem den sich auch wird zu von werden oder sind wenn",
        "fr": "le les est et une dans pour qui sur avec sont cette mais nous vous pas du au ce donc",
        "es": "el los una con las del pero sus este cuando muy sin desde hasta porque hay son",
        "it": "il che di non sono della gli nel alla anche questo quando dei delle essere ha viene",
        "pt": "os uma um dos pelos ao pelo pela com muito seu isso foi ele ela onde mas",
        "nl": "het een van dat niet zijn voor met ook maar deze wordt naar bij dit werd wij hebben",
    }.items()
}
_MIN_FUNCTION_WORDS = 5
_MIN_SCRIPT_SHARE = 0.1
_MIN_SCRIPT_LETTERS = 8
_LATIN = "LATIN"

_WORD = re.compile(r"[^\W\d_]{2,}")  # single letters are spelt out words, or variables
_FENCE = re.compile(r"^```[ \t]*([\w+#-]*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_MAX_PARSED_CHARACTERS = 200_000


def check_languages(languages: Collection[str]) -> None:
    """Raise RecipeError when a language cannot be told."""
    unknown = sorted(set(languages) - set(_FUNCTION_WORDS))
    if unknown:
        raise RecipeError(
            f"reasoning_toggle_dataset.filters.languages names {', '.join(unknown)}, which cannot be told; "
            f"those that can are {', '.join(_FUNCTION_WORDS)}"
        )


def language_flaw(row: TraceRow, *, languages: Collection[str]) -> str | None:
    """Return why a row is not in one of the languages; prompt and output are looked at apart.

    A share of letters of another script than Latin tells of one; among languages in Latin script the most function
    words decide, where there are enough. Formulas and lists of numbers have no language, and pass.
    """
    for name, text in (("prompt", row.prompt_text), ("output", row.output)):
        script = _foreign_script(text)
        if script is not None:
            return f"{name} in {script.lower()} script"
        language = _language(text)
        if language is not None and language not in languages:
            return f"{name} in {language}"
    return None


def _foreign_script(text: str) -> str | None:
    scripts = Counter(unicodedata.name(letter, "UNKNOWN").split(" ")[0] for letter in text if letter.isalpha())
    # Greek letters are mathematics, and so are letters of the mathematical alphabets.
    foreign = {name: number for name, number in scripts.items() if name not in (_LATIN, "GREEK", "MATHEMATICAL")}
    most = max(foreign, key=lambda name: (foreign[name], name), default=None)
    if most is None or foreign[most] < max(_MIN_SCRIPT_LETTERS, _MIN_SCRIPT_SHARE * scripts.total()):
        return None
    return most


def _language(text: str) -> str | None:
    words = Counter(word.casefold() for word in _WORD.findall(text))
    found = {name: sum(words[word] for word in common) for name, common in _FUNCTION_WORDS.items()}
    most = max(found, key=lambda name: found[name])
    return most if found[most] >= _MIN_FUNCTION_WORDS else None


def repetition_flaw(row: TraceRow, *, num_words: int, max_share: float) -> str | None:
    """Return whether too much of an output repeats itself."""
    share = repeated_share(row.output.split(), num_words=num_words)
    return f"more than {max_share:.0%} of it repeats" if share > max_share else None


def code_flaw(row: TraceRow) -> str | None:
    """Return why the code of a row of category code is not worth training on; it is parsed, and never run.

    Wanted are a fenced block in the answer, none inside the thought, and Python that parses; other languages are not
    judged here, and dropped.

    Source: Llama-Nemotron, section 3.1.2 (which parses with tree-sitter).
    """
    if row.category != CODE:
        return None
    parse = split_thinking(row.output)
    if parse.trace is not None and "```" in parse.trace:
        return "code inside the thought"
    blocks = _FENCE.findall(parse.answer + "\n")
    if not blocks:
        return "no fenced code"
    for language, code in blocks:
        if language.casefold() not in ("", "python", "python3", "py"):
            return f"code in {language.casefold()}, which is not parsed"
        if not _parses(code):
            return "code does not parse"
    return None


def _parses(code: str) -> bool:
    if len(code) > _MAX_PARSED_CHARACTERS:
        return False
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes warn while they are parsed
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
