"""A multiple-choice prompt with one of its choices as tokens: what evaluation and scoring read alike."""

from dataclasses import dataclass
from typing import Protocol


class TokenCodec(Protocol):
    """The part of a tokenizer that is used here."""

    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
        """Return the text's token ids."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredText:
    """One prompt with one choice, tokenised together; the likelihood is that of the last `num_choice_tokens`."""

    ids: tuple[int, ...]
    num_choice_tokens: int


def scored_text(prompt: str, *, choice: str, tokenizer: TokenCodec, max_tokens: int) -> ScoredText:
    """Tokenise prompt, one space and choice as one text; a text beyond `max_tokens` loses the prompt's beginning.

    The choice's tokens are those behind the tokens of the prompt alone, so a merge across the border counts as choice.
    """
    delimiter = "" if prompt[-1:].isspace() or choice[:1].isspace() else " "
    num_prompt_tokens = len(tokenizer.encode(prompt, add_special_tokens=False))
    ids = tokenizer.encode(prompt + delimiter + choice, add_special_tokens=False)
    num_choice_tokens = max(1, len(ids) - num_prompt_tokens)
    return ScoredText(ids=tuple(ids[-max_tokens:]), num_choice_tokens=min(num_choice_tokens, max_tokens - 1))
