"""The mixed-integer programme that chooses one block per layer (Puzzle, section 4.3 and appendix B). Pure.

Blocks and limits become the numbers of pipeline.puzzle.programme, and its answer becomes blocks again. On a table
of somebody else's library:

    python -m pipeline.puzzle.mip TABLE.json --minimize kl_div --limit memory_mib=80000 --limit runtime_ms=51200

Patterns over layers (one block, attention or FFN for all) are families of the programme.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.architecture import BlockSpec
from pipeline.errors import InfeasibleError
from pipeline.puzzle.limits import LOWER_BOUNDS, LinearLimit
from pipeline.puzzle.patterns import SHARED
from pipeline.puzzle.programme import (
    VERIFICATION_TOLERANCE,
    Answer,
    OutOfTimeError,
    Programme,
    Row,
    Values,
    least_of_row,
    least_overrun,
    solve_diverse,
    solve_programme,
)
from pipeline.recipe import LayerPattern, PoolConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One block that a layer may become, and what it costs in quality when it is the only change."""

    block: BlockSpec
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The candidates of every layer, the limits on their sum, and what the layers must have in common."""

    layers: tuple[tuple[Candidate, ...], ...]
    limits: tuple[LinearLimit, ...]
    pattern: LayerPattern = "heterogeneous"

    @property
    def programme(self) -> Programme:
        """The same in plain numbers; rows stand in the order of the limits."""
        shared = SHARED.get(self.pattern)
        return Programme(
            scores=tuple(tuple(candidate.score for candidate in candidates) for candidates in self.layers),
            rows=tuple(
                Row(
                    name=limit.name,
                    fixed=limit.fixed,
                    upper=limit.upper,
                    cost=self._values(limit.cost),
                    peak=None if limit.peak is None else self._values(limit.peak),
                )
                for limit in self.limits
            ),
            families=None
            if shared is None
            else tuple(tuple(shared(candidate.block) for candidate in candidates) for candidates in self.layers),
        )

    @property
    def alternatives(self) -> "tuple[Problem, ...]":
        """Problems whose layers choose freely and which together hold every choice: one for each thing to share."""
        return tuple(
            replace(
                self,
                pattern="heterogeneous",
                layers=tuple(
                    tuple(candidates[index] for index in indices)
                    for candidates, indices in zip(self.layers, allowed, strict=True)
                ),
            )
            for allowed in self.programme.alternatives
        )

    def best(self, limit: LinearLimit) -> float:
        """Return the best that any choice reaches of one limit, in the unit of its bound, other limits aside."""
        reached = [
            limit.best([[candidate.block for candidate in candidates] for candidates in alternative.layers])
            for alternative in self.alternatives
        ]
        return max(reached) if limit.limit.quantity in LOWER_BOUNDS else min(reached)

    def choose(self, chosen: Sequence[int]) -> tuple[Candidate, ...]:
        """Return the candidates at these places, one per layer."""
        return tuple(candidates[index] for candidates, index in zip(self.layers, chosen, strict=True))

    def _values(self, of_block: Mapping[str, float]) -> Values:
        return tuple(tuple(of_block[candidate.block.key] for candidate in candidates) for candidates in self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """The chosen candidate of every layer; where it is only `feasible`, its sum is at most the share `gap` too high."""

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


def solve_pool(
    problem: Problem,
    pool: PoolConfig,
    *,
    time_limit_s: float,
    relative_gap: float,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Solution, ...]:
    """Return the best choice of blocks, then the best that differs enough from all before it; fewer where none is left.

    Fewer, too, where the time limit ends before a later one is found, of which `note` is told.

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
        note=note,
    )
    if not answers:
        raise _jointly_infeasible(problem, programme, time_limit_s=time_limit_s)
    return tuple(_solution(problem, answer) for answer in answers)


def find(problem: Problem, *, time_limit_s: float, relative_gap: float) -> Solution | None:
    """Return what solve does; None, and no account of why, when no choice meets the limits.

    Raises:
        OutOfTimeError, StageError: as solve_programme.
    """
    answer = solve_programme(problem.programme, time_limit_s=time_limit_s, relative_gap=relative_gap)
    return None if answer is None else _solution(problem, answer)


def solve_near(
    problem: Problem,
    blocks: Sequence[BlockSpec],
    *,
    max_changed_layers: int,
    excluded: Sequence[Sequence[BlockSpec]],
    time_limit_s: float,
    relative_gap: float,
) -> Solution | None:
    """Return the best choice that changes at most so many layers of `blocks`, and is none of those excluded.

    None when no such choice meets the limits.

    Raises:
        OutOfTimeError, StageError: as solve_programme.
    """
    programme = problem.programme
    changed = Row(
        name="changed layers",
        fixed=0.0,
        upper=float(max_changed_layers),
        cost=tuple(tuple(1.0 - same for same in layer) for layer in _alike(problem, blocks)),
    )
    others = [
        Row(name="another choice", fixed=1.0, upper=float(len(problem.layers)), cost=_alike(problem, one))
        for one in excluded
    ]
    answer = solve_programme(
        replace(programme, rows=(*programme.rows, changed, *others)),
        time_limit_s=time_limit_s,
        relative_gap=relative_gap,
    )
    return None if answer is None else _solution(problem, answer)


def _alike(problem: Problem, blocks: Sequence[BlockSpec]) -> Values:
    """Return 1 for each candidate that is the layer's block of this choice, 0 for the others."""
    return tuple(
        tuple(float(candidate.block.key == block.key) for candidate in candidates)
        for candidates, block in zip(problem.layers, blocks, strict=True)
    )


def violated_limits(blocks: Sequence[BlockSpec], limits: Sequence[LinearLimit]) -> tuple[LinearLimit, ...]:
    """Return the limits that a choice of blocks breaks, its costs added up from the tables."""
    return tuple(limit for limit in limits if limit.total(blocks) > limit.upper * (1 + VERIFICATION_TOLERANCE))


def _solution(problem: Problem, answer: Answer) -> Solution:
    return Solution(chosen=problem.choose(answer.chosen), status=answer.status, gap=answer.gap)


def _require_each_limit_reachable(problem: Problem, programme: Programme) -> None:
    out_of_reach = [
        limit for limit, row in zip(problem.limits, programme.rows, strict=True) if not row.is_met(programme.least(row))
    ]
    if out_of_reach:
        raise InfeasibleError(
            "no choice of blocks meets "
            + "; ".join(
                f"{limit.name}: the best of all candidates is {problem.best(limit):,.4g}" for limit in out_of_reach
            )
            + ". "
            + _reachable_alone(problem)
            + f" Loosen the limit{_or_untie(problem)}, or add smaller variants to search_space"
        )


def _jointly_infeasible(problem: Problem, programme: Programme, *, time_limit_s: float) -> InfeasibleError:
    """Return the error for limits that can each be met but not together, with how far each must move to be met."""
    blocks = [candidate.block for candidate in problem.choose(least_overrun(programme, time_limit_s=time_limit_s))]
    missed = violated_limits(blocks, problem.limits)
    nearest = "; ".join(f"{limit.name} reaches {limit.reached(blocks):,.4g}" for limit in missed)
    return InfeasibleError(
        f"the limits can each be met but not together. {_reachable_beside(problem, programme, time_limit_s)} "
        f"In the nearest choice of blocks {nearest}, all others met. {_reachable_alone(problem)} "
        f"Loosen one of them{_or_untie(problem)}, or add variants to search_space"
    )


def _reachable_beside(problem: Problem, programme: Programme, time_limit_s: float) -> str:
    reach: list[str] = []
    for index, limit in enumerate(problem.limits):
        try:
            chosen = least_of_row(programme, index, time_limit_s=time_limit_s)
        except OutOfTimeError:
            reach.append(f"{limit.name}: not known within {time_limit_s:g} s")
            continue
        if chosen is None:
            reach.append(f"{limit.name}: nothing, for the others exclude each other")
        else:
            reached = limit.reached([candidate.block for candidate in problem.choose(chosen)])
            reach.append(f"{limit.name}: {reached:,.4g}")
    return f"Best reachable for each limit while all others are met: {', '.join(reach)}."


def _reachable_alone(problem: Problem) -> str:
    reach = ", ".join(f"{limit.name}: {problem.best(limit):,.4g}" for limit in problem.limits)
    return f"Best reachable for each limit alone: {reach}."


def _or_untie(problem: Problem) -> str:
    return "" if problem.pattern == "heterogeneous" else f", set search.layers: heterogeneous ({problem.pattern} now)"


if __name__ == "__main__":
    from pipeline.puzzle.table_search import main

    main()
