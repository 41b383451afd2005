"""One choice per layer under linear limits, as a mixed-integer programme in plain numbers. Pure; knows no blocks.

    variables    x[i,j] in {0, 1}: layer i takes its candidate j
    objective    min  sum_ij score[i,j] * x[i,j]
    one choice   sum_j x[i,j] = 1                                         for every layer i
    limits       (fixed_k + sum_ij cost_k[i,j] * x[i,j]) / upper_k <= 1   for every row k
    diversity    sum_i x[i, y_i] <= L - min_different                     for every earlier answer y

(Puzzle, section 4.3 and appendix B.) Rows are divided by their bound, so milliseconds, bytes and parameters meet the
solver at one scale. Without earlier answers, a candidate that is no better than another of its layer, neither in its
score nor in any row, is left out first: the optimum is the same, and among equals the one that comes first is taken. A
diverse answer may want such a candidate, so there all stay.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pulp

from pipeline.errors import StageError

# Rows are normalised to 1, so these are relative: below any rounding of a measured time.
FEASIBILITY_TOLERANCE = 1e-9
VERIFICATION_TOLERANCE = 1e-6

Values = tuple[tuple[float, ...], ...]  # by layer, then by candidate


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One limit: `fixed` plus the cost of every chosen candidate stays within `upper`."""

    name: str
    fixed: float
    upper: float
    cost: Values

    def total(self, chosen: Sequence[int]) -> float:
        """Return what a choice of candidates needs."""
        return self.fixed + math.fsum(costs[index] for costs, index in zip(self.cost, chosen, strict=True))

    def least(self) -> float:
        """Return the smallest total of any choice; it separates over layers, so no solver is needed."""
        return self.fixed + math.fsum(min(costs) for costs in self.cost)

    def is_met(self, total: float) -> bool:
        """Return whether a total stays within the bound, rounding aside."""
        return total <= self.upper * (1 + VERIFICATION_TOLERANCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Programme:
    """The score of every candidate of every layer, and the limits on their sums."""

    scores: Values
    rows: tuple[Row, ...]

    def objective(self, chosen: Sequence[int]) -> float:
        """Return the summed scores of a choice."""
        return math.fsum(scores[index] for scores, index in zip(self.scores, chosen, strict=True))

    def broken_rows(self, chosen: Sequence[int]) -> tuple[Row, ...]:
        """Return the limits that a choice breaks, its costs added up from the tables."""
        return tuple(row for row in self.rows if not row.is_met(row.total(chosen)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The candidate of every layer; `feasible` means that the time limit ended the search with `gap` left."""

    chosen: tuple[int, ...]
    status: Literal["optimal", "feasible"]
    gap: float


def solve_programme(
    programme: Programme,
    *,
    time_limit_s: float,
    relative_gap: float,
    earlier: Sequence[Sequence[int]] = (),
    min_different: int = 0,
) -> Answer | None:
    """Return the choice with the lowest score that meets every row, or None when there is none.

    It differs from each of the `earlier` choices in at least `min_different` layers.

    Raises:
        StageError: when the solver ends without an answer, or with one that breaks a row.
    """
    kept = _undominated(programme) if not earlier else [range(len(scores)) for scores in programme.scores]
    model = pulp.LpProblem("choose", pulp.LpMinimize)
    variables = _add_choices(model, kept)
    model.setObjective(_sum(programme.scores, variables))
    for index, row in enumerate(programme.rows):
        model.addConstraint(_used(row, variables) <= 1 - row.fixed / row.upper, f"row_{index}")
    for index, other in enumerate(earlier):
        shared = pulp.lpSum(choices[other[layer]] for layer, choices in enumerate(variables))
        model.addConstraint(shared <= len(variables) - min_different, f"differs_from_{index}")
    _run_solver(model, time_limit_s=time_limit_s, relative_gap=relative_gap)
    if model.status == pulp.LpStatusInfeasible:
        return None
    status = _read_status(model, time_limit_s=time_limit_s)
    answer = Answer(chosen=_read_choice(variables), status=status, gap=_gap(model))
    _verify(answer, programme)
    return answer


def solve_diverse(
    programme: Programme, *, num_solutions: int, min_different: int, time_limit_s: float, relative_gap: float
) -> tuple[Answer, ...]:
    """Return the best choice, then the best that differs from all before it, and so on; fewer when no more exist.

    `time_limit_s` holds for each.

    Raises:
        StageError: as solve_programme.
    """
    found: list[Answer] = []
    while len(found) < num_solutions:
        answer = solve_programme(
            programme,
            time_limit_s=time_limit_s,
            relative_gap=relative_gap,
            earlier=[one.chosen for one in found],
            min_different=min_different,
        )
        if answer is None:
            break
        found.append(answer)
    return tuple(found)


def least_overrun(programme: Programme, *, time_limit_s: float) -> tuple[int, ...]:
    """Return the choice whose limits are overrun by the least in total, each as a share of its bound.

    Raises:
        StageError: when the solver ends without an answer.
    """
    model = pulp.LpProblem("least_overrun", pulp.LpMinimize)
    variables = _add_choices(model, _undominated(programme))
    overrun = [model.add_variable(f"overrun_{index}", lowBound=0) for index in range(len(programme.rows))]
    model.setObjective(pulp.lpSum(overrun))
    for index, row in enumerate(programme.rows):
        model.addConstraint(_used(row, variables) - overrun[index] <= 1 - row.fixed / row.upper, f"row_{index}")
    _run_solver(model, time_limit_s=time_limit_s, relative_gap=0.0)
    _read_status(model, time_limit_s=time_limit_s)
    return _read_choice(variables)


def _undominated(programme: Programme) -> list[list[int]]:
    """Return, layer by layer, the candidates that no other beats or equals in the score and in every row."""
    kept: list[list[int]] = []
    for layer, scores in enumerate(programme.scores):
        needs = [(score, *(row.cost[layer][index] for row in programme.rows)) for index, score in enumerate(scores)]
        kept.append(
            [
                index
                for index, ours in enumerate(needs)
                if not any(
                    all(their <= our for their, our in zip(theirs, ours, strict=True))
                    # Among equals only the first stays.
                    and (theirs != ours or rival < index)
                    for rival, theirs in enumerate(needs)
                    if rival != index
                )
            ]
        )
    return kept


def _add_choices(model: pulp.LpProblem, kept: Sequence[Sequence[int]]) -> list[dict[int, Any]]:
    """Add the variables of the kept candidates, and the rule that each layer takes one."""
    variables = [
        {index: model.add_variable(f"x_{layer}_{index}", cat=pulp.LpBinary) for index in indices}
        for layer, indices in enumerate(kept)
    ]
    for layer, choices in enumerate(variables):
        model.addConstraint(pulp.lpSum(choices.values()) == 1, f"one_in_layer_{layer:03d}")
    return variables


def _sum(values: Values, variables: Sequence[dict[int, Any]]) -> Any:
    return pulp.lpSum(
        values[layer][index] * variable
        for layer, choices in enumerate(variables)
        for index, variable in choices.items()
    )


def _used(row: Row, variables: Sequence[dict[int, Any]]) -> Any:
    scaled = tuple(tuple(cost / row.upper for cost in costs) for costs in row.cost)
    return _sum(scaled, variables)


def _run_solver(model: pulp.LpProblem, *, time_limit_s: float, relative_gap: float) -> None:
    # One thread and a fixed seed: the same tables give the same child.
    model.solve(
        pulp.HiGHS(
            msg=False,
            threads=1,
            gapRel=relative_gap,
            timeLimit=time_limit_s,
            random_seed=0,
            mip_feasibility_tolerance=FEASIBILITY_TOLERANCE,
            primal_feasibility_tolerance=FEASIBILITY_TOLERANCE,
        )
    )


def _read_status(model: pulp.LpProblem, *, time_limit_s: float) -> Literal["optimal", "feasible"]:
    if model.sol_status == pulp.LpSolutionOptimal:
        return "optimal"
    if model.sol_status == pulp.LpSolutionIntegerFeasible:
        return "feasible"
    raise StageError(
        f"the solver ended as {pulp.LpStatus[model.status]!r} without an answer after at most {time_limit_s:g} s: "
        "raise its time limit"
    )


def _gap(model: pulp.LpProblem) -> float:
    solver: Any = model.solverModel
    return float(solver.getInfo().mip_gap)


def _read_choice(variables: Sequence[dict[int, Any]]) -> tuple[int, ...]:
    return tuple(max(choices, key=lambda index, of=choices: of[index].value()) for choices in variables)


def _verify(answer: Answer, programme: Programme) -> None:
    broken = programme.broken_rows(answer.chosen)
    if broken:
        raise StageError(
            "the solver's answer breaks "
            + "; ".join(f"{row.name}: {row.total(answer.chosen):,.8g} of {row.upper:,.8g}" for row in broken)
            + ": lower search.relative_gap or loosen the limit a little"
        )
