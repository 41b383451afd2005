"""Replies from a real server on this machine: retries, pace, resume without a second request, and no key anywhere."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data.decontamination import build_ngrams
from pipeline.data.documents import Document
from pipeline.data.evaluation_sets import (
    save_evaluation_ngrams,
    save_held_out,
    save_held_out_items,
    save_instruction_items,
    save_reasoning_items,
)
from pipeline.errors import DataError, StageError, UserError
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import SilentReporter
from pipeline.reasoning import endpoint as endpoint_module
from pipeline.reasoning.endpoint import Endpoint, Pacing, Reply, ask_all
from pipeline.reasoning.rows import ROWS_FILE, read_rows
from pipeline.reasoning.trace_sources import task_items
from pipeline.recipe import EndpointTraces, FilePrompts, ReasoningTask, TaskPrompts
from pipeline.stage import ExecutionSettings, StageInputs
from pipeline.stages import reasoning_toggle_dataset, reasoning_traces
from pipeline.stages.configs import ToggleDatasetStage, TracesStage
from tests.pipeline.reasoning.builders import FILTERS, toggle_config, traces_config
from tests.pipeline.reasoning.chat_server import KEY, ChatServer, serve

PACING = Pacing(requests_per_minute=None, in_flight=4, timeout_s=30.0)
HELD_OUT = "a held-out document about nothing that any task would ever ask of anyone at all"
TASKS = (ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),)


@pytest.fixture
def server(
    model: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ChatServer]:
    with serve(model, tokenizer) as served:
        monkeypatch.setenv("TEST_URL", served.url)
        monkeypatch.setenv("TEST_KEY", KEY)
        monkeypatch.setattr(endpoint_module, "_FIRST_WAIT_S", 0.01)
        yield served


def _bodies(num: int) -> list[dict[str, Any]]:
    return [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"{number} + 1?"}],
            "temperature": 1.0,
            "top_p": 0.9,
            "max_tokens": 6,
            "seed": number,
        }
        for number in range(num)
    ]


def _ask(num: int, tmp_path: Path, *, pacing: Pacing = PACING) -> list[Reply]:
    endpoint = Endpoint(url_variable="TEST_URL", key_variable="TEST_KEY")
    return ask_all(endpoint, _bodies(num), pacing=pacing, log_path=tmp_path / "log.jsonl", on_reply=lambda _: None)


def test_ask_all_replies_stand_in_the_order_of_requests(server: ChatServer, tmp_path: Path):
    replies = _ask(6, tmp_path)
    for body, reply in zip(_bodies(6), replies, strict=True):
        wanted = server.complete(body)
        assert reply.text == wanted["choices"][0]["message"]["content"]
        assert reply.is_complete == (wanted["choices"][0]["finish_reason"] == "stop")
        assert (reply.num_prompt_tokens, reply.num_completion_tokens) == tuple(wanted["usage"].values())


def test_ask_all_again_sends_only_what_the_log_lacks(server: ChatServer, tmp_path: Path):
    replies = _ask(5, tmp_path)
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    # A kill after three replies, in the middle of writing the fourth.
    log.write_bytes(b"".join(lines[:3]) + lines[3][:17])
    server.served.clear()
    assert _ask(5, tmp_path) == replies
    assert len(server.served) == 2
    assert _ask(5, tmp_path) == replies
    assert len(server.served) == 2


def test_ask_all_retries_what_may_pass(server: ChatServer, tmp_path: Path):
    server.failures[:] = [503, 429, 500]
    assert len(_ask(2, tmp_path)) == 2
    assert len(server.arrivals_s) == 5


def test_ask_all_keeps_what_was_answered_before_it_gave_up(server: ChatServer, tmp_path: Path):
    one_by_one = Pacing(requests_per_minute=None, in_flight=1, timeout_s=30.0)
    _ask(2, tmp_path, pacing=one_by_one)
    server.failures[:] = [503] * 6
    with pytest.raises(StageError, match="failed 6 times, last with status 503") as caught:
        _ask(4, tmp_path, pacing=one_by_one)
    assert KEY not in str(caught.value)
    assert "[key]" in str(caught.value)
    assert len(_ask(4, tmp_path)) == 4
    assert len(server.served) == 4


@pytest.mark.parametrize("status", [400, 401, 302])
def test_ask_all_refusals_and_redirects_end_it_at_once(server: ChatServer, tmp_path: Path, status: int):
    server.failures[:] = [status]
    with pytest.raises(StageError, match=f"refused a request with status {status}") as caught:
        _ask(1, tmp_path)
    assert KEY not in str(caught.value)
    assert len(server.arrivals_s) == 1


def test_ask_all_starts_requests_no_faster_than_the_pace(server: ChatServer, tmp_path: Path):
    _ask(4, tmp_path, pacing=Pacing(requests_per_minute=600.0, in_flight=4, timeout_s=30.0))
    arrivals = sorted(server.arrivals_s)
    # Ten a second: the fourth starts three tenths behind the first.
    assert arrivals[3] - arrivals[0] > 0.25


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "5", "reasoning_content": " 2 + 3 = 5 "}, "<think>\n2 + 3 = 5\n</think>\n\n5"),
        ({"content": "5", "reasoning": "sum"}, "<think>\nsum\n</think>\n\n5"),
        ({"content": "2 + 3 = 5\n</think>\n\n5"}, "<think>\n2 + 3 = 5\n</think>\n\n5"),
        ({"content": "<think>\na\n</think>\n\n5"}, "<think>\na\n</think>\n\n5"),
        ({"content": None}, ""),
    ],
)
def test_reply_puts_the_thought_in_tags(message: dict[str, str | None], text: str):
    answer = {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert endpoint_module._reply("k", answer).text == text


def test_endpoint_addresses_that_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_URL", raising=False)
    with pytest.raises(DataError, match="NO_URL is not set"):
        Endpoint(url_variable="NO_URL", key_variable=None)
    monkeypatch.setenv("TEST_KEY", KEY)
    for url, reason in (("file:///etc/passwd", "no http or https"), ("http://example.org/v1", "plain http")):
        monkeypatch.setenv("TEST_URL", url)
        with pytest.raises(UserError, match=reason) as caught:
            Endpoint(url_variable="TEST_URL", key_variable="TEST_KEY")
        assert KEY not in str(caught.value)


def _traces(name: str, *, prompts: TaskPrompts | FilePrompts, thinking: bool, num_samples: int) -> EndpointTraces:
    return EndpointTraces(
        name=name,
        model="tiny",
        licence="MIT",
        url_variable="TEST_URL",
        key_variable="TEST_KEY",
        thinking=thinking,
        system_prompt="detailed thinking on" if thinking else None,
        prompts=prompts,
        num_samples=num_samples,
        temperature=1.0,
        top_p=0.95,
        max_new_tokens=8,
        seed=1,
    )


def _run_both(root: Path, stage: TracesStage, *, parent_dir: Path, evaluation_dir: Path) -> dict[str, Any]:
    inputs = StageInputs(
        artifacts={
            "parent_checkpoint": parent_dir,
            "evaluation_sets": evaluation_dir,
            "reasoning_traces": root / "traces",
        },
        store_root=root,
        downloads=root / "downloads",
        execution=ExecutionSettings(requests_in_flight=3),
        reporter=SilentReporter(),
    )
    traces = reasoning_traces.run(stage, inputs, root / "traces")
    # Whether the random model's bytes count as language or repeat is not what this is about.
    filters = FILTERS.model_copy(update={"vote": FILTERS.vote.model_copy(update={"min_samples": 2})})
    toggle_stage = ToggleDatasetStage(dataset=toggle_config(filters), ngram_tokens=13)
    toggle = reasoning_toggle_dataset.run(toggle_stage, inputs, root / "toggle")
    return {"traces": traces, "toggle": toggle}


def _evaluation_sets(directory: Path) -> Path:
    save_held_out(directory, "text", [Document(document_id="1", text=HELD_OUT)])
    save_reasoning_items(directory, [])
    save_held_out_items(directory, [])
    save_instruction_items(directory, [])
    save_evaluation_ngrams(directory, build_ngrams([HELD_OUT], num_words=13))
    return directory


def test_right_replies_of_endpoints_are_kept_in_pairs_and_name_who_wrote_them(
    server: ChatServer, parent_dir: Path, tmp_path: Path
):
    cats, dogs = "How many legs have two cats?", "How many paws has a dog?"
    questions = tmp_path / "questions.jsonl"
    lines = [{"problem": cats, "solution": "8"}, {"problem": dogs, "solution": "4"}]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    prompts = FilePrompts(
        kind="jsonl",
        path=str(questions),
        question_field="problem",
        answer_field="solution",
        category="math",
        truth="reference",
    )
    sums = task_items(TASKS, items_per_task=2, seed=traces_config().seed, exclude_questions=set())
    right = f"<think>\nadd them\n</think>\n\n{sums[0].answer}"
    server.scripted = {
        ("big", cats): {"content": "8", "reasoning_content": "two times four"},
        ("big", dogs): {"content": "5", "reasoning_content": "one more than four"},
        ("quick", cats): {"content": "8"},
        ("quick", dogs): {"content": "4"},
        ("adder", sums[0].question.strip()): {"content": right},
        ("adder", sums[1].question.strip()): {"content": f"<think>\n{HELD_OUT}\n</think>\n\n{sums[1].answer}"},
    }
    endpoints = [
        _traces(name, prompts=asked, thinking=thinking, num_samples=1).model_copy(
            update={"model": model, "licence": licence}
        )
        for name, model, licence, asked, thinking in (
            ("thinker", "big", "MIT", prompts, True),
            ("answerer", "quick", "CC-BY-4.0", prompts, False),
            ("taught", "adder", "Apache-2.0", TaskPrompts(kind="tasks"), True),
        )
    ]
    stage = TracesStage(
        traces=traces_config(items_per_task=2, endpoints=tuple(endpoints)),
        reasoning_tasks=TASKS,
        parent_licence="Apache-2.0",
    )
    evaluation_dir = _evaluation_sets(tmp_path / "evaluation_sets")
    toggle = _run_both(tmp_path, stage, parent_dir=parent_dir, evaluation_dir=evaluation_dir)["toggle"]

    kept = pl.read_parquet(tmp_path / "toggle" / "samples.parquet").filter(pl.col("source") != "solvers")
    assert sorted(kept.select("source", "mode", "question", "output", "license", "generator").rows()) == [
        ("answerer", "off", cats, "8", "CC-BY-4.0", "quick"),
        ("taught", "on", sums[0].question, right, "Apache-2.0", "adder"),
        ("thinker", "on", cats, "<think>\ntwo times four\n</think>\n\n8", "MIT", "big"),
    ]
    dropped = pl.read_parquet(tmp_path / "toggle" / "dropped.parquet")
    assert sorted(dropped.select("source", "question", "step").rows()) == [
        ("answerer", dogs, "pairs"),
        ("taught", sums[1].question, "decontamination"),
        ("thinker", dogs, "verification"),
    ]
    # The solvers wrote both modes of their two questions.
    assert (toggle.metrics["num_pairs"], toggle.metrics["num_samples"]) == (3, 7)
    assert toggle.tables["generators"].rows == (
        ("answerer", "quick", "CC-BY-4.0", 1),
        ("solvers", "solver", "Apache-2.0", 4),
        ("taught", "adder", "Apache-2.0", 1),
        ("thinker", "big", "MIT", 1),
    )


def test_whole_data_pipeline_against_a_server_is_verified_counted_and_byte_identical(
    server: ChatServer, parent_dir: Path, tmp_path: Path
):
    evaluation_dir = _evaluation_sets(tmp_path / "evaluation_sets")
    questions = tmp_path / "questions.jsonl"
    lines = [{"problem": f"What is {number} and {number}?"} for number in range(3)] + [{"problem": HELD_OUT + "?"}]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    file_prompts = FilePrompts(
        kind="jsonl",
        path=str(questions),
        question_field="problem",
        answer_field=None,
        category="math",
        truth="majority",
    )
    stage = TracesStage(
        traces=traces_config(
            items_per_task=8,
            endpoints=(
                _traces("thinker", prompts=TaskPrompts(kind="tasks"), thinking=True, num_samples=2),
                _traces("answerer", prompts=file_prompts, thinking=False, num_samples=3),
            ),
        ),
        reasoning_tasks=TASKS,
        parent_licence="Apache-2.0",
    )
    first = _run_both(tmp_path / "first", stage, parent_dir=parent_dir, evaluation_dir=evaluation_dir)
    num_requests = 8 * 2 + 4 * 3
    assert len(server.served) == num_requests
    metrics = first["traces"].metrics
    assert (metrics["num_rows"], metrics["num_replies"]) == (16 + num_requests, num_requests)
    assert num_requests <= metrics["num_completion_tokens"] <= 8 * num_requests
    assert metrics["num_prompt_tokens"] > 40 * num_requests

    rows = read_rows(tmp_path / "first" / "traces" / ROWS_FILE)
    thinker = [row for row in rows if row.source == "thinker"]
    # Both generators were asked the solvers' questions, so their rows are the same prompts.
    assert {row.prompt_id for row in thinker} == {row.prompt_id for row in rows if row.source == "solvers"}
    assert [row.prompt_id for row in thinker[::2]] == [row.prompt_id for row in thinker[1::2]]

    toggle = first["toggle"]
    # A random model solves nothing: what is left is what the solvers wrote, and each step says where the rest went.
    assert toggle.metrics["num_pairs"] == 8
    assert toggle.metrics["num_unverified_traces_kept"] == toggle.metrics["num_contaminated_kept"] == 0
    kept = pl.read_parquet(tmp_path / "first" / "toggle" / "samples.parquet")
    dropped = pl.read_parquet(tmp_path / "first" / "toggle" / "dropped.parquet")
    assert len(kept) + len(dropped) == metrics["num_rows"]
    assert set(kept["source"]) == {"solvers"}
    assert toggle.tables["filters"].rows[-1][2] == len(kept)

    second = _run_both(tmp_path / "second", stage, parent_dir=parent_dir, evaluation_dir=evaluation_dir)
    assert second == first
    assert len(server.served) == 2 * num_requests
    for name in ("traces", "toggle"):
        for path in (tmp_path / "first" / name).iterdir():
            assert path.read_bytes() == (tmp_path / "second" / name / path.name).read_bytes()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(KEY.encode() not in path.read_bytes() and b"127.0.0.1" not in path.read_bytes() for path in written)

    # A change of filters, or a third source, sends nothing again.
    changed = stage.model_copy(update={"traces": stage.traces.model_copy(update={"items_per_task": 8, "seed": 3})})
    _run_both(tmp_path / "second", changed, parent_dir=parent_dir, evaluation_dir=evaluation_dir)
    assert len(server.served) == 2 * num_requests
