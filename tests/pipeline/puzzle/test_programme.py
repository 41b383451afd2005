"""The programme in plain numbers, and diverse answers, against enumeration of every choice."""

import itertools
import random
from typing import Any

import pulp
import pytest

from pipeline.errors import StageError
from pipeline.puzzle import programme as programmes
from pipeline.puzzle.programme import OutOfTimeError, Programme, Row, solve_diverse, solve_programme
from tests.pipeline.puzzle.builders import give_solver_no_time


def make_programme(*, seed: int, num_layers: int = 4, num_candidates: int = 3) -> Programme:
    rng = random.Random(seed)

    def values() -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(rng.uniform(0.1, 1.0) for _ in range(num_candidates)) for _ in range(num_layers))

    rows = tuple(
        Row(name=name, fixed=0.2, upper=0.2 + share * num_layers, cost=values())
        for name, share in (("time_ms", 0.5), ("memory_mib", 0.6))
    )
    return Programme(scores=values(), rows=rows)


def enumerate_best(
    programme: Programme, *, earlier: list[tuple[int, ...]], min_different: int
) -> tuple[int, ...] | None:
    choices = [
        choice
        for choice in itertools.product(*(range(len(scores)) for scores in programme.scores))
        if not programme.broken_rows(choice)
        and all(sum(a != b for a, b in zip(choice, other, strict=True)) >= min_different for other in earlier)
    ]
    return min(choices, key=programme.objective, default=None)


@pytest.mark.parametrize("seed", range(8))
def test_diverse_answers_equal_those_of_enumeration(seed: int):
    programme = make_programme(seed=seed)
    answers = solve_diverse(programme, num_solutions=4, min_different=2, time_limit_s=10, relative_gap=0.0)

    earlier: list[tuple[int, ...]] = []
    for answer in answers:
        best = enumerate_best(programme, earlier=earlier, min_different=2)
        assert best is not None
        assert programme.objective(answer.chosen) == pytest.approx(programme.objective(best), abs=1e-9)
        assert answer.status == "optimal"
        earlier.append(answer.chosen)
    if len(answers) < 4:
        assert enumerate_best(programme, earlier=earlier, min_different=2) is None
    assert answers or enumerate_best(programme, earlier=[], min_different=2) is None


def test_a_later_answer_may_take_a_candidate_that_another_dominates():
    # The second candidate of each layer is worse in every respect, and the only way to differ.
    programme = Programme(
        scores=((0.0, 1.0), (0.0, 2.0)), rows=(Row(name="time_ms", fixed=0, upper=9, cost=((1, 2), (1, 2))),)
    )
    answers = solve_diverse(programme, num_solutions=9, min_different=1, time_limit_s=10, relative_gap=0.0)
    assert [answer.chosen for answer in answers] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_answers_found_before_the_time_is_over_are_kept_and_told(monkeypatch: pytest.MonkeyPatch):
    programme = make_programme(seed=1)
    found = solve_diverse(programme, num_solutions=4, min_different=1, time_limit_s=10, relative_gap=0.0)
    give_solver_no_time(monkeypatch, [2])
    notes: list[str] = []

    kept = solve_diverse(
        programme, num_solutions=4, min_different=1, time_limit_s=10, relative_gap=0.0, note=notes.append
    )

    assert len(found) == 4
    assert kept == found[:2]
    (told,) = notes
    assert told.startswith("the pool ends at 2 of 4 answers: the solver found no other within its time limit of 10 s")


def test_time_that_is_over_before_the_first_answer_is_an_error(monkeypatch: pytest.MonkeyPatch):
    give_solver_no_time(monkeypatch, [0])

    with pytest.raises(OutOfTimeError, match="without an answer after at most 10 s: raise its time limit"):
        solve_diverse(make_programme(seed=1), num_solutions=4, min_different=1, time_limit_s=10, relative_gap=0.0)


def test_a_solver_that_fails_has_not_run_out_of_time(monkeypatch: pytest.MonkeyPatch):
    def fail(model: Any, **_: float) -> None:
        solver = pulp.HiGHS(msg=False)
        solver.createAndConfigureSolver(model)
        solver.buildSolverModel(model)

    monkeypatch.setattr(programmes, "_run_solver", fail)
    with pytest.raises(StageError, match="the solver ended as 'Not Solved' without an answer") as caught:
        solve_programme(make_programme(seed=1), time_limit_s=10, relative_gap=0.0)
    assert not isinstance(caught.value, OutOfTimeError)


def test_without_any_choice_there_is_no_answer():
    programme = Programme(scores=((0.0,),), rows=(Row(name="time_ms", fixed=0, upper=1, cost=((2.0,),)),))
    assert solve_programme(programme, time_limit_s=10, relative_gap=0.0) is None
