"""The reasoning-toggle dataset: every verified task in both modes, and chat. No files.

With thinking on the reply is `<think>` trace `</think>` answer, with thinking off the answer alone, to the same
question: the system prompt is all that differs. Source: Llama-Nemotron, sections 3 and 4.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from pipeline.data.chat import (
    THINKING_OFF,
    THINKING_ON,
    ChatSample,
    format_thinking,
    reasoning_messages,
    split_thinking,
    tokenize_conversation,
)
from pipeline.data.decontamination import NgramSet
from pipeline.data.reasoning_items import ReasoningItem, generate_items, score_answer
from pipeline.reasoning.self_chat import ChatTurn
from pipeline.reasoning.solvers.trace import Trace
from pipeline.reasoning.traces import verifies, write_trace
from pipeline.recipe import ReasoningTask

CHAT = "chat"
VALIDATION_SHARE = 0.05

Mode = Literal["on", "off", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SolvedItem:
    """A question with a trace that its verifier accepts; `prompt_id` is unique in the dataset."""

    prompt_id: str
    item: ReasoningItem
    trace: Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class SolvedItems:
    """The items that were kept, and how many were dropped for each reason."""

    kept: tuple[SolvedItem, ...]
    num_dropped: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ToggleSample:
    """One conversation of the dataset; samples of one prompt share `prompt_id`."""

    prompt_id: str
    task: str
    mode: Mode
    system: str | None
    question: str
    answer: str
    completion: str
    chat: ChatSample

    @property
    def sample_id(self) -> str:
        """The prompt and the mode."""
        return f"{self.prompt_id}/{self.mode}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Samples in training order; no prompt stands on both sides."""

    train: tuple[ToggleSample, ...]
    validation: tuple[ToggleSample, ...]


def solve_tasks(
    tasks: Iterable[ReasoningTask],
    *,
    items_per_task: int,
    seed: int,
    evaluation_questions: Set[str],
    evaluation_ngrams: NgramSet,
) -> SolvedItems:
    """Generate items that no evaluation asks, and write their traces.

    `evaluation_ngrams` are those of text and multiple-choice sets. Questions of one task share their wording with the
    task's evaluation questions by construction: those are told apart as whole questions.
    """
    kept: list[SolvedItem] = []
    num_dropped = Counter({reason: 0 for reason in ("no_trace", "unverified", "contaminated")})
    known_questions = set(evaluation_questions)
    for task in tasks:
        items = generate_items(task, num_items=items_per_task, seed=seed, exclude_questions=known_questions)
        known_questions.update(item.question for item in items)
        for item in items:
            trace = write_trace(item)
            if trace is None:
                num_dropped["no_trace"] += 1
            elif not verifies(trace, item):
                num_dropped["unverified"] += 1
            elif evaluation_ngrams.shares_ngram(item.question):
                num_dropped["contaminated"] += 1
            else:
                kept.append(SolvedItem(prompt_id=f"{task.name}/{len(kept):05d}", item=item, trace=trace))
    return SolvedItems(kept=tuple(kept), num_dropped=num_dropped)


def paired_samples(solved: SolvedItem, *, tokenizer: PreTrainedTokenizerBase) -> tuple[ToggleSample, ToggleSample]:
    """Return one item in both modes, on first."""
    forms: tuple[tuple[Mode, str, str], ...] = (
        ("on", THINKING_ON, format_thinking(solved.trace.text, solved.trace.answer)),
        ("off", THINKING_OFF, solved.trace.answer),
    )
    on, off = (
        _sample(
            tokenizer,
            prompt_id=solved.prompt_id,
            task=solved.item.task,
            mode=mode,
            system=system,
            question=solved.item.question,
            answer=solved.trace.answer,
            completion=completion,
        )
        for mode, system, completion in forms
    )
    return on, off


def chat_samples(turns: Sequence[ChatTurn], *, tokenizer: PreTrainedTokenizerBase) -> list[ToggleSample]:
    """Return chat turns, every other one with thinking off and without a system prompt of ours."""
    samples = []
    for index, turn in enumerate(turns):
        mode: Mode = "off" if index % 2 == 0 else "none"
        sample = _sample(
            tokenizer,
            prompt_id=f"{CHAT}/{index:05d}",
            task=CHAT,
            mode=mode,
            system=THINKING_OFF if mode == "off" else None,
            question=turn.question,
            answer=turn.answer,
            completion=turn.answer,
        )
        samples.append(sample if turn.is_complete else replace(sample, chat=_without_end(sample.chat)))
    return samples


def split_samples(samples: Sequence[ToggleSample], *, seed: int) -> Split:
    """Shuffle, and set aside VALIDATION_SHARE of the prompts, at least one, with all their modes."""
    generator = random.Random(f"toggle/{seed}")
    prompts = list(dict.fromkeys(sample.prompt_id for sample in samples))
    num_validation = max(1, round(VALIDATION_SHARE * len(prompts)))
    validation_prompts = set(generator.sample(prompts, num_validation))
    shuffled = generator.sample(samples, len(samples))
    return Split(
        train=tuple(sample for sample in shuffled if sample.prompt_id not in validation_prompts),
        validation=tuple(sample for sample in shuffled if sample.prompt_id in validation_prompts),
    )


def without_long_prompts(samples: Sequence[ToggleSample], *, max_tokens: int) -> list[ToggleSample]:
    """Return the samples of prompts that fit in every mode, so that leaving one out never breaks a pair."""
    long = {sample.prompt_id for sample in samples if len(sample.chat.ids) > max_tokens}
    return [sample for sample in samples if sample.prompt_id not in long]


def num_unverified_traces(samples: Iterable[ToggleSample], *, items: Mapping[str, ReasoningItem]) -> int:
    """Return how many reasoning replies, read as a verifier reads them, do not end in the right answer."""
    return sum(
        score_answer(items[sample.prompt_id], split_thinking(sample.completion).answer) != 1.0
        for sample in samples
        if sample.task != CHAT
    )


def num_unpaired_prompts(samples: Iterable[ToggleSample]) -> int:
    """Return how many reasoning prompts are not there exactly once in each mode with the same question and answer."""
    found: dict[str, list[ToggleSample]] = {}
    for sample in samples:
        if sample.task != CHAT:
            found.setdefault(sample.prompt_id, []).append(sample)
    return sum(
        sorted(sample.mode for sample in group) != ["off", "on"]
        or len({(sample.question, sample.answer) for sample in group}) != 1
        for group in found.values()
    )


def mask_preview(sample: ToggleSample, *, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a conversation as Markdown in which what is trained is bold."""
    runs: list[tuple[bool, list[int]]] = []
    for id_, is_trained in zip(sample.chat.ids, sample.chat.trained_mask, strict=True):
        if not runs or runs[-1][0] != is_trained:
            runs.append((is_trained, []))
        runs[-1][1].append(id_)
    shown = []
    for is_trained, ids in runs:
        text = str(tokenizer.decode(ids)).replace("\n", "\\n").replace("`", "'")
        shown.append(f"**`{text}`**" if is_trained else f"`{text}`")
    return " ".join(shown)


def _sample(
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_id: str,
    task: str,
    mode: Mode,
    system: str | None,
    question: str,
    answer: str,
    completion: str,
) -> ToggleSample:
    if system is None:
        prompt = [{"role": "user", "content": question}]
    else:
        prompt = reasoning_messages(question, thinking=system == THINKING_ON)
    return ToggleSample(
        prompt_id=prompt_id,
        task=task,
        mode=mode,
        system=system,
        question=question,
        answer=answer,
        completion=completion,
        chat=tokenize_conversation(tokenizer, [*prompt, {"role": "assistant", "content": completion}]),
    )


def _without_end(chat: ChatSample) -> ChatSample:
    """Return the conversation with its end token, which was never sampled, not trained."""
    end = max(place for place, is_trained in enumerate(chat.trained_mask) if is_trained)
    return ChatSample(ids=chat.ids, trained_mask=(*chat.trained_mask[:end], False, *chat.trained_mask[end + 1 :]))
