"""Filters of reasoning data: each a function from rows to a reason per row, run in order, with counts in and out.

A step sees all rows that the steps before it kept, so that votes, duplicates and pairs are steps like the others.
Source: Llama-Nemotron, section 3.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipeline.data.chat import (
    THINK_CLOSE,
    THINK_OPEN,
    THINKING_OFF,
    THINKING_ON,
    ChatSample,
    special_tokens,
    split_thinking,
    tokenize_conversation,
)
from pipeline.data.decontamination import NgramSet
from pipeline.reasoning.rows import TraceRow

# The reason why each row is dropped, or None for a row that is kept; as long as the rows.
Verdicts = list[str | None]
Step = Callable[[Sequence[TraceRow]], Verdicts]

CHAT = "chat"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """A row that a step dropped, and why."""

    row: TraceRow
    step: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCount:
    """What one step was given, what it let through, and how often it gave each reason."""

    step: str
    num_in: int
    num_out: int
    reasons: dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Filtered:
    """What is left after all steps, what is not, and the counts of every step."""

    kept: tuple[TraceRow, ...]
    dropped: tuple[Dropped, ...]
    counts: tuple[StepCount, ...]


def run_steps(rows: Sequence[TraceRow], steps: Sequence[tuple[str, Step]]) -> Filtered:
    """Run steps in order, each on what is left; order of rows is kept."""
    kept = list(rows)
    dropped: list[Dropped] = []
    counts: list[StepCount] = []
    for name, step in steps:
        verdicts = step(kept)
        reasons = Counter(reason for reason in verdicts if reason is not None)
        dropped += [
            Dropped(row=row, step=name, reason=reason)
            for row, reason in zip(kept, verdicts, strict=True)
            if reason is not None
        ]
        num_in = len(kept)
        kept = [row for row, reason in zip(kept, verdicts, strict=True) if reason is None]
        counts.append(StepCount(step=name, num_in=num_in, num_out=len(kept), reasons=dict(sorted(reasons.items()))))
    return Filtered(kept=tuple(kept), dropped=tuple(dropped), counts=tuple(counts))


def each(judge: Callable[[TraceRow], str | None]) -> Step:
    """Return the step that judges every row alone."""
    return lambda rows: [judge(row) for row in rows]


def licence_step(allowed: Collection[str]) -> Step:
    """Drop rows whose licence is not on the list; letters' case does not matter."""
    known = {name.casefold() for name in allowed}
    return each(lambda row: None if row.license.strip().casefold() in known else f"licence {row.license!r}")


def form_step(tokenizer: PreTrainedTokenizerBase) -> Step:
    """Drop rows that are no conversation, whose toggle is not one, or whose thought is malformed."""
    tokens = special_tokens(tokenizer).values()
    return each(lambda row: _conversation_flaw(row, tokens) or _thought_flaw(row))


def _conversation_flaw(row: TraceRow, tokens: Collection[str]) -> str | None:
    roles = [role for role, _ in row.input]
    if "system" in roles:
        return "instructions in the system turn"
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] or not row.prompt_text.strip():
        return "turns do not alternate from user to user"
    if row.system_prompt not in (THINKING_ON, THINKING_OFF, ""):
        return "instructions in the system turn"
    if row.system_prompt and row.system_prompt != {"on": THINKING_ON, "off": THINKING_OFF}.get(row.reasoning):
        return "system prompt and reasoning disagree"
    if any(token in text for token in tokens for text in (row.prompt_text, row.output)):
        return "special token in the text"
    return None


def _thought_flaw(row: TraceRow) -> str | None:
    if THINK_OPEN in row.prompt_text or THINK_CLOSE in row.prompt_text:
        return "think tag in the prompt"
    parse = split_thinking(row.output)
    if row.mode != "on":
        if parse.num_blocks:
            return "think tag with thinking off"
        if not row.output.strip():
            return "no answer"
        # A cut chat turn is trained without an end; a cut solution has no answer.
        return None if row.is_complete or row.category == CHAT else "cut off"
    num_open, num_close = row.output.count(THINK_OPEN), row.output.count(THINK_CLOSE)
    if num_open == 0:
        return "thought never opens"
    if num_close == 0:
        return "thought never closes"
    if num_open > 1 or num_close > 1:
        return "several thoughts"
    if not row.output.lstrip().startswith(THINK_OPEN):
        return "words before the thought"
    if parse.trace is None:
        return "thought closes before it opens"
    if not parse.trace:
        return "empty thought"
    if not parse.answer:
        return "no answer"
    return None if row.is_complete else "cut off"


class TokenisedRows:
    """Rows as trained conversations; each is tokenised once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._chats: dict[str, ChatSample] = {}

    def chat(self, row: TraceRow) -> ChatSample:
        """Return a row's tokens and which of them are trained."""
        if row.row_id not in self._chats:
            messages = [{"role": role, "content": content.strip()} for role, content in row.input]
            if row.system_prompt:
                messages.insert(0, {"role": "system", "content": row.system_prompt})
            messages.append({"role": "assistant", "content": row.output.strip()})
            chat = tokenize_conversation(self._tokenizer, messages)
            # Only the last turn is the generator's: those before it stand in the prompt.
            prompt_end = max(
                place for place in range(len(chat.ids)) if not chat.trained_mask[place - 1] and chat.trained_mask[place]
            )
            trained = tuple(is_trained and place >= prompt_end for place, is_trained in enumerate(chat.trained_mask))
            if not row.is_complete:
                end = max(place for place, is_trained in enumerate(trained) if is_trained)
                trained = (*trained[:end], False, *trained[end + 1 :])
            self._chats[row.row_id] = ChatSample(ids=chat.ids, trained_mask=trained)
        return self._chats[row.row_id]

    def length_step(self, *, max_prompt_tokens: int, max_output_tokens: int, max_tokens: int) -> Step:
        """Drop rows whose prompt, output or whole conversation is longer."""

        def judge(row: TraceRow) -> str | None:
            chat = self.chat(row)
            num_prompt = chat.trained_mask.index(True)
            if num_prompt > max_prompt_tokens:
                return f"prompt longer than {max_prompt_tokens:,} tokens"
            if chat.num_trained_tokens > max_output_tokens:
                return f"output longer than {max_output_tokens:,} tokens"
            return f"longer than a window of {max_tokens:,} tokens" if len(chat.ids) > max_tokens else None

        return each(judge)


def exact_duplicates_step(rows: Sequence[TraceRow]) -> Verdicts:
    """Drop rows whose whole conversation stood before; case and spacing do not matter."""
    seen: set[tuple[str, str, str]] = set()
    verdicts: Verdicts = []
    for row in rows:
        key = (row.system_prompt, _folded(row.prompt_text), _folded(row.output))
        verdicts.append("exact duplicate" if key in seen else None)
        seen.add(key)
    return verdicts


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationGuard:
    """What evaluation asks: its questions as they are, all its n-grams, and those of text and multiple choice alone.

    Questions of one reasoning task share their wording with the task's evaluation questions by construction: rows made
    from a task are told apart as whole questions, and compared with the n-grams of all other sets.
    """

    questions: frozenset[str]
    all_ngrams: NgramSet
    text_ngrams: NgramSet

    def step(self) -> Step:
        """Drop rows that ask what evaluation asks, or share an n-gram with it in prompt or output."""
        folded = {_folded(question) for question in self.questions}

        def judge(row: TraceRow) -> str | None:
            if any(_folded(content) in folded for _, content in row.input):
                return "an evaluation question"
            ngrams = self.all_ngrams if row.item is None else self.text_ngrams
            if ngrams.shares_ngram(f"{row.prompt_text}\n{row.output}"):
                return "shares an n-gram with an evaluation set"
            return None

        return each(judge)


def pairs_step(rows: Sequence[TraceRow]) -> Verdicts:
    """Drop rows with a mode whose prompt is not there in the other; chat needs no thought."""
    modes: dict[str, set[str]] = {}
    for row in rows:
        modes.setdefault(row.prompt_id, set()).add(row.mode)
    return [
        None if row.category == CHAT or {"on", "off"} <= modes[row.prompt_id] else "prompt is there in one mode only"
        for row in rows
    ]


def num_unpaired_prompts(rows: Iterable[TraceRow]) -> int:
    """Return how many prompts other than chat are not there in both modes."""
    modes: dict[str, set[str]] = {}
    for row in rows:
        if row.category != CHAT:
            modes.setdefault(row.prompt_id, set()).add(row.mode)
    return sum(not {"on", "off"} <= found for found in modes.values())
