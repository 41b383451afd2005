"""One checkpoint through the whole harness: text, multiple choice, and reasoning in both modes.

HARNESS_VERSION is raised by hand whenever a figure would come out differently for the same checkpoint and sets.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.costs import num_parameters
from pipeline.data.benchmarks import MultipleChoiceItem
from pipeline.data.evaluation_sets import (
    load_held_out,
    load_held_out_items,
    load_instruction_items,
    load_multiple_choice,
    load_reasoning_items,
)
from pipeline.data.instruction_items import InstructionItem
from pipeline.data.mixtures import opening_ids, separator_id
from pipeline.data.reasoning_items import ReasoningItem
from pipeline.evaluation.chains import chain_health
from pipeline.evaluation.instructions import instruction_qualities
from pipeline.evaluation.multiple_choice import multiple_choice_quality
from pipeline.evaluation.perplexity import ParentText, cut_windows, sum_over_windows, text_quality
from pipeline.evaluation.results import BothModes, CheckpointEvaluation, Mode, SampleAnswer
from pipeline.evaluation.robustness import VARIANTS, robustness_rows
from pipeline.evaluation.sampled import num_sampled_batches, sampled_quality
from pipeline.evaluation.toggle import Answer, answer_items, mode_quality
from pipeline.model.checkpoint import TORCH_DTYPES, load_model, load_tokenizer
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.recipe import EvaluationConfig

HARNESS_VERSION = 6
MAX_SAMPLES = 6
OTHER_DIFFICULTY = "trained family, other difficulty"
OTHER_FAMILY = "family not trained on"


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """What every checkpoint is measured on, tokenised once with the parent's tokenizer."""

    config: EvaluationConfig
    tokenizer: PreTrainedTokenizerFast
    windows: dict[str, Tensor]
    multiple_choice: dict[str, list[MultipleChoiceItem]]
    reasoning: list[ReasoningItem]
    held_out_tasks: dict[str, list[ReasoningItem]]
    instructions: list[InstructionItem]

    @property
    def num_batches(self) -> int:
        """How many batches one checkpoint takes."""
        rows = [len(windows) for windows in self.windows.values()]
        rows += [sum(len(item.choices) for item in items) for items in self.multiple_choice.values()]
        rows += [len(self.reasoning)] * 2
        rows += [len(items) for items in self.held_out_tasks.values()] * 2
        rows += [len(self.instructions)] * 2
        rows += [len(VARIANTS) * len(self.reasoning[: self.config.robustness_items])]
        batch_size, sampled = self.config.batch_size, self.config.sampled
        num_sampled = num_sampled_batches(
            len(self.reasoning[: sampled.num_items]), config=sampled, batch_size=batch_size
        )
        return num_sampled + sum(math.ceil(num_rows / batch_size) for num_rows in rows)


def load_suite(sets_dir: Path, *, parent_dir: Path, config: EvaluationConfig) -> Suite:
    """Read the evaluation sets and cut the held-out text into windows."""
    tokenizer = load_tokenizer(parent_dir)
    return Suite(
        config=config,
        tokenizer=tokenizer,
        windows={
            name: text_windows(
                texts, tokenizer, sequence_length=config.sequence_length, max_tokens=config.text_tokens_per_set
            )
            for name, texts in sorted(load_held_out(sets_dir).items())
        },
        multiple_choice=dict(sorted(load_multiple_choice(sets_dir).items())),
        reasoning=_mixed(load_reasoning_items(sets_dir)),
        held_out_tasks=group_held_out(load_held_out_items(sets_dir), trained=load_reasoning_items(sets_dir)),
        instructions=load_instruction_items(sets_dir),
    )


def text_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, sequence_length: int, max_tokens: int
) -> Tensor:
    """Return held-out documents as windows, `tokens_WT`, each begun and ended as documents of a mixture are."""
    opening = opening_ids(tokenizer)
    return cut_windows(
        ([*opening, *tokenizer.encode(text, add_special_tokens=False)] for text in texts),
        separator=separator_id(tokenizer),
        sequence_length=sequence_length,
        max_tokens=max_tokens,
    )


def group_held_out(
    items: Sequence[ReasoningItem], *, trained: Sequence[ReasoningItem]
) -> dict[str, list[ReasoningItem]]:
    """Return items by what training has seen of their task: its family at another difficulty, or nothing."""
    families = {item.task for item in trained}
    groups: dict[str, list[ReasoningItem]] = {}
    for item in items:
        groups.setdefault(OTHER_DIFFICULTY if item.task in families else OTHER_FAMILY, []).append(item)
    return groups


def _mixed(items: Sequence[ReasoningItem]) -> list[ReasoningItem]:
    """Return items task by turn, so that the first few are of every task."""
    by_task: dict[str, list[ReasoningItem]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item)
    return [item for turn in itertools.zip_longest(*by_task.values()) for item in turn if item is not None]


def load_for_evaluation(checkpoint_dir: Path, *, config: EvaluationConfig) -> HeterogeneousLlamaForCausalLM:
    """Load a checkpoint in the precision of the harness, on the accelerator where there is one."""
    model = load_model(checkpoint_dir, dtype=TORCH_DTYPES[config.precision])
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # pyright: ignore[reportArgumentType]


def parent_texts(parent: HeterogeneousLlamaForCausalLM, *, suite: Suite) -> dict[str, ParentText]:
    """Run the parent once over every text set."""
    return {
        name: ParentText.of(parent, windows_WT=windows_WT, batch_size=suite.config.batch_size)
        for name, windows_WT in suite.windows.items()
    }


def evaluate_checkpoint(
    model: HeterogeneousLlamaForCausalLM,
    *,
    name: str,
    suite: Suite,
    parent: Mapping[str, ParentText] | None,
    reporter: Reporter,
) -> CheckpointEvaluation:
    """Measure one checkpoint; without `parent` the checkpoint is the parent itself (KL 0, agreement 1)."""
    config, tokenizer = suite.config, suite.tokenizer
    num_done = 0

    def on_batch() -> None:
        nonlocal num_done
        num_done += 1
        reporter.step(num_done, suite.num_batches, what=f"evaluation batches of {name}")

    sums = {
        set_name: sum_over_windows(
            model,
            windows_WT=windows_WT,
            batch_size=config.batch_size,
            parent=None if parent is None else parent[set_name],
            on_batch=on_batch,
        )
        for set_name, windows_WT in suite.windows.items()
    }
    choices = {
        set_name: multiple_choice_quality(
            model,
            items=items,
            tokenizer=tokenizer,
            max_tokens=config.sequence_length,
            batch_size=config.batch_size,
            on_batch=on_batch,
        )
        for set_name, items in suite.multiple_choice.items()
    }

    def answers_in(mode: Mode, items: list[ReasoningItem]) -> list[Answer]:
        return answer_items(
            model,
            items=items,
            mode=mode,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens[mode],
            batch_size=config.batch_size,
            on_batch=on_batch,
        )

    max_new_tokens: dict[Mode, int] = {"on": config.max_new_tokens_on, "off": config.max_new_tokens_off}
    answers_on = answers_in("on", suite.reasoning)
    answers_off = answers_in("off", suite.reasoning)
    held_out = {
        group: BothModes(
            thinking_on=mode_quality(answers_in("on", items), mode="on", max_new_tokens=max_new_tokens["on"]),
            thinking_off=mode_quality(answers_in("off", items), mode="off", max_new_tokens=max_new_tokens["off"]),
        )
        for group, items in suite.held_out_tasks.items()
    }
    instructions = instruction_qualities(
        model,
        items=suite.instructions,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=config.batch_size,
        on_batch=on_batch,
    )
    robustness = robustness_rows(
        model,
        items=suite.reasoning[: config.robustness_items],
        tokenizer=tokenizer,
        max_new_tokens=config.max_new_tokens_on,
        batch_size=config.batch_size,
        on_batch=on_batch,
    )
    sampled = sampled_quality(
        model,
        items=suite.reasoning[: config.sampled.num_items],
        config=config.sampled,
        tokenizer=tokenizer,
        max_new_tokens=config.max_new_tokens_on,
        batch_size=config.batch_size,
        on_batch=on_batch,
    )
    first_of_task = {item.task: index for index, item in reversed(list(enumerate(suite.reasoning)))}
    return CheckpointEvaluation(
        harness_version=HARNESS_VERSION,
        precision=config.precision,
        template_sha256=hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        num_parameters=num_parameters(model.architecture),
        text_overall=text_quality(list(sums.values())),
        text={set_name: text_quality([part]) for set_name, part in sums.items()},
        multiple_choice=choices,
        thinking_on=mode_quality(answers_on, mode="on", max_new_tokens=config.max_new_tokens_on),
        thinking_off=mode_quality(answers_off, mode="off", max_new_tokens=config.max_new_tokens_off),
        held_out_tasks=held_out,
        instructions=instructions,
        robustness=robustness,
        sampled=sampled,
        chains=chain_health([answer.text for answer in answers_on]),
        samples=tuple(
            SampleAnswer(
                task=suite.reasoning[index].task,
                question=suite.reasoning[index].question,
                reference=suite.reasoning[index].answer,
                thinking_on=answers_on[index].text,
                thinking_off=answers_off[index].text,
            )
            for index in sorted(first_of_task.values())[:MAX_SAMPLES]
        ),
    )
