"""reasoning_toggle_dataset: the rows of reasoning_traces filtered, paired, blended and packed, with a dataset card."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import write_atomically
from pipeline.data.evaluation_sets import build_text_ngrams, load_evaluated_questions, load_evaluation_ngrams
from pipeline.data.packed import blend_split, save_packed
from pipeline.data.packing import SamplePacking, pack_samples
from pipeline.errors import DataError
from pipeline.model.checkpoint import load_tokenizer
from pipeline.reasoning.filtering import CHAT, EvaluationGuard, Filtered, TokenisedRows, num_unpaired_prompts
from pipeline.reasoning.grading import Grader
from pipeline.reasoning.rows import ROWS_FILE, read_rows
from pipeline.reasoning.toggle_dataset import (
    Split,
    ToggleSample,
    blend_samples,
    counts_by_category,
    filter_rows,
    mask_preview,
    num_unverified,
    split_samples,
)
from pipeline.reasoning.verification import VERIFIER_FAILED, WRONG
from pipeline.report.dataset_card import CARD_FILE, render_dataset_card
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.stages.configs import ToggleDatasetStage

SAMPLES_FILE = "samples.parquet"
DROPPED_FILE = "dropped.parquet"
_NUM_SHOWN = 12
_CATEGORY_COLUMNS = ("category", "total", "on", "off", "unset", "share", "num_tokens", "num_trained_tokens")


def run(config: ToggleDatasetStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Filter, split, blend, pack and write."""
    dataset = config.dataset
    evaluation_dir = inputs["evaluation_sets"]
    tokenizer = load_tokenizer(inputs["parent_checkpoint"])
    rows = read_rows(inputs["reasoning_traces"] / ROWS_FILE)
    guard = EvaluationGuard(
        questions=frozenset(load_evaluated_questions(evaluation_dir)),
        all_ngrams=load_evaluation_ngrams(evaluation_dir),
        text_ngrams=build_text_ngrams(evaluation_dir, num_words=config.ngram_tokens),
    )
    tokens = TokenisedRows(tokenizer)
    num_verified = 0

    def on_verified() -> None:
        nonlocal num_verified
        num_verified += 1
        if num_verified % 100 == 0:
            inputs.reporter.step(num_verified, len(rows), what="answers verified")

    with Grader(timeout_s=dataset.filters.verifier_timeout_s) as grader:
        filtered = filter_rows(
            rows,
            config=dataset.filters,
            tokens=tokens,
            tokenizer=tokenizer,
            guard=guard,
            grader=grader,
            max_tokens=dataset.sequence_length,
            on_verified=on_verified,
        )
    samples = [ToggleSample(row=row, chat=tokens.chat(row)) for row in filtered.kept]
    if not samples:
        raise DataError(f"no row is left of {len(rows):,}: {_where_rows_went(filtered)}")
    split = split_samples(samples, seed=dataset.seed)
    packed: dict[str, SamplePacking] = {}
    blends: dict[str, list[ToggleSample]] = {}
    for blend in dataset.blends:
        blends[blend.name] = blend_samples(split.train, config=blend)
        packed[blend.name] = _pack(blends[blend.name], tokenizer, sequence_length=dataset.sequence_length)
        save_packed(out_dir, blend_split(blend.name), packed[blend.name].packed)
    validation = _pack(split.validation, tokenizer, sequence_length=dataset.sequence_length)
    save_packed(out_dir, "validation", validation.packed)
    _write_samples(out_dir / SAMPLES_FILE, split)
    _write_dropped(out_dir / DROPPED_FILE, filtered)

    tables = {
        "filters": _filters_table(filtered),
        "drop_reasons": _reasons_table(filtered),
        "samples_per_category": Table.of(_CATEGORY_COLUMNS, counts_by_category(samples)),
        "generators": _generators_table(samples),
        "blends": Table.of(
            ("blend", *_CATEGORY_COLUMNS),
            [(name, *row) for name, chosen in blends.items() for row in counts_by_category(chosen)],
        ),
        "samples": _samples_table(split.train),
    }
    card = render_dataset_card(
        languages=dataset.filters.languages,
        tables={name: tables[name] for name in tables if name != "samples"},
    )
    write_atomically(out_dir / CARD_FILE, card.encode())
    num_tokens = sum(len(sample.chat.ids) for sample in samples)
    num_trained_tokens = sum(sample.num_trained_tokens for sample in samples)
    reasons = Counter({reason: number for count in filtered.counts for reason, number in count.reasons.items()})
    return StageResult(
        metrics={
            "num_rows": len(rows),
            "num_samples": len(samples),
            "num_pairs": _num_pairs(samples),
            "num_chat": sum(sample.row.category == CHAT for sample in samples),
            "num_validation_samples": len(split.validation),
            "num_tokens": num_tokens,
            "num_trained_tokens": num_trained_tokens,
            "trained_token_share": num_trained_tokens / num_tokens,
            "num_packed_tokens": sum(packing.packed.num_tokens for packing in packed.values()),
            "num_padding_tokens": sum(packing.num_padding_tokens for packing in packed.values()),
            "num_wrong_answers": reasons[WRONG],
            "num_verifier_failures": sum(
                number for reason, number in reasons.items() if reason.startswith(VERIFIER_FAILED)
            ),
            "num_unverified_traces_kept": num_unverified(filtered.kept),
            "num_contaminated_kept": sum(verdict is not None for verdict in guard.step()(filtered.kept)),
            "num_unpaired_prompts": num_unpaired_prompts(filtered.kept) if dataset.filters.require_pairs else 0,
        },
        tables=tables,
        markdown={"mask_preview": _preview(split.train, tokenizer), "card": card},
    )


def _where_rows_went(filtered: Filtered) -> str:
    return "; ".join(
        f"{count.step} dropped {count.num_in - count.num_out:,} ({', '.join(count.reasons)})"
        for count in filtered.counts
        if count.reasons
    )


def _num_pairs(samples: Sequence[ToggleSample]) -> int:
    modes: dict[str, set[str]] = {}
    for sample in samples:
        modes.setdefault(sample.row.prompt_id, set()).add(sample.row.mode)
    return sum({"on", "off"} <= found for found in modes.values())


def _pack(
    samples: Sequence[ToggleSample], tokenizer: PreTrainedTokenizerBase, *, sequence_length: int
) -> SamplePacking:
    if not samples:
        raise DataError(
            "the toggle dataset has no samples left for one of its blends or for validation: raise "
            "reasoning_traces.items_per_task, or loosen reasoning_toggle_dataset.filters"
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(pad_id, int)
    return pack_samples([sample.chat for sample in samples], sequence_length=sequence_length, pad_id=pad_id)


def _write_samples(path: Path, split: Split) -> None:
    pl.DataFrame(
        [
            {
                "id": f"{sample.row.prompt_id}/{sample.row.row_id}",
                "split": name,
                "source": sample.row.source,
                "category": sample.row.category,
                "task": sample.row.task,
                "mode": sample.row.mode,
                "system_prompt": sample.row.system_prompt,
                "question": sample.row.input[-1][1],
                "output": sample.row.output,
                "license": sample.row.license,
                "generator": sample.row.generator,
                "num_tokens": len(sample.chat.ids),
                "num_trained_tokens": sample.num_trained_tokens,
            }
            for name, samples in (("train", split.train), ("validation", split.validation))
            for sample in samples
        ]
    ).write_parquet(path)


def _write_dropped(path: Path, filtered: Filtered) -> None:
    columns = ("step", "reason", "source", "category", "question", "output")
    pl.DataFrame(
        [
            (
                dropped.step,
                dropped.reason,
                dropped.row.source,
                dropped.row.category,
                dropped.row.prompt_text,
                dropped.row.output,
            )
            for dropped in filtered.dropped
        ],
        schema=dict.fromkeys(columns, pl.String),
        orient="row",
    ).write_parquet(path)


def _filters_table(filtered: Filtered) -> Table:
    return Table.of(
        ("step", "num_in", "num_out", "num_dropped"),
        [(count.step, count.num_in, count.num_out, count.num_in - count.num_out) for count in filtered.counts],
    )


def _reasons_table(filtered: Filtered) -> Table:
    return Table.of(
        ("step", "reason", "num_rows"),
        [(count.step, reason, number) for count in filtered.counts for reason, number in count.reasons.items()],
    )


def _generators_table(samples: Sequence[ToggleSample]) -> Table:
    counts = Counter((sample.row.source, sample.row.generator, sample.row.license) for sample in samples)
    return Table.of(("source", "generator", "licence", "num_samples"), [(*key, counts[key]) for key in sorted(counts)])


def _samples_table(samples: Sequence[ToggleSample]) -> Table:
    return Table.of(
        ("source", "task", "mode", "question", "output", "num_tokens", "num_trained_tokens"),
        [
            (
                sample.row.source,
                sample.row.task,
                sample.row.mode,
                sample.row.input[-1][1],
                sample.row.output,
                len(sample.chat.ids),
                sample.num_trained_tokens,
            )
            for sample in samples[:_NUM_SHOWN]
        ],
    )


def _preview(samples: Sequence[ToggleSample], tokenizer: PreTrainedTokenizerBase) -> str:
    """One sample of each mode; bold is what carries loss."""
    first = {sample.row.mode: sample for sample in reversed(samples)}
    lines = [
        f"{sample.row.task}, {mode}: {mask_preview(sample, tokenizer=tokenizer)}"
        for mode, sample in sorted(first.items())
    ]
    return "Trained tokens are bold.\n\n" + "\n\n".join(lines)
