"""reasoning_toggle_dataset: verified tasks with detailed thinking on and off, and chat sampled from the parent."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.data.evaluation_sets import (
    build_text_ngrams,
    load_evaluation_ngrams,
    load_reasoning_items,
)
from pipeline.data.packed import save_packed
from pipeline.data.packing import SamplePacking, pack_samples
from pipeline.errors import DataError
from pipeline.model.checkpoint import load_model, load_tokenizer
from pipeline.reasoning.self_chat import SelfChat, sample_self_chat
from pipeline.reasoning.toggle_dataset import (
    CHAT,
    Split,
    ToggleSample,
    chat_samples,
    mask_preview,
    num_unpaired_prompts,
    num_unverified_traces,
    paired_samples,
    solve_tasks,
    split_samples,
    without_long_prompts,
)
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.stages.configs import ToggleDatasetStage
from pipeline.training.distributed import use_threads

SAMPLES_FILE = "samples.parquet"
_NUM_SHOWN = 12


def run(config: ToggleDatasetStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Solve the tasks, sample the chat, split, pack and write."""
    use_threads(inputs.execution.num_threads)
    dataset = config.dataset
    evaluation_dir = inputs["evaluation_sets"]
    tokenizer = load_tokenizer(inputs["parent_checkpoint"])
    solved = solve_tasks(
        config.reasoning_tasks,
        items_per_task=dataset.items_per_task,
        seed=dataset.seed,
        evaluation_questions={item.question for item in load_reasoning_items(evaluation_dir)},
        evaluation_ngrams=build_text_ngrams(evaluation_dir, num_words=config.ngram_tokens),
    )
    inputs.reporter.note(f"{len(solved.kept)} items solved and verified")
    chat = _sample_chat(config, inputs, tokenizer)
    made = [sample for item in solved.kept for sample in paired_samples(item, tokenizer=tokenizer)]
    made += chat_samples(chat.turns, tokenizer=tokenizer)
    samples = without_long_prompts(made, max_tokens=dataset.sequence_length)
    split = split_samples(samples, seed=dataset.seed)

    train = _pack(split.train, tokenizer, sequence_length=dataset.sequence_length)
    validation = _pack(split.validation, tokenizer, sequence_length=dataset.sequence_length)
    save_packed(out_dir, "train", train.packed)
    save_packed(out_dir, "validation", validation.packed)
    _write_samples(out_dir / SAMPLES_FILE, split)

    num_tokens = sum(len(sample.chat.ids) for sample in samples)
    num_trained_tokens = sum(sample.chat.num_trained_tokens for sample in samples)
    items = {solved_item.prompt_id: solved_item.item for solved_item in solved.kept}
    return StageResult(
        metrics={
            "num_samples": len(samples),
            "num_pairs": sum(sample.mode == "on" for sample in samples),
            "num_chat": sum(sample.task == CHAT for sample in samples),
            "num_validation_samples": len(split.validation),
            "num_tokens": num_tokens,
            "num_trained_tokens": num_trained_tokens,
            "trained_token_share": num_trained_tokens / num_tokens,
            "num_packed_tokens": train.packed.num_tokens,
            "num_padding_tokens": train.num_padding_tokens,
            "num_unverified_traces_kept": num_unverified_traces(samples, items=items),
            "num_unpaired_prompts": num_unpaired_prompts(samples),
            "num_dropped_too_long": len(made) - len(samples),
            "num_dropped_chat": sum(chat.num_dropped.values()),
            **{f"num_dropped_{reason}": number for reason, number in solved.num_dropped.items()},
        },
        tables={
            "samples_per_task": _counts_table(samples),
            "samples": _samples_table(split.train),
            "dropped_chat": Table.of(("reason", "num_conversations"), list(chat.num_dropped.items())),
        },
        markdown={"mask_preview": _preview(split.train, tokenizer)},
    )


def _sample_chat(config: ToggleDatasetStage, inputs: StageInputs, tokenizer: PreTrainedTokenizerBase) -> SelfChat:
    if config.dataset.chat.num_samples == 0:
        return SelfChat(turns=(), num_dropped={})
    model = load_model(inputs["parent_checkpoint"], dtype=torch.bfloat16)
    torch.nn.Module.to(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return sample_self_chat(
        model,
        tokenizer,
        config=config.dataset.chat,
        seed=config.dataset.seed,
        evaluation_ngrams=load_evaluation_ngrams(inputs["evaluation_sets"]),
        reporter=inputs.reporter,
    )


def _pack(
    samples: Sequence[ToggleSample], tokenizer: PreTrainedTokenizerBase, *, sequence_length: int
) -> SamplePacking:
    if not samples:
        raise DataError(
            "the toggle dataset has no samples left for one of its splits: raise "
            "reasoning_toggle_dataset.items_per_task or sequence_length"
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(pad_id, int)
    return pack_samples([sample.chat for sample in samples], sequence_length=sequence_length, pad_id=pad_id)


def _write_samples(path: Path, split: Split) -> None:
    pl.DataFrame(
        [
            {
                "id": sample.sample_id,
                "split": name,
                "task": sample.task,
                "mode": sample.mode,
                "system": sample.system,
                "question": sample.question,
                "answer": sample.answer,
                "completion": sample.completion,
                "num_tokens": len(sample.chat.ids),
                "num_trained_tokens": sample.chat.num_trained_tokens,
            }
            for name, samples in (("train", split.train), ("validation", split.validation))
            for sample in samples
        ],
        schema_overrides={"system": pl.String},
    ).write_parquet(path)


def _counts_table(samples: Sequence[ToggleSample]) -> Table:
    modes = Counter((sample.task, sample.mode) for sample in samples)
    tokens = Counter[str]()
    trained = Counter[str]()
    for sample in samples:
        tokens[sample.task] += len(sample.chat.ids)
        trained[sample.task] += sample.chat.num_trained_tokens
    return Table.of(
        ("task", "num_on", "num_off", "num_unset", "num_tokens", "num_trained_tokens"),
        [
            (task, modes[task, "on"], modes[task, "off"], modes[task, "none"], tokens[task], trained[task])
            for task in dict.fromkeys(sample.task for sample in samples)
        ],
    )


def _samples_table(samples: Sequence[ToggleSample]) -> Table:
    return Table.of(
        ("task", "mode", "question", "completion", "num_tokens"),
        [
            (sample.task, sample.mode, sample.question.strip(), sample.completion, len(sample.chat.ids))
            for sample in samples[:_NUM_SHOWN]
        ],
    )


def _preview(samples: Sequence[ToggleSample], tokenizer: PreTrainedTokenizerBase) -> str:
    """One sample of each mode; bold is what carries loss."""
    first = {sample.mode: sample for sample in reversed(samples)}
    lines = [
        f"{sample.task}, {mode}: {mask_preview(sample, tokenizer=tokenizer)}" for mode, sample in sorted(first.items())
    ]
    return "Trained tokens are bold.\n\n" + "\n\n".join(lines)
