"""The reasoning-toggle dataset: filtered rows as trained conversations, blended, ordered and split. No files.

With thinking on the reply is `<think>` trace `</think>` answer, with thinking off the answer alone, to the same
question: the system prompt is all that differs. Source: Llama-Nemotron, sections 3 and 4.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipeline.data.chat import ChatSample, split_thinking
from pipeline.data.reasoning_items import score_answer
from pipeline.errors import DataError
from pipeline.reasoning.filtering import (
    EvaluationGuard,
    Filtered,
    Step,
    TokenisedRows,
    each,
    exact_duplicates_step,
    form_step,
    licence_step,
    pairs_step,
    run_steps,
)
from pipeline.reasoning.grading import Grader
from pipeline.reasoning.near_duplicates import near_duplicates_flaws
from pipeline.reasoning.rows import Mode, TraceRow
from pipeline.reasoning.text_filters import check_languages, code_flaw, language_flaw, repetition_flaw
from pipeline.reasoning.verification import verification_step, vote_step
from pipeline.recipe import BlendConfig, FiltersConfig

VALIDATION_SHARE = 0.05

_MODE_NAMES: Mapping[Mode, str] = {"on": "thinking_on", "off": "thinking_off", "none": "unset"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ToggleSample:
    """One row and its tokens."""

    row: TraceRow
    chat: ChatSample

    @property
    def num_trained_tokens(self) -> int:
        """Tokens of the reply."""
        return self.chat.num_trained_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Samples in an order that depends on the seed alone; no prompt stands on both sides."""

    train: tuple[ToggleSample, ...]
    validation: tuple[ToggleSample, ...]


def filter_rows(
    rows: Sequence[TraceRow],
    *,
    config: FiltersConfig,
    tokens: TokenisedRows,
    tokenizer: PreTrainedTokenizerBase,
    guard: EvaluationGuard,
    grader: Grader,
    max_tokens: int,
    on_verified: Callable[[], None],
) -> Filtered:
    """Run every filter; what needs nothing but the row comes first."""
    check_languages(config.languages)
    repetition, near = config.repetition, config.near_duplicates

    def near_duplicates(found: Sequence[TraceRow]) -> list[str | None]:
        return near_duplicates_flaws(found, shingle_words=near.shingle_words, min_jaccard=near.min_jaccard)

    steps: list[tuple[str, Step]] = [
        ("licence", licence_step(config.licences)),
        ("form", form_step(tokenizer)),
        (
            "length",
            tokens.length_step(
                max_prompt_tokens=config.max_prompt_tokens,
                max_output_tokens=config.max_output_tokens,
                max_tokens=max_tokens,
            ),
        ),
        ("language", each(lambda row: language_flaw(row, languages=config.languages))),
        (
            "repetition",
            each(lambda row: repetition_flaw(row, num_words=repetition.ngram_words, max_share=repetition.max_share)),
        ),
        ("code", each(code_flaw)),
        # Before duplicates go: replies that are the same are the votes.
        ("vote", vote_step(grader, min_samples=config.vote.min_samples, min_share=config.vote.min_share)),
        ("exact duplicates", exact_duplicates_step),
        ("near duplicates", near_duplicates),
        ("decontamination", guard.step()),
        ("verification", verification_step(grader, on_row=on_verified)),
    ]
    if config.require_pairs:
        steps.append(("pairs", pairs_step))
    return run_steps(rows, steps)


def split_samples(samples: Sequence[ToggleSample], *, seed: int) -> Split:
    """Shuffle, and set aside VALIDATION_SHARE of the prompts, at least one, with all their modes."""
    generator = random.Random(f"toggle/{seed}")
    prompts = list(dict.fromkeys(sample.row.prompt_id for sample in samples))
    num_validation = max(1, round(VALIDATION_SHARE * len(prompts)))
    validation_prompts = set(generator.sample(prompts, min(num_validation, len(prompts))))
    shuffled = generator.sample(samples, len(samples))
    return Split(
        train=tuple(sample for sample in shuffled if sample.row.prompt_id not in validation_prompts),
        validation=tuple(sample for sample in shuffled if sample.row.prompt_id in validation_prompts),
    )


def blend_samples(samples: Sequence[ToggleSample], *, config: BlendConfig) -> list[ToggleSample]:
    """Return the samples of one blend in training order.

    With weights w_c and N_c prompts of category c, floor(w_c min_k(N_k / w_k)) prompts of each are taken, the first in
    the order given: the largest set with these shares in which nothing is repeated.

    Raises:
        DataError: when a category of the weights has no prompts in these modes.
    """
    chosen = [sample for sample in samples if _MODE_NAMES[sample.row.mode] in config.modes]
    if config.weights:
        prompts: dict[str, dict[str, None]] = {category: {} for category in config.weights}
        for sample in chosen:
            prompts.get(sample.row.category, {})[sample.row.prompt_id] = None
        empty = sorted(category for category, found in prompts.items() if not found)
        if empty:
            raise DataError(
                f"blend {config.name} has no prompts of {', '.join(empty)} after filtering; there are "
                f"{', '.join(sorted({sample.row.category for sample in chosen}))}: correct its weights or modes"
            )
        unit = min(len(found) / config.weights[category] for category, found in prompts.items())
        taken = {
            prompt
            for category, found in prompts.items()
            for prompt in list(found)[: int(config.weights[category] * unit + 1e-9)]
        }
        chosen = [sample for sample in chosen if sample.row.category in prompts and sample.row.prompt_id in taken]
    return _short_first(chosen) if config.order == "short_first" else chosen


def _short_first(samples: Sequence[ToggleSample]) -> list[ToggleSample]:
    """Order by the reply's length within each mode, the modes interleaved in proportion: sample i of n goes to i/n."""
    keyed: list[tuple[float, str, ToggleSample]] = []
    for mode in _MODE_NAMES:
        of_mode = sorted(
            (sample for sample in samples if sample.row.mode == mode), key=lambda sample: sample.num_trained_tokens
        )
        keyed += [((place + 0.5) / len(of_mode), mode, sample) for place, sample in enumerate(of_mode)]
    return [sample for _, _, sample in sorted(keyed, key=lambda entry: entry[:2])]


def num_unverified(rows: Iterable[TraceRow]) -> int:
    """Return how many replies to tasks do not end in the right answer: the filter's claim, checked once more."""
    return sum(
        row.item is not None and score_answer(row.item, split_thinking(row.output).answer) != 1.0 for row in rows
    )


def counts_by_category(samples: Iterable[ToggleSample]) -> list[tuple[str, int, int, int, int, float, int, int]]:
    """Return per category: all, on, off and unset samples, share of all, tokens, trained tokens (paper, table 2)."""
    modes, tokens, trained = Counter[tuple[str, Mode]](), Counter[str](), Counter[str]()
    for sample in samples:
        category = sample.row.category
        modes[category, sample.row.mode] += 1
        tokens[category] += len(sample.chat.ids)
        trained[category] += sample.num_trained_tokens
    rows = []
    for category in sorted(tokens):
        on, off, unset = (modes[category, mode] for mode in _MODE_NAMES)
        num = on + off + unset
        rows.append((category, num, on, off, unset, num / modes.total(), tokens[category], trained[category]))
    return rows


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
