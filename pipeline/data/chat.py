"""Conversations as tokens: the tokenizer's own chat template, which tokens are trained, and the form of a thought.

Everything goes through the template of the checkpoint, whichever it is (ChatML, Llama-3). The template alone decides
about BOS: the tokenizer adds none of its own, so there is never a second one.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError

THINKING_ON = "detailed thinking on"
THINKING_OFF = "detailed thinking off"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

# Some templates print a date, by default today's: tokens must not depend on the day they are made. (Llama-3 parents get
# a template without one when they are imported.)
TEMPLATE_DATE = "26 Jul 2024"

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSample:
    """A whole conversation: its token ids, and for each whether it is trained (the assistant's words and end token)."""

    ids: tuple[int, ...]
    trained_mask: tuple[bool, ...]

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(self.trained_mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingParse:
    """A reply taken apart. `trace` is None without a complete thought; `answer` is empty when a thought never ends."""

    num_blocks: int
    is_well_formed: bool
    trace: str | None
    answer: str


def reasoning_messages(question: str, *, thinking: bool) -> list[dict[str, str]]:
    """Return the prompt of a question under one of the two modes (Llama-Nemotron, section 4)."""
    system = THINKING_ON if thinking else THINKING_OFF
    return [{"role": "system", "content": system}, {"role": "user", "content": question.strip()}]


def format_thinking(trace: str, answer: str) -> str:
    """Return the assistant's words when thinking is on; when it is off they are the answer alone."""
    return f"{THINK_OPEN}\n{trace}\n{THINK_CLOSE}\n\n{answer}"


def split_thinking(text: str) -> ThinkingParse:
    """Take a reply apart into thought and answer.

    It is well formed when it is one think block, with words in it, at the very start, and an answer after it. A reply
    without any tag has no blocks, and all of it is the answer. Stray tags count as blocks.
    """
    num_open, num_close = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    num_blocks = max(num_open, num_close)
    if num_blocks == 0:
        return ThinkingParse(num_blocks=0, is_well_formed=False, trace=None, answer=text.strip())
    before, opened, rest = text.partition(THINK_OPEN)
    trace, closed, _ = rest.partition(THINK_CLOSE)
    answer = text.rpartition(THINK_CLOSE)[2].strip() if num_close else ""
    is_complete = bool(opened and closed)
    is_single = num_open == 1 and num_close == 1 and is_complete
    return ThinkingParse(
        num_blocks=num_blocks,
        is_well_formed=is_single and not before.strip() and bool(trace.strip()) and bool(answer),
        trace=trace.strip() if is_complete else None,
        answer=answer,
    )


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a whole conversation, without a prompt for the next turn.

    Raises:
        DataError: when the tokenizer has no template, a message holds a special token, or BOS stands twice.
    """
    return _render(tokenizer, messages, with_prompt=False)


def generation_prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the token ids after which the assistant's next words begin.

    Raises:
        DataError: when the tokenizer has no template, a message holds a special token, or BOS stands twice.
    """
    return _render(tokenizer, messages, with_prompt=True)


def tokenize_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> ChatSample:
    """Return a conversation's ids and which of them are trained: every assistant turn, its end-of-turn token included.

    A turn begins where generation would begin, after the prompt that the template puts before it; so what is trained is
    what the model will be asked for. A line break that a template writes after the end-of-turn token is not trained.

    Raises:
        DataError: when there is no assistant turn, the prompt of a turn is not a prefix of the conversation's tokens
            (a template that rewrites earlier turns), or a turn has no end-of-turn token.
    """
    ids = render_chat(tokenizer, messages)
    trained_mask = [False] * len(ids)
    special_ids = special_tokens(tokenizer).keys()
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(_prefix_of(ids, generation_prompt_ids(tokenizer, messages[:index]), turn=index))
        is_last = index == len(messages) - 1
        end = len(ids if is_last else _prefix_of(ids, render_chat(tokenizer, messages[: index + 1]), turn=index))
        end_of_turn = max((place for place in range(start, end) if ids[place] in special_ids), default=None)
        if end_of_turn is None:
            raise DataError(
                f"turn {index} ends without a special token, so the model could never learn to stop: "
                f"{tokenizer.decode(ids[start:end])!r}; use a chat template with an end-of-turn token"
            )
        trained_mask[start : end_of_turn + 1] = [True] * (end_of_turn + 1 - start)
    if not any(trained_mask):
        raise DataError(
            f"a conversation of {len(messages)} messages has no assistant turn: nothing of it can be trained"
        )
    return ChatSample(ids=tuple(ids), trained_mask=tuple(trained_mask))


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token with which the chat template ends an assistant's turn."""
    sample = tokenize_conversation(
        tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    )
    return [id_ for id_, is_trained in zip(sample.ids, sample.trained_mask, strict=True) if is_trained][-1]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens at which a reply ends, wherever one is generated: end of turn, then the model's own EOS tokens.

    Neither holds the other: a config may name <|endoftext|> alone, and a model that was never tuned ends with that.
    """
    return tuple(dict.fromkeys((end_of_turn_id(tokenizer), *eos_token_ids)))


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, with_prompt: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise DataError("the checkpoint's tokenizer has no chat template: chat and reasoning data need one")
    for index, message in enumerate(messages):
        for token in special_tokens(tokenizer).values():
            if token in message["content"]:
                raise DataError(f"message {index} holds the special token {token}: it would end or fake a turn")
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=with_prompt,
        date_string=TEMPLATE_DATE,
    )
    assert isinstance(text, str)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise DataError(f"the chat template starts with {tokenizer.bos_token} twice: keep one in the template")
    return ids


def _prefix_of(ids: list[int], prefix: list[int], *, turn: int) -> list[int]:
    if ids[: len(prefix)] != prefix:
        place = next((i for i, (a, b) in enumerate(zip(ids, prefix, strict=False)) if a != b), len(ids))
        raise DataError(
            f"the tokens up to turn {turn} are not how the whole conversation begins (they differ at token {place} of "
            f"{len(prefix)}): the chat template rewrites earlier turns, or the turn's first characters merge with the "
            "prompt; strip the turn, or use another template"
        )
    return prefix


@functools.lru_cache(maxsize=8)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that no message may hold, by id."""
    # Not tokenizer.all_special_ids: a Llama-3 tokenizer names <|eot_id|> there only where it is also the EOS token.
    return {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
