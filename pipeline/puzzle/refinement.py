"""From a pool of answers to the child that is best as a whole model, and from there to better ones.

Sums of replace-1-block scores choose badly where many layers go: what a layer is worth depends on which others stay.
So the answers are scored as whole models, beside what simpler methods choose of the same blocks (baselines.py), which
sums lose to where much has to go, and beside a child that was reached in steps: the limits are tightened from what the
parent needs to what is asked, and each step is chosen by scores around the child of the step before.
Around the best of these, x, blocks are measured again with x's other blocks in place.
With d[i,j] = measure(x with block j in layer i) - measure(x), the programme

    min sum_ij d[i,j] y[i,j]    under the target's limits, at most r layers of y unlike x

is linear again and exact for one change of one half (half_scores.py); it is solved for r, r/2, r/4, ... 1, its best few
answers to each are scored as whole models, and the best of them becomes x where it is better. Few, and not one: sums
over several changes promise too much, and the answer that promises most is the one most likely to.

What chooses among hundreds of blocks by few tokens fits those tokens. So every round measures on others, a round that
brings nothing better is followed by one whose d is the mean over all that was measured around the same x, and whole
models, of which there are few, are compared on more. (The scoring is Puzzle's, section 4.2; the rounds are ours.)
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl

from pipeline.architecture import BlockSpec
from pipeline.errors import StageError
from pipeline.progress import Reporter
from pipeline.puzzle.divergence import Divergence
from pipeline.puzzle.limits import LinearLimit
from pipeline.puzzle.mip import Problem, Solution, find, solve_near, violated_limits
from pipeline.puzzle.predictions import CostModel
from pipeline.puzzle.programme import OutOfTimeError
from pipeline.puzzle.search import SolutionRecord, base_value, block_of, build_problem, record_solution, search
from pipeline.puzzle.search_space import attention_rank, ffn_rank
from pipeline.puzzle.tables import MEASURES
from pipeline.recipe import Objective, Requirements, SearchConfig

POOL = "pool"
"""What the origin of an answer to the programme over the parent's scores begins with."""
IN_STEPS = "limits tightened in steps"
"""The origin of the child that was reached by scores around children with less taken away."""
ROUND = "round"
"""What the origin of an answer to the programme over scores around a child begins with."""

ScoreWholeModels = Callable[[Mapping[str, Sequence[BlockSpec]]], Mapping[str, Divergence]]
ScoreAround = Callable[[Sequence[BlockSpec], int], pl.DataFrame]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSolution:
    """An answer, where it came from, and how far the child it describes is from the parent as a whole model."""

    origin: str
    record: SolutionRecord
    divergence: Divergence

    def value(self, objective: Objective) -> float:
        """Return the measure that the search minimises."""
        value = getattr(self.divergence, objective)
        assert value is not None, objective  # the recipe asks for the task whose error it minimises
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Refinement:
    """Everything that was scored, in order, the best of it, and the scores around the last centre."""

    scored: tuple[ScoredSolution, ...]
    best: ScoredSolution
    scores: pl.DataFrame


def refine(
    pool: Sequence[SolutionRecord],
    scores: pl.DataFrame,
    *,
    others: Callable[[Problem], Mapping[str, Sequence[BlockSpec] | None]],
    score_whole_models: ScoreWholeModels,
    score_around: ScoreAround,
    num_parts: int,
    costs: CostModel,
    requirements: Requirements,
    settings: SearchConfig,
    reporter: Reporter,
) -> Refinement:
    """Return the best child found from a pool of answers and from what other methods choose.

    Args:
        pool: answers to the programme over `scores`.
        scores: replace-1-block scores around the parent.
        others: gives, for the programme over `scores`, children by the method that chose them; one that is no choice
            of the programme, as where it breaks a limit, a pin or the pattern of layers, is left out.
        score_whole_models: measures children.
        score_around: measures blocks in the company of a child's other blocks, on the tokens of the given round.
        num_parts: how many rounds have tokens of their own before the first one's come again.
        costs: what blocks cost.
        requirements: the target's.
        settings: the recipe's search section.
        reporter: who listens.
    """
    objective = settings.objective

    def measure(records: Mapping[str, SolutionRecord]) -> list[ScoredSolution]:
        divergences = score_whole_models({origin: record.blocks for origin, record in records.items()})
        return [
            ScoredSolution(origin=origin, record=record, divergence=divergences[origin])
            for origin, record in records.items()
        ]

    def recorded(solution: Solution, problem: Problem, scores: pl.DataFrame) -> SolutionRecord:
        return record_solution(
            solution,
            problem=problem,
            base_value=base_value(scores, objective),
            costs=costs,
            target_name=pool[0].target_name,
            settings=settings,
        )

    def build(scores: pl.DataFrame) -> Problem:
        return build_problem(scores, costs=costs, requirements=requirements, settings=settings)

    problem = build(scores)
    starts = {f"{POOL} {number}": record for number, record in enumerate(pool)}
    least = math.fsum(pool[0].layer_scores)
    for method, blocks in others(problem).items():
        choice = None if blocks is None else _as_solution(problem, blocks, least=least)
        if choice is None:
            why = "meets no limits" if blocks is None else "chooses no child that the programme may"
            reporter.note(f"{method} {why}")
        else:
            starts[method] = recorded(choice, problem, scores)
    num_rounds = settings.most_rounds(num_layers=len(costs.parent.blocks))
    asks_for_less = any(limit.reference > limit.upper for limit in problem.limits)
    num_steps = settings.refinement.path_steps if num_rounds and asks_for_less else 1
    if num_steps > 1:
        reached = _walk(
            scores, num_steps=num_steps, score_around=score_around, build=build, settings=settings, note=reporter.note
        )
        if reached is not None:
            starts[IN_STEPS] = recorded(*reached)
    scored = measure(starts)
    best = min(scored, key=lambda one: one.value(objective))
    around: list[pl.DataFrame] = []
    for number in range(1, num_rounds + 1):
        reporter.note(
            f"round {number}: {best.origin} has {objective} {best.value(objective):.4f} as a whole model, "
            f"{best.record.objective:.4f} by its sum"
        )
        around.append(score_around(best.record.blocks, num_steps - 1 + number))
        scores = _mean(around)
        problem = build(scores)
        proposals = {
            f"{ROUND} {number}, {name}": recorded(solution, problem, scores)
            for name, solution in _proposals(
                problem,
                best.record.blocks,
                known=[one.record.blocks for one in scored],
                settings=settings,
                note=reporter.note,
            )
        }
        found = measure(proposals) if proposals else []
        scored += found
        better = min([best, *found], key=lambda one: one.value(objective))
        if better is not best:
            best, around = better, []
        elif len(around) == num_parts:
            break
    return Refinement(scored=tuple(scored), best=best, scores=scores)


def search_again(
    scores: pl.DataFrame,
    *,
    costs: CostModel,
    target_name: str,
    requirements: Requirements,
    settings: SearchConfig,
    note: Callable[[str], None] = lambda _: None,
) -> SolutionRecord:
    """Return the best answer near the model that was scored; of all answers, where none near it meets the limits.

    Sums of scores around a model are held good for `refinement.max_changed_layers` changes and no more. Where the time
    limit ends before one near it is found, `note` is told, and all answers are searched.

    Raises:
        InfeasibleError, RecipeError: as search.
    """
    problem = build_problem(scores, costs=costs, requirements=requirements, settings=settings)
    centre = _scored_blocks(scores, len(problem.layers))
    near = None
    if centre is not None:
        near = _solve_near(
            problem,
            centre,
            max_changed_layers=settings.refinement.max_changed_layers,
            excluded=(),
            settings=settings,
            note=note,
        )
    if near is None:
        return search(scores, costs=costs, target_name=target_name, requirements=requirements, settings=settings)[0]
    return record_solution(
        near,
        problem=problem,
        base_value=base_value(scores, settings.objective),
        costs=costs,
        target_name=target_name,
        settings=settings,
    )


def _scored_blocks(scores: pl.DataFrame, num_layers: int) -> list[BlockSpec] | None:
    """Return the blocks of the model that was scored; None where some layer's is no candidate."""
    rows = scores.filter("is_base").sort("layer")
    if rows["layer"].to_list() != list(range(num_layers)):
        return None
    return [block_of(row) for row in rows.iter_rows(named=True)]


def _as_solution(problem: Problem, blocks: Sequence[BlockSpec], *, least: float) -> Solution | None:
    """Return a child as an answer to the programme; None where it is none. `least` is the sum of the best answer."""
    for alternative in problem.alternatives:
        own = [{candidate.block.key: candidate for candidate in candidates} for candidates in alternative.layers]
        if all(block.key in one for block, one in zip(blocks, own, strict=True)):
            if violated_limits(blocks, problem.limits):
                return None
            chosen = tuple(one[block.key] for block, one in zip(blocks, own, strict=True))
            total = math.fsum(candidate.score for candidate in chosen)
            return Solution(chosen=chosen, status="feasible", gap=1 - least / total if total > 0 else 0.0)
    return None


def _walk(
    scores: pl.DataFrame,
    *,
    num_steps: int,
    score_around: ScoreAround,
    build: Callable[[pl.DataFrame], Problem],
    settings: SearchConfig,
    note: Callable[[str], None],
) -> tuple[Solution, Problem, pl.DataFrame] | None:
    """Return the child of the last step, and the problem and scores that it answers.

    None where a step has no answer. A step leaves what the parent needs beyond the limits but for its share of it, and
    gives nothing back: neither half of a layer's block becomes larger than it was in the step before.
    """
    problem = build(scores)

    def answer(step: int) -> Solution | None:
        eased = replace(problem, limits=tuple(_eased(one, share=1 - step / num_steps) for one in problem.limits))
        try:
            found = find(eased, time_limit_s=settings.time_limit_s, relative_gap=settings.relative_gap)
            reason = "nothing smaller than the step before meets its limits"
        except StageError as err:
            found, reason = None, str(err)
        note(f"step {step} of {num_steps} from the parent" + ("" if found is not None else f" has no answer: {reason}"))
        return found

    for step in range(1, num_steps):
        found = answer(step)
        if found is None:
            return None
        scores = score_around(found.blocks, step)
        problem = _no_larger(build(scores), found.blocks)
    last = answer(num_steps)
    return None if last is None else (last, problem, scores)


def _eased(limit: LinearLimit, *, share: float) -> LinearLimit:
    """Return a limit with room for a share of what the parent needs beyond it."""
    return replace(limit, upper=limit.upper + share * max(0.0, limit.reference - limit.upper))


def _no_larger(problem: Problem, blocks: Sequence[BlockSpec]) -> Problem:
    """Return the problem with the candidates neither half of which is larger than that of these blocks."""
    return replace(
        problem,
        layers=tuple(
            tuple(
                one
                for one in candidates
                if attention_rank(one.block.attention) >= attention_rank(own.attention)
                and ffn_rank(one.block.ffn) >= ffn_rank(own.ffn)
            )
            for candidates, own in zip(problem.layers, blocks, strict=True)
        ),
    )


def _mean(tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Return the mean of scores around one model on as many tokens each."""
    keys = ("layer", "attention", "ffn", "is_base")
    return (
        pl.concat(tables)
        .group_by(keys, maintain_order=True)
        .agg(pl.col(*MEASURES).mean(), pl.col("num_tokens").sum())
        .select(tables[0].columns)
    )


def _proposals(
    problem: Problem,
    blocks: Sequence[BlockSpec],
    *,
    known: Sequence[Sequence[BlockSpec]],
    settings: SearchConfig,
    note: Callable[[str], None],
) -> Iterator[tuple[str, Solution]]:
    """Give the best answers for shrinking numbers of layers that may change, none twice and none of the `known`."""
    seen = list(known)
    max_changed = settings.refinement.max_changed_layers
    while max_changed:
        for number in range(1, settings.refinement.answers_per_step + 1):
            solution = _solve_near(
                problem, blocks, max_changed_layers=max_changed, excluded=seen, settings=settings, note=note
            )
            if solution is None:
                break
            seen.append(solution.blocks)
            yield f"at most {max_changed} layers changed, answer {number}", solution
        max_changed //= 2


def _solve_near(
    problem: Problem,
    blocks: Sequence[BlockSpec],
    *,
    max_changed_layers: int,
    excluded: Sequence[Sequence[BlockSpec]],
    settings: SearchConfig,
    note: Callable[[str], None],
) -> Solution | None:
    """Return what solve_near does; None, too, where its time ends before it has an answer, of which `note` is told."""
    try:
        return solve_near(
            problem,
            blocks,
            max_changed_layers=max_changed_layers,
            excluded=excluded,
            time_limit_s=settings.time_limit_s,
            relative_gap=settings.relative_gap,
        )
    except OutOfTimeError:
        note(
            f"no answer with at most {max_changed_layers} layers changed: the solver found none within "
            f"search.time_limit_s of {settings.time_limit_s:g} s; raise it to have one"
        )
        return None
