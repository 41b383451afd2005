"""One choice per layer under linear limits, as a mixed-integer programme in plain numbers. Pure; knows no blocks.

    variables    x[i,j] in {0, 1}: layer i takes its candidate j
    objective    min  sum_ij score[i,j] * x[i,j]
    one choice   sum_j x[i,j] = 1                                         for every layer i
    limits       (fixed_k + sum_ij cost_k[i,j] * x[i,j] + z_k) / upper_k <= 1   for every row k
    peaks        z_k >= sum_j peak_k[i,j] * x[i,j]                        for every layer i, where row k has peaks
    one family   sum_(j in f) x[i,j] = u[f], u[f] in {0, 1}               for every layer i and family f, where asked
    diversity    sum_i x[i, y_i] <= L - min_different                     for every earlier answer y

(Puzzle, section 4.3 and appendix B; peaks and families are ours.) A peak is what layers need in turn and not together,
such as activations: its maximum is exact, where the widest candidate's as a constant would refuse children that are
narrow throughout. Rows are divided by their bound, so milliseconds, bytes and parameters meet the solver at one scale.
Without earlier answers, a candidate that is no better than another of its layer and family, neither in its score nor in
any row, is left out first: the optimum is the same, and among equals the one that comes first is taken. A diverse
answer may want such a candidate, so there all stay.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pulp

from pipeline.errors import StageError
from pipeline.puzzle.totals import least_total

# Rows are normalised to 1, so these are relative: below any rounding of a measured time.
FEASIBILITY_TOLERANCE = 1e-9
VERIFICATION_TOLERANCE = 1e-6

Values = tuple[tuple[float, ...], ...]  # by layer, then by candidate


class OutOfTimeError(StageError):
    """A solver whose time ended before it had any answer; there may be one all the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One limit: `fixed`, the cost of every chosen candidate and the largest peak of any stay within `upper`."""

    name: str
    fixed: float
    upper: float
    cost: Values
    peak: Values | None = None

    def total(self, chosen: Sequence[int]) -> float:
        """Return what a choice of candidates needs."""
        used = self.fixed + math.fsum(costs[index] for costs, index in zip(self.cost, chosen, strict=True))
        if self.peak is None:
            return used
        return used + max(peaks[index] for peaks, index in zip(self.peak, chosen, strict=True))

    def is_met(self, total: float) -> bool:
        """Return whether a total stays within the bound, rounding aside."""
        return total <= self.upper * (1 + VERIFICATION_TOLERANCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Programme:
    """The score of every candidate of every layer, and the limits on their sums.

    With `families`, by layer and candidate, all layers take candidates of one and the same family.
    """

    scores: Values
    rows: tuple[Row, ...]
    families: tuple[tuple[str, ...], ...] | None = None

    @property
    def common_families(self) -> tuple[str, ...]:
        """The families that every layer has, in the first layer's order; none where they are not asked for."""
        if self.families is None:
            return ()
        first, *others = self.families
        return tuple(family for family in dict.fromkeys(first) if all(family in other for other in others))

    @property
    def alternatives(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The candidates that layers may choose from freely: all, or those of one common family after another."""
        if self.families is None:
            return (tuple(tuple(range(len(scores))) for scores in self.scores),)
        return tuple(
            tuple(tuple(index for index, one in enumerate(layer) if one == family) for layer in self.families)
            for family in self.common_families
        )

    def least(self, row: Row) -> float:
        """Return the smallest total of a row that any choice needs, other rows aside; infinite without any choice."""
        return min(
            (
                least_total(
                    row.fixed,
                    [[row.cost[layer][index] for index in indices] for layer, indices in enumerate(allowed)],
                    None
                    if row.peak is None
                    else [[row.peak[layer][index] for index in indices] for layer, indices in enumerate(allowed)],
                )
                for allowed in self.alternatives
            ),
            default=math.inf,
        )

    def objective(self, chosen: Sequence[int]) -> float:
        """Return the summed scores of a choice."""
        return math.fsum(scores[index] for scores, index in zip(self.scores, chosen, strict=True))

    def broken_rows(self, chosen: Sequence[int]) -> tuple[Row, ...]:
        """Return the limits that a choice breaks, its costs added up from the tables."""
        return tuple(row for row in self.rows if not row.is_met(row.total(chosen)))

    def is_one_family(self, chosen: Sequence[int]) -> bool:
        """Return whether a choice keeps to one family, where that is asked for."""
        if self.families is None:
            return True
        return len({families[index] for families, index in zip(self.families, chosen, strict=True)}) == 1


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
        OutOfTimeError: when its time ends before the solver has an answer.
        StageError: when it ends without an answer otherwise, or with one that breaks a row.
    """
    kept = _undominated(programme) if not earlier else [range(len(scores)) for scores in programme.scores]
    model = pulp.LpProblem("choose", pulp.LpMinimize)
    variables = _add_choices(model, kept, programme)
    model.setObjective(_sum(_near_one(programme.scores), variables))
    for index, row in enumerate(programme.rows):
        used = _used(model, row, variables, name=f"row_{index}")
        model.addConstraint(used <= 1 - row.fixed / row.upper, f"row_{index}")
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
    programme: Programme,
    *,
    num_solutions: int,
    min_different: int,
    time_limit_s: float,
    relative_gap: float,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Answer, ...]:
    """Return the best choice, then the best that differs from all before it, and so on; fewer when no more exist.

    `time_limit_s` holds for each. Where it ends before a later answer is there, those found so far are returned, and
    `note` is told.

    Raises:
        OutOfTimeError, StageError: as solve_programme; the first for the best choice alone.
    """
    found: list[Answer] = []
    while len(found) < num_solutions:
        try:
            answer = solve_programme(
                programme,
                time_limit_s=time_limit_s,
                relative_gap=relative_gap,
                earlier=[one.chosen for one in found],
                min_different=min_different,
            )
        except OutOfTimeError:
            if not found:
                raise
            note(
                f"the pool ends at {len(found)} of {num_solutions} answers: the solver found no other within its time "
                f"limit of {time_limit_s:g} s; raise it for more"
            )
            break
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
    variables = _add_choices(model, _undominated(programme), programme)
    overrun = [model.add_variable(f"overrun_{index}", lowBound=0) for index in range(len(programme.rows))]
    model.setObjective(pulp.lpSum(overrun))
    for index, row in enumerate(programme.rows):
        used = _used(model, row, variables, name=f"row_{index}")
        model.addConstraint(used - overrun[index] <= 1 - row.fixed / row.upper, f"row_{index}")
    _run_solver(model, time_limit_s=time_limit_s, relative_gap=0.0)
    _read_status(model, time_limit_s=time_limit_s)
    return _read_choice(variables)


def least_of_row(programme: Programme, index: int, *, time_limit_s: float) -> tuple[int, ...] | None:
    """Return the choice that needs least of one row while it meets all others; None when none meets those.

    Raises:
        StageError: when the solver ends without an answer.
    """
    model = pulp.LpProblem("least_of_row", pulp.LpMinimize)
    variables = _add_choices(model, _undominated(programme), programme)
    for place, row in enumerate(programme.rows):
        used = _used(model, row, variables, name=f"row_{place}")
        if place == index:
            model.setObjective(used)
        else:
            model.addConstraint(used <= 1 - row.fixed / row.upper, f"row_{place}")
    _run_solver(model, time_limit_s=time_limit_s, relative_gap=0.0)
    if model.status == pulp.LpStatusInfeasible:
        return None
    _read_status(model, time_limit_s=time_limit_s)
    return _read_choice(variables)


def _undominated(programme: Programme) -> list[list[int]]:
    """Return, layer by layer, the candidates that no other of their family beats or equals in score and every row."""
    kept: list[list[int]] = []
    for layer, scores in enumerate(programme.scores):
        families = None if programme.families is None else programme.families[layer]
        columns = [scores, *(row.cost[layer] for row in programme.rows)]
        columns += [row.peak[layer] for row in programme.rows if row.peak is not None]
        needs = list(zip(*columns, strict=True))
        kept.append(
            [
                index
                for index, ours in enumerate(needs)
                if not any(
                    all(their <= our for their, our in zip(theirs, ours, strict=True))
                    # Among equals only the first stays.
                    and (theirs != ours or rival < index)
                    for rival, theirs in enumerate(needs)
                    if rival != index and (families is None or families[rival] == families[index])
                )
            ]
        )
    return kept


def _add_choices(model: pulp.LpProblem, kept: Sequence[Sequence[int]], programme: Programme) -> list[dict[int, Any]]:
    """Add the variables of the kept candidates, and the rules that each layer takes one, all of one family if asked."""
    variables = [
        {index: model.add_variable(f"x_{layer}_{index}", cat=pulp.LpBinary) for index in indices}
        for layer, indices in enumerate(kept)
    ]
    for layer, choices in enumerate(variables):
        model.addConstraint(pulp.lpSum(choices.values()) == 1, f"one_in_layer_{layer:03d}")
    if programme.families is not None:
        _add_families(model, variables, programme.families, common=programme.common_families)
    return variables


def _add_families(
    model: pulp.LpProblem,
    variables: Sequence[dict[int, Any]],
    families: Sequence[Sequence[str]],
    *,
    common: Sequence[str],
) -> None:
    chosen = {family: model.add_variable(f"u_{number}", cat=pulp.LpBinary) for number, family in enumerate(common)}
    model.addConstraint(pulp.lpSum(chosen.values()) == 1, "one_family")
    for layer, choices in enumerate(variables):
        for number, family in enumerate(common):
            members = [one for index, one in choices.items() if families[layer][index] == family]
            model.addConstraint(pulp.lpSum(members) == chosen[family], f"family_{number}_in_layer_{layer:03d}")


def _near_one(scores: Values) -> Values:
    """Return the scores times the power of two that brings the largest near one: HiGHS takes 1e-7 for nothing."""
    largest = max((abs(score) for layer in scores for score in layer), default=0.0)
    exponent = math.frexp(largest)[1]
    return tuple(tuple(math.ldexp(score, -exponent) for score in layer) for layer in scores)


def _sum(values: Values, variables: Sequence[dict[int, Any]]) -> Any:
    return pulp.lpSum(
        values[layer][index] * variable
        for layer, choices in enumerate(variables)
        for index, variable in choices.items()
    )


def _used(model: pulp.LpProblem, row: Row, variables: Sequence[dict[int, Any]], *, name: str) -> Any:
    """Return what a choice uses of a row's bound, `fixed` aside; a row with peaks gets a variable for the largest."""
    scaled = tuple(tuple(cost / row.upper for cost in costs) for costs in row.cost)
    used = _sum(scaled, variables)
    if row.peak is None:
        return used
    largest = model.add_variable(f"peak_of_{name}", lowBound=0)
    for layer, (choices, peaks) in enumerate(zip(variables, row.peak, strict=True)):
        need = pulp.lpSum(peaks[index] / row.upper * variable for index, variable in choices.items())
        model.addConstraint(need <= largest, f"peak_of_{name}_in_layer_{layer:03d}")
    return used + largest


def _run_solver(model: pulp.LpProblem, *, time_limit_s: float, relative_gap: float) -> None:
    # One thread and a fixed seed: the same tables give the same child.
    model.solve(
        pulp.HiGHS(
            msg=False,
            threads=1,
            gapRel=relative_gap,
            gapAbs=0.0,  # HiGHS's own default of 1e-6 would override a smaller relative gap
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
    solver: Any = model.solverModel
    is_out_of_time = solver.getModelStatus().name == "kTimeLimit"  # PuLP's status is that of a failure, too
    raise (OutOfTimeError if is_out_of_time else StageError)(
        f"the solver ended as {pulp.LpStatus[model.status]!r} without an answer after at most {time_limit_s:g} s: "
        "raise its time limit"
    )


def _gap(model: pulp.LpProblem) -> float:
    solver: Any = model.solverModel
    return float(solver.getInfo().mip_gap)


def _read_choice(variables: Sequence[dict[int, Any]]) -> tuple[int, ...]:
    return tuple(max(choices, key=lambda index, of=choices: of[index].value()) for choices in variables)


def _verify(answer: Answer, programme: Programme) -> None:
    if not programme.is_one_family(answer.chosen):
        raise StageError("the solver's answer takes candidates of several families: lower search.relative_gap")
    broken = programme.broken_rows(answer.chosen)
    if broken:
        raise StageError(
            "the solver's answer breaks "
            + "; ".join(f"{row.name}: {row.total(answer.chosen):,.8g} of {row.upper:,.8g}" for row in broken)
            + ": lower search.relative_gap or loosen the limit a little"
        )
