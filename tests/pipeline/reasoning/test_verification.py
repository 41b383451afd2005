"""Answers judged by scorer, reference and vote; verifiers that raise, hang or die are no wrong answers."""

import sys
import time

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data.decontamination import build_ngrams
from pipeline.data.reasoning_items import generate_items
from pipeline.processes import LineServer
from pipeline.reasoning.filtering import EvaluationGuard, TokenisedRows
from pipeline.reasoning.grading import Grader, final_answer
from pipeline.reasoning.rows import TraceRow
from pipeline.reasoning.toggle_dataset import filter_rows
from pipeline.reasoning.verification import verification_step, vote_step
from pipeline.recipe import ReasoningTask
from tests.pipeline.reasoning.builders import FILTERS, make_row


@pytest.fixture(scope="module")
def grader():
    with Grader(timeout_s=20.0) as opened:
        yield opened


def _verify(grader: Grader, *rows: TraceRow) -> list[str | None]:
    return verification_step(grader, on_row=lambda: None)(rows)


def _reference(reference: str, answer: str) -> TraceRow:
    return make_row(output=f"<think>\nwork\n</think>\n\n{answer}", truth="reference", reference=reference)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("1/2", "The answer is \\boxed{\\frac{1}{2}}."),
        ("0.5", "\\boxed{1/2}"),
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}"),
        ("x^2+1", "\\boxed{1+x^2}"),
        ("\\frac{\\pi}{4}", "So it is \\boxed{\\dfrac{\\pi}{4}}"),
        ("1,234", "\\boxed{1234}"),
        ("12", "12"),
        ("Paris", "After some thought:\nparis."),
        ("(1,2)", "\\boxed{(1,2)}"),
    ],
)
def test_verification_right_answers_in_other_words(grader: Grader, reference: str, answer: str):
    assert _verify(grader, _reference(reference, answer)) == [None]


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("1/2", "\\boxed{\\frac{1}{3}}"),
        ("12", "so 12 is wrong, it is \\boxed{13}"),
        ("Paris", "\\boxed{pairs}"),  # the same product of letters
        ("12", "no number"),
        (".5", "5"),
        ("x^2+1", "\\boxed{x^2-1}"),
    ],
)
def test_verification_wrong_answers(grader: Grader, reference: str, answer: str):
    assert _verify(grader, _reference(reference, answer)) == ["wrong answer"]


def test_verification_by_a_tasks_scorer_tells_wrong_from_failed(grader: Grader):
    task = ReasoningTask(name="prime_factorization", config={"max_value": 100})
    item = generate_items(task, num_items=1, seed=1, exclude_questions=set())[0]
    rows = [
        make_row(output=f"<think>\nwork\n</think>\n\n{answer}", item=item)
        for answer in (item.answer, "2 \u00d7 2 \u00d7 2 \u00d7 2 \u00d7 2 \u00d7 2 \u00d7 2", "no number")
    ]
    assert _verify(grader, *rows) == [None, "wrong answer", "verifier failed: ValueError"]


def test_verification_hanging_verifier_is_killed_and_the_next_answer_is_judged():
    began = time.monotonic()
    with Grader(timeout_s=3.0) as grader:
        # math-verify evaluates the tower of powers, which has more digits than there is memory.
        verdicts = _verify(grader, _reference("5", "\\boxed{9^{9^{9^{9}}}}"), _reference("5", "\\boxed{5.0}"))
    assert verdicts[0] is not None
    assert verdicts[0].startswith("verifier failed: ")
    assert verdicts[1] is None
    assert time.monotonic() - began < 60


def test_line_server_survives_children_that_hang_or_die():
    script = (
        "import sys, time\nprint('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    if line == 'hang\\n': time.sleep(60)\n"
        "    if line == 'die\\n': sys.exit(3)\n"
        "    print(line.strip().upper(), flush=True)\n"
    )
    with LineServer([sys.executable, "-c", script], start_timeout_s=20.0) as server:
        assert server.ask("a", timeout_s=10.0) == "A"
        assert server.ask("hang", timeout_s=0.3) is None
        assert server.ask("b", timeout_s=10.0) == "B"
        assert server.ask("die", timeout_s=10.0) is None
        assert server.ask("c", timeout_s=10.0) == "C"


def test_final_answer_takes_the_last_box_or_line():
    assert final_answer("\\boxed{1} then \\boxed{\\frac{1}{2}}, done") == "\\frac{1}{2}"
    assert final_answer("It is\n\n42\n") == "42"
    assert final_answer("\\boxed{unclosed") == "unclosed"
    assert final_answer(" \n") == ""


def _ballot(question: str, *answers: str) -> list[TraceRow]:
    return [
        make_row(question=question, output=f"<think>\n{number}\n</think>\n\n\\boxed{{{answer}}}", truth="majority")
        for number, answer in enumerate(answers)
    ]


def test_vote_step_keeps_the_majority_in_whatever_form(grader: Grader):
    step = vote_step(grader, min_samples=3, min_share=0.6)
    assert step(_ballot("A?", "1/2", "\\frac{1}{2}", "0.5", "2", "\\frac12")) == [
        None,
        None,
        None,
        "not the majority's answer",
        None,
    ]
    assert step(_ballot("B?", "1", "2", "3", "1")) == ["no majority"] * 4
    assert step(_ballot("C?", "1", "1")) == ["fewer than 3 replies to vote"] * 2


def test_vote_step_ballots_of_prompts_do_not_mix_and_known_truths_do_not_vote(grader: Grader):
    step = vote_step(grader, min_samples=3, min_share=0.6)
    rows = [*_ballot("A?", "1", "1", "1"), make_row(question="A?", output="<think>x</think>9"), *_ballot("B?", "2")]
    assert step(rows) == [None, None, None, None, "fewer than 3 replies to vote"]


def test_filter_rows_counts_the_votes_of_replies_that_are_the_same(grader: Grader, tokenizer: PreTrainedTokenizerFast):
    answers = ["42"] * 6 + ["41", "It is\n41"]
    rows = [
        make_row(question="What is six times seven?", output=answer, mode="off", truth="majority") for answer in answers
    ]
    nothing = build_ngrams([], num_words=13)
    filtered = filter_rows(
        rows,
        config=FILTERS.model_copy(update={"require_pairs": False}),
        tokens=TokenisedRows(tokenizer),
        tokenizer=tokenizer,
        guard=EvaluationGuard(questions=frozenset(), all_ngrams=nothing, text_ngrams=nothing),
        grader=grader,
        max_tokens=300,
        on_verified=lambda: None,
    )
    assert [row.output for row in filtered.kept] == ["42"]
