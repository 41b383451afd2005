"""The toggle dataset as a whole: of imported rows it drops every planted flaw by its own step, and nothing else."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import polars as pl

from pipeline.data.decontamination import build_ngrams
from pipeline.data.documents import Document
from pipeline.data.evaluation_sets import (
    save_evaluation_ngrams,
    save_held_out,
    save_held_out_items,
    save_instruction_items,
    save_reasoning_items,
)
from pipeline.data.reasoning_items import generate_items
from pipeline.recipe import ImportedTraces, ReasoningTask, Truth
from pipeline.stage import StageInputs
from pipeline.stages import reasoning_toggle_dataset, reasoning_traces
from pipeline.stages.configs import ToggleDatasetStage, TracesStage
from tests.pipeline.reasoning.builders import FILTERS, toggle_config, traces_config

TASK = ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
(EVALUATED,) = generate_items(TASK, num_items=1, seed=10**9, exclude_questions=set())
HELD_OUT = "Seven grey herons stood in the shallow water below the old mill while rain fell on the quiet river."
THIRTEEN_WORDS = "seven grey herons stood in the shallow water below the old mill while"
TWELVE_WORDS = "seven grey herons stood in the shallow water below the old mill"
TRAIN = "A train leaves at noon with ten people and five of them get off at the second stop"

Record = dict[str, Any]
Source = Literal["trusted", "answered", "voted"]
TRUTH: dict[Source, Truth] = {"trusted": "trusted", "answered": "reference", "voted": "majority"}


def _on(question: str, answer: str, *, thought: str = "look closely", **changes: Any) -> Record:
    return _record(question, f"<think>\n{thought}\n</think>\n\n{answer}", reasoning="on") | changes


def _off(question: str, answer: str, **changes: Any) -> Record:
    return _record(question, answer, reasoning="off") | changes


def _record(question: str, output: str, *, reasoning: str) -> Record:
    """A row with the columns of Llama-Nemotron-Post-Training-Dataset, and one for a reference answer."""
    return {
        "input": [{"role": "user", "content": question}],
        "output": output,
        "reasoning": reasoning,
        "system_prompt": f"detailed thinking {reasoning}",
        "category": "math",
        "license": "cc-by-4.0",
        "generator": "DeepSeek-R1",
        "used_in_training": ["Super"],
        "version": "v1",
        "expected_answer": "1/2",
    }


def _pair(question: str, answer: str, **changes: Any) -> list[Record]:
    return [_on(question, answer, **changes), _off(question, answer, **changes)]


CODE = "Write one line that adds two numbers."
NUMBERS = "Which is the last? " + " ".join(map(str, range(60)))
GERMAN = "Der Hund und die Katze sind nicht auf dem Dach, und das ist auch nicht von Bedeutung, wenn es regnet."
SOUND: dict[Source, list[Record]] = {
    "trusted": [
        *_pair("Name the larger of three and nine.", "9"),
        *_pair(CODE, "```python\nx = 1 + 2\n```", category="code"),
        *_pair(TRAIN, "5"),
        *_pair(NUMBERS, "59"),
        *_pair("Which birds does this describe?", f"They wade: {TWELVE_WORDS}."),
    ],
    "answered": _pair("What is half of one?", r"\boxed{0.5}"),
    "voted": [
        *_pair("Add three to five.", "8"),
        _on("Add three to five.", "8", thought="three more than five"),
    ],
}
# Every flaw stands alone in its row, most of them in a third reply to a question whose two others are sound.
PLANTED: list[tuple[Source, str, str, Record]] = [
    ("trusted", "licence", "licence 'CC-BY-NC-4.0'", _on(TRAIN, "5", thought="half", license="CC-BY-NC-4.0")),
    ("trusted", "form", "thought never closes", _on(TRAIN, "5", output="<think>\nfive of ten go, so 5")),
    ("trusted", "form", "think tag with thinking off", _off(TRAIN, "<think>\nhalf\n</think>\n\n5")),
    ("trusted", "form", "several thoughts", _on(TRAIN, "5", thought="half </think> <think> again")),
    *(
        ("trusted", "length", "prompt longer than 300 tokens", record)
        for record in _pair(" ".join(map(str, range(500, 600))), "599")
    ),
    ("trusted", "length", "output longer than 384 tokens", _on(TRAIN, "5", thought=" ".join(map(str, range(120))))),
    (
        "trusted",
        "length",
        "longer than a window of 384 tokens",
        _on(NUMBERS, "59", thought="to and fro " * 2 + NUMBERS),
    ),
    ("trusted", "language", "output in de", _on(TRAIN, "5", thought=GERMAN)),
    ("trusted", "repetition", "more than 50% of it repeats", _on(TRAIN, "5", thought="wait, look again. " * 9)),
    ("trusted", "code", "code does not parse", _on(CODE, "```python\nx = = 1\n```", category="code")),
    ("trusted", "exact duplicates", "exact duplicate", _on(TRAIN, "5", thought="look  CLOSELY")),
    *(
        ("trusted", "near duplicates", "prompt nearly repeats another", record)
        for record in _pair(f"{TRAIN} today", "5")
    ),
    *(
        ("trusted", "decontamination", "shares an n-gram with an evaluation set", record)
        for record in (
            *_pair(f"What comes next: {THIRTEEN_WORDS}?", "rain"),
            _on(TRAIN, "5", thought=f"Once {THIRTEEN_WORDS}"),
        )
    ),
    *(
        ("trusted", "decontamination", "an evaluation question", record)
        for record in _pair(EVALUATED.question, EVALUATED.answer)
    ),
    ("answered", "verification", "wrong answer", _on("What is half of one?", r"\boxed{0.25}")),
    ("voted", "vote", "not the majority's answer", _on("Add three to five.", "9", thought="count")),
    *(
        ("voted", "vote", "no majority", record)
        for record in (*_pair("How many are many?", "3"), *_pair("How many are many?", "4"))
    ),
    *(("voted", "vote", "fewer than 3 replies to vote", record) for record in _pair("Guess a number.", "7")),
    ("trusted", "pairs", "prompt is there in one mode only", _on("Spell the word heron.", "h, e, r, o, n")),
]


def test_toggle_dataset_drops_every_planted_row_by_its_step_and_keeps_the_sound_ones_in_pairs(
    parent_dir: Path, tmp_path: Path
):
    evaluation_dir = tmp_path / "evaluation_sets"
    save_held_out(evaluation_dir, "text", [Document(document_id="1", text=HELD_OUT)])
    save_reasoning_items(evaluation_dir, [EVALUATED])
    save_held_out_items(evaluation_dir, [])
    save_instruction_items(evaluation_dir, [])
    save_evaluation_ngrams(evaluation_dir, build_ngrams([HELD_OUT, EVALUATED.question], num_words=13))
    imports = []
    for source, truth in TRUTH.items():
        path = tmp_path / f"{source}.jsonl"
        records = [*SOUND[source], *(record for place, *_, record in PLANTED if place == source)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        imports.append(
            ImportedTraces(
                name=source,
                kind="jsonl",
                path=str(path),
                truth=truth,
                answer_field="expected_answer" if truth == "reference" else None,
                max_rows=100,
            )
        )
    inputs = StageInputs(
        artifacts={
            "parent_checkpoint": parent_dir,
            "evaluation_sets": evaluation_dir,
            "reasoning_traces": tmp_path / "traces",
        },
        store_root=tmp_path,
        downloads=tmp_path,
    )
    traces = traces_config(imports=tuple(imports))
    reasoning_traces.run(
        TracesStage(traces=traces, reasoning_tasks=(TASK,), parent_licence="Apache-2.0"), inputs, tmp_path / "traces"
    )
    stage = ToggleDatasetStage(dataset=toggle_config(FILTERS), ngram_tokens=13)
    result = reasoning_toggle_dataset.run(stage, inputs, tmp_path / "toggle")

    dropped = pl.read_parquet(tmp_path / "toggle" / "dropped.parquet")
    assert sorted(dropped.select("source", "step", "reason", "question", "output").rows()) == sorted(
        (source, step, reason, record["input"][0]["content"], record["output"])
        for source, step, reason, record in PLANTED
    )
    kept = pl.read_parquet(tmp_path / "toggle" / "samples.parquet")
    imported = kept.filter(pl.col("source") != "solvers")
    assert sorted(imported.select("source", "mode", "question", "output", "license", "generator").rows()) == sorted(
        (source, record["reasoning"], record["input"][0]["content"], record["output"], "cc-by-4.0", "DeepSeek-R1")
        for source, records in SOUND.items()
        for record in records
    )
    modes = kept.group_by("question").agg(pl.col("mode").unique().sort())["mode"]
    assert [found.to_list() for found in modes] == [["off", "on"]] * 8
    assert (result.metrics["num_pairs"], result.metrics["num_samples"]) == (8, 17)
    assert (result.metrics["num_wrong_answers"], result.metrics["num_contaminated_kept"]) == (1, 0)
    counts = Counter((step, reason) for _, step, reason, _ in PLANTED)
    assert {row[:2]: row[2] for row in result.tables["drop_reasons"].rows} == counts
