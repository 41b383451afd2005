"""Where rows come from besides local files: solvers, the parent's own chat, models behind endpoints. No files."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasoning_gym.factory import DATASETS

from pipeline.data.chat import THINKING_OFF, THINKING_ON, format_thinking
from pipeline.data.reasoning_items import ReasoningItem, generate_items
from pipeline.errors import DataError
from pipeline.fingerprint import fingerprint
from pipeline.reasoning.endpoint import Endpoint, Pacing, Reply, ask_all
from pipeline.reasoning.filtering import CHAT
from pipeline.reasoning.rows import TraceRow
from pipeline.reasoning.self_chat import ChatTurn
from pipeline.reasoning.traces import write_trace
from pipeline.recipe import EndpointTraces, FilePrompts, ReasoningTask

SOLVERS = "solvers"
VERSION = "v1"
TASK_LICENCE = "Apache-2.0"  # of reasoning-gym's questions, and of what this project's solvers write


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question that an endpoint is asked, and how its replies are judged."""

    question: str
    category: str
    task: str
    truth: Any
    reference: str | None
    item: ReasoningItem | None


def task_items(
    tasks: Iterable[ReasoningTask], *, items_per_task: int, seed: int, exclude_questions: Set[str]
) -> list[ReasoningItem]:
    """Draw the items of every task; no question comes twice, and none that is excluded."""
    known = set(exclude_questions)
    items: list[ReasoningItem] = []
    for task in tasks:
        drawn = generate_items(task, num_items=items_per_task, seed=seed, exclude_questions=known, part="fine_tuning")
        known.update(item.question for item in drawn)
        items += drawn
    return items


def task_category(task: str) -> str:
    """Return the domain of a reasoning-gym task: arithmetic, algorithmic, algebra, ..."""
    return str(DATASETS[task][0].__module__).split(".")[1]


def solver_rows(items: Iterable[ReasoningItem], *, num_unsolved: Counter[str]) -> list[TraceRow]:
    """Return each item with its solver's trace and without it; `num_unsolved` counts items that a solver leaves."""
    rows: list[TraceRow] = []
    for item in items:
        trace = write_trace(item)
        if trace is None:
            num_unsolved[item.task] += 1
            continue
        for reasoning, system, output in (
            ("on", THINKING_ON, format_thinking(trace.text, trace.answer)),
            ("off", THINKING_OFF, trace.answer),
        ):
            rows.append(
                TraceRow(
                    input=(("user", item.question),),
                    output=output,
                    reasoning=reasoning,
                    system_prompt=system,
                    category=task_category(item.task),
                    license=TASK_LICENCE,
                    generator="solver",
                    version=VERSION,
                    source=SOLVERS,
                    task=item.task,
                    truth="task",
                    item=item,
                )
            )
    return rows


def chat_rows(turns: Sequence[ChatTurn], *, licence: str) -> list[TraceRow]:
    """Return chat turns, every other one with thinking off and without a system prompt of ours."""
    return [
        TraceRow(
            input=(("user", turn.question),),
            output=turn.answer,
            reasoning="off",
            system_prompt=THINKING_OFF if index % 2 == 0 else "",
            category=CHAT,
            license=licence,
            generator="parent",
            version=VERSION,
            source=CHAT,
            task=CHAT,
            truth="trusted",
            is_complete=turn.is_complete,
        )
        for index, turn in enumerate(turns)
    ]


def endpoint_prompts(config: EndpointTraces, *, items: Sequence[ReasoningItem]) -> list[Prompt]:
    """Return what an endpoint is asked: the questions of the tasks, or those of a file.

    Raises:
        DataError: when the file is missing, or a line has not the fields, naming the line.
    """
    if isinstance(config.prompts, FilePrompts):
        return _file_prompts(config.prompts, name=config.name)
    return [
        Prompt(
            question=item.question,
            category=task_category(item.task),
            task=item.task,
            truth="task",
            reference=None,
            item=item,
        )
        for item in items
    ]


def endpoint_rows(
    config: EndpointTraces,
    prompts: Sequence[Prompt],
    *,
    pacing: Pacing,
    log_dir: Path,
    on_reply: Callable[[int], None],
) -> tuple[list[TraceRow], list[Reply]]:
    """Ask an endpoint for `num_samples` replies to every prompt; rows in the order of prompts and samples.

    Raises:
        StageError, UserError: see pipeline.reasoning.endpoint.
    """
    requests = [
        (prompt, _body(config, prompt, sample=sample)) for prompt in prompts for sample in range(config.num_samples)
    ]
    replies = ask_all(
        Endpoint(url_variable=config.url_variable, key_variable=config.key_variable),
        [body for _, body in requests],
        pacing=pacing,
        log_path=log_dir / f"{config.name}-{fingerprint(config)[:12]}.jsonl",
        on_reply=on_reply,
    )
    rows = [
        TraceRow(
            input=(("user", prompt.question),),
            output=reply.text.strip(),
            reasoning="on" if config.thinking else "off",
            system_prompt=THINKING_ON if config.thinking else THINKING_OFF,
            category=prompt.category,
            license=config.licence,
            generator=config.model,
            version=VERSION,
            source=config.name,
            task=prompt.task,
            truth=prompt.truth,
            reference=prompt.reference,
            item=prompt.item,
            is_complete=reply.is_complete,
        )
        for (prompt, _), reply in zip(requests, replies, strict=True)
    ]
    return rows, replies


def _body(config: EndpointTraces, prompt: Prompt, *, sample: int) -> Mapping[str, Any]:
    messages = [{"role": "user", "content": prompt.question.strip()}]
    if config.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    return {
        "model": config.model,
        "messages": messages,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_tokens": config.max_new_tokens,
        # A seed per sample: servers that honour it make the same replies again, and samples differ in any case.
        "seed": int(fingerprint([config.seed, prompt.question, sample])[:7], 16),
    }


def _file_prompts(config: FilePrompts, *, name: str) -> list[Prompt]:
    path = Path(config.path)
    if not path.is_file():
        raise DataError(f"reasoning_traces.endpoints {name}: {path} is missing; correct prompts.path in the recipe")
    fields = [config.question_field, *([config.answer_field] if config.answer_field else [])]
    prompts: list[Prompt] = []
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                values = {field: record[field] for field in fields}
            except (ValueError, KeyError, TypeError, RecursionError) as err:
                raise DataError(
                    f"{path} line {number}: {type(err).__name__}: {err}; wanted the fields {fields}"
                ) from err
            if not all(isinstance(value, str) and value.strip() for value in values.values()):
                raise DataError(f"{path} line {number}: {fields} must be text and not empty")
            prompts.append(
                Prompt(
                    question=values[config.question_field].strip(),
                    category=config.category,
                    task=config.category,
                    truth=config.truth,
                    reference=values[config.answer_field] if config.answer_field else None,
                    item=None,
                )
            )
    return prompts
