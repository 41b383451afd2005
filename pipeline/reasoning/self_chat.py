"""Conversations sampled from the parent itself: the user's turn from the template's bare user header, then the answer.

An aligned model has seen many users and continues the header with what one would ask. Training on its own answers keeps
it talking while it learns to reason.
Source: Magpie (Xu et al. 2024), section 2.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.data.chat import TEMPLATE_DATE, THINK_CLOSE, THINK_OPEN, generation_prompt_ids, stop_token_ids
from pipeline.errors import DataError
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.model.sampling import Completion, sample_completions, seeded_generator
from pipeline.progress import Reporter
from pipeline.recipe import ChatConfig

_MARK = "THE-USER-SPEAKS-HERE"
_MAX_LINE_REPEATS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTurn:
    """One question and its answer; an answer that was cut off has no end to learn from."""

    question: str
    answer: str
    is_complete: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfChat:
    """The turns that were kept, and for each reason how many were not."""

    turns: tuple[ChatTurn, ...]
    num_dropped: Mapping[str, int]


def sample_self_chat(
    model: HeterogeneousLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: ChatConfig,
    seed: int,
    reporter: Reporter,
) -> SelfChat:
    """Sample `config.num_samples` conversations and keep the sound ones.

    A question must end; an answer may be cut off, as most of a small model's are at a hundred tokens (41 of 48 for
    SmolLM2 at 96).
    """
    stop_ids = stop_token_ids(tokenizer, model.architecture.eos_token_ids)
    header_ids = user_header_ids(tokenizer)
    turns: list[ChatTurn] = []
    num_dropped: Counter[str] = Counter()
    seen: set[str] = set()
    for start in range(0, config.num_samples, config.batch_size):
        num_asked = min(config.batch_size, config.num_samples - start)
        generator = seeded_generator("self-chat", seed, start, device=model.device)
        asked = sample_completions(
            model,
            [header_ids],
            num_samples=num_asked,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            stop_ids=stop_ids,
            generator=generator,
        )[0]
        questions = []
        for completion in asked:
            question = _text(completion, tokenizer)
            flaw = find_flaw(question)
            if flaw is None and not completion.is_terminated:
                flaw = "cut off"
            if flaw is None and question in seen:
                flaw = "asked before"
            if flaw is None:
                questions.append(question)
                seen.add(question)
            else:
                num_dropped[f"question: {flaw}"] += 1
        answered = _answer(model, tokenizer, questions, config=config, stop_ids=stop_ids, generator=generator)
        for question, completion in zip(questions, answered, strict=True):
            answer = _text(completion, tokenizer)
            flaw = find_flaw(answer)
            if flaw is None:
                turns.append(ChatTurn(question=question, answer=answer, is_complete=completion.is_terminated))
            else:
                num_dropped[f"answer: {flaw}"] += 1
        reporter.step(start + num_asked, config.num_samples, what="conversations sampled", kept=len(turns))
    return SelfChat(turns=tuple(turns), num_dropped=dict(sorted(num_dropped.items())))


def user_header_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that stand before a user's first word, the template's own system prompt included.

    Raises:
        DataError: when the template changes the user's words.
    """
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, date_string=TEMPLATE_DATE
    )
    header, mark, _ = str(text).partition(_MARK)
    if not mark:
        raise DataError("the chat template does not print a user's words as they are: chat cannot be sampled with it")
    ids: list[int] = tokenizer(header, add_special_tokens=False)["input_ids"]
    return ids


def find_flaw(text: str) -> str | None:
    """Return why a turn is not worth training on; None when it is."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "empty"
    if THINK_OPEN in text or THINK_CLOSE in text:
        return "think tag"
    if max(Counter(lines).values()) > _MAX_LINE_REPEATS:
        return "repeated lines"
    return None


def _answer(
    model: HeterogeneousLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    config: ChatConfig,
    stop_ids: Sequence[int],
    generator: torch.Generator,
) -> list[Completion]:
    if not questions:
        return []
    prompts = [generation_prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    groups = sample_completions(
        model,
        prompts,
        num_samples=1,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        stop_ids=stop_ids,
        generator=generator,
    )
    return [group[0] for group in groups]


def _text(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a turn as text; one that holds another special token is broken and comes back empty."""
    ids = list(completion.ids[:-1] if completion.is_terminated else completion.ids)
    if set(ids) & set(tokenizer.all_special_ids):
        return ""
    # A cut may fall inside a character of several tokens, which decodes to U+FFFD.
    return str(tokenizer.decode(ids)).rstrip("\ufffd").strip()
