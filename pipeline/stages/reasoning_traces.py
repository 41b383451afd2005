"""reasoning_traces: rows before any filter, from solvers, the parent's chat, endpoints and imported sets.

    python -m pipeline materialize reasoning_traces

An artifact of its own, because it is what costs: filters and blends change without a request being sent again.
"""

from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.data.evaluation_sets import load_evaluated_questions
from pipeline.model.checkpoint import load_model, load_tokenizer
from pipeline.reasoning.endpoint import Pacing, Reply
from pipeline.reasoning.imported import read_imported
from pipeline.reasoning.rows import ROWS_FILE, TraceRow, write_rows
from pipeline.reasoning.self_chat import SelfChat, sample_self_chat
from pipeline.reasoning.trace_sources import chat_rows, endpoint_prompts, endpoint_rows, solver_rows, task_items
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.stages.configs import TracesStage
from pipeline.training.distributed import use_threads

_NUM_SHOWN = 12


def run(config: TracesStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Collect the rows of every source and write rows.parquet."""
    use_threads(inputs.execution.num_threads)
    traces = config.traces
    items = task_items(
        config.reasoning_tasks,
        items_per_task=traces.items_per_task,
        seed=traces.seed,
        exclude_questions=load_evaluated_questions(inputs["evaluation_sets"]),
    )
    num_unsolved: Counter[str] = Counter()
    rows = solver_rows(items, num_unsolved=num_unsolved)
    inputs.reporter.note(f"{len(rows)} rows written by solvers")
    chat = _sample_chat(config, inputs, load_tokenizer(inputs["parent_checkpoint"]))
    rows += chat_rows(chat.turns, licence=config.parent_licence)
    for source in traces.imports:
        imported = read_imported(source)
        inputs.reporter.note(f"{len(imported)} rows imported from {source.name}")
        rows += imported
    execution = inputs.execution
    pacing = Pacing(
        requests_per_minute=execution.requests_per_minute,
        in_flight=execution.requests_in_flight,
        timeout_s=execution.request_timeout_s,
    )
    replies: dict[str, list[Reply]] = {}
    for endpoint in traces.endpoints:
        prompts = endpoint_prompts(endpoint, items=items)
        total = len(prompts) * endpoint.num_samples
        made, replies[endpoint.name] = endpoint_rows(
            endpoint,
            prompts,
            pacing=pacing,
            log_dir=inputs.downloads / "replies",
            on_reply=lambda number, total=total, name=endpoint.name: inputs.reporter.step(
                number, total, what=f"replies of {name}"
            ),
        )
        rows += made
    write_rows(out_dir / ROWS_FILE, rows)
    return StageResult(
        metrics={
            "num_rows": len(rows),
            "num_sources": len({row.source for row in rows}),
            "num_unsolved_items": num_unsolved.total(),
            "num_dropped_chat": sum(chat.num_dropped.values()),
            "num_replies": sum(map(len, replies.values())),
            "num_prompt_tokens": sum(reply.num_prompt_tokens for found in replies.values() for reply in found),
            "num_completion_tokens": sum(reply.num_completion_tokens for found in replies.values() for reply in found),
        },
        tables={
            "sources": _sources_table(rows, replies),
            "dropped_chat": Table.of(("reason", "num_conversations"), list(chat.num_dropped.items())),
            "rows": Table.of(
                ("source", "category", "reasoning", "question", "output"),
                [
                    (row.source, row.category, row.reasoning, row.input[-1][1], row.output)
                    for row in rows[:: max(1, len(rows) // _NUM_SHOWN)]
                ],
            ),
        },
    )


def _sample_chat(config: TracesStage, inputs: StageInputs, tokenizer: PreTrainedTokenizerBase) -> SelfChat:
    if config.traces.chat.num_samples == 0:
        return SelfChat(turns=(), num_dropped={})
    model = load_model(inputs["parent_checkpoint"], dtype=torch.bfloat16)
    torch.nn.Module.to(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return sample_self_chat(
        model, tokenizer, config=config.traces.chat, seed=config.traces.seed, reporter=inputs.reporter
    )


def _sources_table(rows: list[TraceRow], replies: dict[str, list[Reply]]) -> Table:
    columns = ("source", "generator", "licence", "num_rows", "num_on", "num_cut_off", "prompt_tokens", "output_tokens")
    groups: dict[tuple[str, str, str], list[TraceRow]] = {}
    for row in rows:
        groups.setdefault((row.source, row.generator, row.license), []).append(row)
    return Table.of(
        columns,
        [
            (
                *key,
                len(group),
                sum(row.reasoning == "on" for row in group),
                sum(not row.is_complete for row in group),
                sum(reply.num_prompt_tokens for reply in replies.get(key[0], [])) or None,
                sum(reply.num_completion_tokens for reply in replies.get(key[0], [])) or None,
            )
            for key, group in groups.items()
        ],
    )
