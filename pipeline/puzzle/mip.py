"""The mixed-integer programme that chooses one block per layer (Puzzle, section 4.3 and appendix B). Pure.

    variables    x[i,j] in {0, 1}: layer i becomes candidate j                          _add_variables
    objective    min  sum_ij score[i,j] * x[i,j]                                        _set_objective
    one block    sum_j x[i,j] = 1                                     for every i       _add_one_block_per_layer
    limits       (fixed_k + sum_ij cost_k[i,j] * x[i,j]) / upper_k <= 1   for every k   _add_limits

Rows are divided by their bound, so milliseconds, bytes and parameters meet the solver at one scale. Within a layer a
candidate that is no better than another in its score and in every limit is left out first: the optimum is the same, and
among equals the one that comes first (the parent's block first of all) is taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pulp

from pipeline.architecture import BlockSpec
from pipeline.errors import InfeasibleError, StageError
from pipeline.puzzle.predictions import LinearLimit

# Rows are normalised to 1, so these are relative: below any rounding of a measured time.
FEASIBILITY_TOLERANCE = 1e-9
VERIFICATION_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One block that a layer may become, and what it costs in quality when it is the only change."""

    block: BlockSpec
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The candidates of every layer and the limits on their sum."""

    layers: tuple[tuple[Candidate, ...], ...]
    limits: tuple[LinearLimit, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """The chosen candidate of every layer; `feasible` means that the time limit ended the search with `gap` left."""

    chosen: tuple[Candidate, ...]
    status: Literal["optimal", "feasible"]
    gap: float

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The architecture's blocks."""
        return tuple(candidate.block for candidate in self.chosen)

    @property
    def objective(self) -> float:
        """The summed scores, added up from the candidates."""
        return math.fsum(candidate.score for candidate in self.chosen)


def solve(problem: Problem, *, time_limit_s: float, relative_gap: float) -> Solution:
    """Return the choice of blocks with the lowest summed score that meets every limit.

    Raises:
        InfeasibleError: naming the limits that bind and the best that each can reach.
        StageError: when the solver ends without an answer, or with one that breaks a limit.
    """
    _require_each_limit_reachable(problem)
    reduced = Problem(
        layers=tuple(_undominated(candidates, limits=problem.limits) for candidates in problem.layers),
        limits=problem.limits,
    )
    programme = pulp.LpProblem("choose_blocks", pulp.LpMinimize)
    variables = _add_variables(programme, reduced)
    _set_objective(programme, reduced, variables)
    _add_one_block_per_layer(programme, variables)
    _add_limits(programme, reduced, variables)
    _run_solver(programme, time_limit_s=time_limit_s, relative_gap=relative_gap)
    if programme.status == pulp.LpStatusInfeasible:
        raise _jointly_infeasible(reduced, time_limit_s=time_limit_s)
    status = _read_status(programme, time_limit_s=time_limit_s)
    solution = Solution(chosen=_extract(reduced, variables), status=status, gap=_gap(programme))
    _verify(solution, problem)
    return solution


def violated_limits(blocks: Sequence[BlockSpec], limits: Sequence[LinearLimit]) -> tuple[LinearLimit, ...]:
    """Return the limits that a choice of blocks breaks, its costs added up from the tables."""
    return tuple(limit for limit in limits if limit.total(blocks) > limit.upper * (1 + VERIFICATION_TOLERANCE))


def _undominated(candidates: Sequence[Candidate], *, limits: Sequence[LinearLimit]) -> tuple[Candidate, ...]:
    needs = [(one.score, *(limit.cost[one.block.key] for limit in limits)) for one in candidates]
    kept = []
    for index, candidate in enumerate(candidates):
        rivals = (
            other
            for rival, other in enumerate(needs)
            if rival != index
            and all(theirs <= ours for theirs, ours in zip(other, needs[index], strict=True))
            # Among equals only the first stays.
            and (other != needs[index] or rival < index)
        )
        if next(rivals, None) is None:
            kept.append(candidate)
    return tuple(kept)


def _add_variables(programme: pulp.LpProblem, problem: Problem) -> list[list[Any]]:
    return [
        [programme.add_variable(f"x_{layer}_{index}", cat=pulp.LpBinary) for index in range(len(candidates))]
        for layer, candidates in enumerate(problem.layers)
    ]


def _set_objective(programme: pulp.LpProblem, problem: Problem, variables: list[list[Any]]) -> None:
    programme.setObjective(pulp.lpSum(candidate.score * variable for candidate, variable in _pairs(problem, variables)))


def _add_one_block_per_layer(programme: pulp.LpProblem, variables: list[list[Any]]) -> None:
    for layer, choices in enumerate(variables):
        programme.addConstraint(pulp.lpSum(choices) == 1, f"one_block_in_layer_{layer:03d}")


def _add_limits(
    programme: pulp.LpProblem, problem: Problem, variables: list[list[Any]], *, slack: list[Any] | None = None
) -> None:
    for index, limit in enumerate(problem.limits):
        used = pulp.lpSum(
            limit.cost[candidate.block.key] / limit.upper * variable
            for candidate, variable in _pairs(problem, variables)
        )
        allowed = 1 - limit.fixed / limit.upper
        row = used <= allowed if slack is None else used - slack[index] <= allowed
        programme.addConstraint(row, f"limit_{index}_{limit.limit.quantity}")


def _run_solver(programme: pulp.LpProblem, *, time_limit_s: float, relative_gap: float) -> None:
    # One thread and a fixed seed: the same tables give the same child.
    programme.solve(
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


def _read_status(programme: pulp.LpProblem, *, time_limit_s: float) -> Literal["optimal", "feasible"]:
    if programme.sol_status == pulp.LpSolutionOptimal:
        return "optimal"
    if programme.sol_status == pulp.LpSolutionIntegerFeasible:
        return "feasible"
    raise StageError(
        f"the solver ended as {pulp.LpStatus[programme.status]!r} without an answer after at most {time_limit_s:g} s: "
        "raise search.time_limit_s"
    )


def _gap(programme: pulp.LpProblem) -> float:
    solver: Any = programme.solverModel
    return float(solver.getInfo().mip_gap)


def _extract(problem: Problem, variables: list[list[Any]]) -> tuple[Candidate, ...]:
    return tuple(
        candidates[max(range(len(candidates)), key=lambda index: choices[index].value())]
        for candidates, choices in zip(problem.layers, variables, strict=True)
    )


def _verify(solution: Solution, problem: Problem) -> None:
    broken = violated_limits(solution.blocks, problem.limits)
    if broken:
        raise StageError(
            "the solver's answer breaks "
            + "; ".join(
                f"{limit.name}: it needs {limit.quantity(limit.total(solution.blocks)):,.6g}" for limit in broken
            )
            + ": lower search.relative_gap or loosen the limit a little"
        )


def _require_each_limit_reachable(problem: Problem) -> None:
    best = {limit.name: _least(problem, limit) for limit in problem.limits}
    out_of_reach = [limit for limit in problem.limits if best[limit.name] > limit.upper * (1 + VERIFICATION_TOLERANCE)]
    if out_of_reach:
        raise InfeasibleError(
            "no choice of blocks meets "
            + "; ".join(
                f"{limit.name}: the best of all candidates is {limit.quantity(best[limit.name]):,.4g}"
                for limit in out_of_reach
            )
            + ". "
            + _reachable_alone(problem)
            + " Loosen the limit, or add smaller variants to search_space"
        )


def _jointly_infeasible(problem: Problem, *, time_limit_s: float) -> InfeasibleError:
    """Return the error for limits that can each be met but not together: the least total overrun, limit by limit."""
    programme = pulp.LpProblem("least_overrun", pulp.LpMinimize)
    variables = _add_variables(programme, problem)
    slack = [programme.add_variable(f"overrun_{index}", lowBound=0) for index in range(len(problem.limits))]
    programme.setObjective(pulp.lpSum(slack))
    _add_one_block_per_layer(programme, variables)
    _add_limits(programme, problem, variables, slack=slack)
    _run_solver(programme, time_limit_s=time_limit_s, relative_gap=0.0)
    _read_status(programme, time_limit_s=time_limit_s)
    blocks = [candidate.block for candidate in _extract(problem, variables)]
    missed = violated_limits(blocks, problem.limits)
    nearest = "; ".join(f"{limit.name} reaches {limit.quantity(limit.total(blocks)):,.4g}" for limit in missed)
    return InfeasibleError(
        f"the limits can each be met but not together: in the nearest choice of blocks {nearest}, all others met. "
        f"{_reachable_alone(problem)} Loosen one of them, or add variants to search_space"
    )


def _reachable_alone(problem: Problem) -> str:
    reach = ", ".join(f"{limit.name}: {limit.quantity(_least(problem, limit)):,.4g}" for limit in problem.limits)
    return f"Best reachable for each limit alone: {reach}."


def _least(problem: Problem, limit: LinearLimit) -> float:
    """Return the smallest total of one limit; it separates over layers, so no solver is needed."""
    return limit.fixed + sum(
        min(limit.cost[candidate.block.key] for candidate in candidates) for candidates in problem.layers
    )


def _pairs(problem: Problem, variables: list[list[Any]]) -> list[tuple[Candidate, Any]]:
    return [
        (candidate, variable)
        for candidates, choices in zip(problem.layers, variables, strict=True)
        for candidate, variable in zip(candidates, choices, strict=True)
    ]
