"""Filters that judge answers: by a task's scorer, by a reference, or by what most replies to a prompt come to."""

from collections.abc import Callable, Sequence

from pipeline.data.chat import split_thinking
from pipeline.reasoning.filtering import Step, Verdicts
from pipeline.reasoning.grading import Grade, Grader, final_answer
from pipeline.reasoning.rows import TraceRow

WRONG = "wrong answer"
VERIFIER_FAILED = "verifier failed"


def verification_step(grader: Grader, *, on_row: Callable[[], None]) -> Step:
    """Drop rows with a known truth whose answer is wrong, and those without a verdict under a reason of their own."""

    def judge(row: TraceRow) -> str | None:
        on_row()
        visible = split_thinking(row.output).answer
        if row.truth == "task":
            assert row.item is not None
            grade = grader.grade_task(visible, item=row.item)
        elif row.truth == "reference":
            assert row.reference is not None
            grade = grader.grade_equal(final_answer(visible), reference=row.reference)
        else:
            grade = Grade(is_right=True, error=None)
        if grade.error is not None:
            return f"{VERIFIER_FAILED}: {grade.error}"
        return None if grade.is_right else WRONG

    return lambda rows: [judge(row) for row in rows]


def vote_step(grader: Grader, *, min_samples: int, min_share: float) -> Step:
    """Where a prompt's truth is the vote of its replies: drop those that differ from the majority.

    Replies of all modes vote. Without enough replies, or without a majority, none of the prompt is kept. An answer that
    cannot be compared is a class of its own.

    Source: Llama-Nemotron, section 3.1.1.
    """

    def judge(rows: Sequence[TraceRow]) -> Verdicts:
        verdicts: Verdicts = [None] * len(rows)
        ballots: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            if row.truth == "majority":
                ballots.setdefault(row.prompt_id, []).append(place)
        for places in ballots.values():
            if len(places) < min_samples:
                reasons = dict.fromkeys(places, f"fewer than {min_samples} replies to vote")
            else:
                classes = _classes([final_answer(split_thinking(rows[place].output).answer) for place in places])
                reasons = {}
                most = max(classes, key=len)
                for place_in_ballot, place in enumerate(places):
                    if len(most) < min_share * len(places):
                        reasons[place] = "no majority"
                    elif place_in_ballot not in most:
                        reasons[place] = "not the majority's answer"
            for place, reason in reasons.items():
                verdicts[place] = reason
        return verdicts

    def _classes(answers: Sequence[str]) -> list[list[int]]:
        classes: list[list[int]] = []
        for place, answer in enumerate(answers):
            found = next(
                (members for members in classes if grader.grade_equal(answer, reference=answers[members[0]]).is_right),
                None,
            )
            if found is None:
                classes.append([place])
            else:
                found.append(place)
        return classes

    return judge
