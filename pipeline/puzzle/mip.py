"""The mixed-integer programme that chooses one block per layer (Puzzle, section 4.3 and appendix B). Pure.

Blocks and limits become the numbers of pipeline.puzzle.programme, and its answer becomes blocks again. On a table
of somebody else's library:

    python -m pipeline.puzzle.mip TABLE.json --minimize kl_div --limit memory_mib=80000 --limit runtime_ms=51200
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.architecture import BlockSpec
from pipeline.errors import InfeasibleError
from pipeline.puzzle.predictions import LinearLimit
from pipeline.puzzle.programme import (
    VERIFICATION_TOLERANCE,
    Answer,
    Programme,
    Row,
    least_overrun,
    solve_diverse,
    solve_programme,
)
from pipeline.recipe import PoolConfig


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

    @property
    def programme(self) -> Programme:
        """The same in plain numbers; rows stand in the order of the limits."""
        return Programme(
            scores=tuple(tuple(candidate.score for candidate in candidates) for candidates in self.layers),
            rows=tuple(
                Row(
                    name=limit.name,
                    fixed=limit.fixed,
                    upper=limit.upper,
                    cost=tuple(
                        tuple(limit.cost[candidate.block.key] for candidate in candidates) for candidates in self.layers
                    ),
                )
                for limit in self.limits
            ),
        )

    @property
    def blocks(self) -> tuple[tuple[BlockSpec, ...], ...]:
        """The blocks that every layer may become."""
        return tuple(tuple(candidate.block for candidate in candidates) for candidates in self.layers)

    def choose(self, chosen: Sequence[int]) -> tuple[Candidate, ...]:
        """Return the candidates at these places, one per layer."""
        return tuple(candidates[index] for candidates, index in zip(self.layers, chosen, strict=True))


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
    (solution,) = solve_pool(
        problem, PoolConfig(num_solutions=1, max_overlap=0.0), time_limit_s=time_limit_s, relative_gap=relative_gap
    )
    return solution


def solve_pool(problem: Problem, pool: PoolConfig, *, time_limit_s: float, relative_gap: float) -> tuple[Solution, ...]:
    """Return the best choice of blocks, then the best that differs enough from all before it; fewer where none is left.

    Raises:
        InfeasibleError, StageError: as solve.
    """
    programme = problem.programme
    _require_each_limit_reachable(problem, programme)
    answers = solve_diverse(
        programme,
        num_solutions=pool.num_solutions,
        min_different=max(1, math.ceil((1 - pool.max_overlap) * len(problem.layers))),
        time_limit_s=time_limit_s,
        relative_gap=relative_gap,
    )
    if not answers:
        raise _jointly_infeasible(problem, programme, time_limit_s=time_limit_s)
    return tuple(_solution(problem, answer) for answer in answers)


def solve_near(
    problem: Problem,
    blocks: Sequence[BlockSpec],
    *,
    max_changed_layers: int,
    time_limit_s: float,
    relative_gap: float,
) -> Solution | None:
    """Return the best choice that changes at most so many layers of `blocks`; None when none of those meets the limits.

    Raises:
        StageError: as solve.
    """
    programme = problem.programme
    changed = tuple(
        tuple(float(candidate.block.key != block.key) for candidate in candidates)
        for candidates, block in zip(problem.layers, blocks, strict=True)
    )
    row = Row(name="changed layers", fixed=0.0, upper=float(max_changed_layers), cost=changed)
    answer = solve_programme(
        Programme(scores=programme.scores, rows=(*programme.rows, row)),
        time_limit_s=time_limit_s,
        relative_gap=relative_gap,
    )
    return None if answer is None else _solution(problem, answer)


def violated_limits(blocks: Sequence[BlockSpec], limits: Sequence[LinearLimit]) -> tuple[LinearLimit, ...]:
    """Return the limits that a choice of blocks breaks, its costs added up from the tables."""
    return tuple(limit for limit in limits if limit.total(blocks) > limit.upper * (1 + VERIFICATION_TOLERANCE))


def _solution(problem: Problem, answer: Answer) -> Solution:
    return Solution(chosen=problem.choose(answer.chosen), status=answer.status, gap=answer.gap)


def _require_each_limit_reachable(problem: Problem, programme: Programme) -> None:
    out_of_reach = [
        limit for limit, row in zip(problem.limits, programme.rows, strict=True) if not row.is_met(row.least())
    ]
    if out_of_reach:
        raise InfeasibleError(
            "no choice of blocks meets "
            + "; ".join(
                f"{limit.name}: the best of all candidates is {limit.best(problem.blocks):,.4g}"
                for limit in out_of_reach
            )
            + ". "
            + _reachable_alone(problem)
            + " Loosen the limit, or add smaller variants to search_space"
        )


def _jointly_infeasible(problem: Problem, programme: Programme, *, time_limit_s: float) -> InfeasibleError:
    """Return the error for limits that can each be met but not together: the least total overrun, limit by limit."""
    blocks = [candidate.block for candidate in problem.choose(least_overrun(programme, time_limit_s=time_limit_s))]
    missed = violated_limits(blocks, problem.limits)
    nearest = "; ".join(f"{limit.name} reaches {limit.reached(blocks):,.4g}" for limit in missed)
    return InfeasibleError(
        f"the limits can each be met but not together: in the nearest choice of blocks {nearest}, all others met. "
        f"{_reachable_alone(problem)} Loosen one of them, or add variants to search_space"
    )


def _reachable_alone(problem: Problem) -> str:
    reach = ", ".join(f"{limit.name}: {limit.best(problem.blocks):,.4g}" for limit in problem.limits)
    return f"Best reachable for each limit alone: {reach}."


if __name__ == "__main__":
    from pipeline.puzzle.table_search import main

    main()
