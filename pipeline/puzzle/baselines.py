"""Children that other methods would choose under the same limits, over the same tables. Pure: no weights, no files.

    greedy              layer by layer under equal shares of every budget (Puzzle, appendix F.2.2)
    max_parameters      the largest child within the limits, whatever its scores
    random              random scores in the programme: a library child with nothing known about quality
    drop_by_influence   whole layers left out, least influence on the hidden states first
    drop_by_score       whole layers left out, those first without which the model stays closest (depth.py)
    drop_last           whole layers left out from the end, the very last kept
    uniform             one narrower FFN and one number of key/value heads for all layers: the largest that fits

`drop_*` and `uniform` need no library; the others choose from it.
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from pipeline.architecture import Architecture, BlockSpec
from pipeline.costs import block_parameters
from pipeline.errors import StageError
from pipeline.puzzle.mip import Candidate, Problem, solve, violated_limits
from pipeline.puzzle.predictions import CostModel, linear_limits
from pipeline.puzzle.search_space import SearchSpace, dropped
from pipeline.recipe import Requirements, SearchConfig

# The search's own child in the tables of children, and the same blocks with the weights that surgery cuts.
PUZZLE, WITHOUT_BLD = "puzzle", "puzzle without block distillation"

Blocks = Sequence[BlockSpec]
FeasibleBlocks = Callable[[Blocks], bool]


def choices_from_library(
    problem: Problem,
    parent: Architecture,
    *,
    num_random: int,
    settings: SearchConfig,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Blocks]:
    """Return what other rules choose of the programme's own candidates.

    Greedy is missing where it breaks a limit, and so is a rule to which the solver has no answer, of which `note` is
    told.

    Raises:
        InfeasibleError: as the programme.
    """
    by_greed = greedy(problem)
    found: dict[str, Blocks] = {} if by_greed is None else {"greedy": tuple(one.block for one in by_greed)}
    rules: dict[str, Callable[[], Blocks]] = {
        "max_parameters": lambda: max_parameters(problem, parent, settings=settings),
        **{
            f"random {seed}": partial(random_choice, problem, seed=seed, settings=settings)
            for seed in range(num_random)
        },
    }
    for name, choose in rules.items():
        try:
            found[name] = choose()
        except StageError as err:
            note(f"{name} is left out: {err}")
    return found


def choices_from_parent(
    space: SearchSpace,
    costs: CostModel,
    requirements: Requirements,
    *,
    influence: Sequence[float],
    depth_order: Sequence[int],
    speed_margin: float,
    may_drop: Callable[[int], bool] = lambda _: True,
) -> dict[str, Blocks | None]:
    """Return what methods choose that need no library; None for one that cannot meet the limits.

    Pins are not obeyed: these methods know no single blocks.

    Args:
        space: what `uniform` chooses from; whole layers may go whether it says so or not.
        costs: what blocks cost.
        requirements: the target's.
        influence: each layer's on the hidden states.
        depth_order: the layers by scores of leaving them out, the first to go first; measured as if all may go.
        speed_margin: as the search asks for.
        may_drop: which layers may be left out; any, unless told otherwise.
    """
    options = [block for layer in space.layers for block in layer.blocks]
    limits = linear_limits(
        requirements.limits,
        costs=costs,
        blocks=[*options, dropped(0), *costs.parent.blocks],
        speed_margin=speed_margin,
    )

    def is_feasible(blocks: Blocks) -> bool:
        return not violated_limits(blocks, limits)

    return {
        **{
            method: drop_layers(costs.parent, list(filter(may_drop, order)), is_feasible=is_feasible)
            for method, order in (
                ("drop_by_influence", influence_order(influence)),
                ("drop_by_score", depth_order),
                ("drop_last", last_order(len(space.layers))),
            )
        },
        "uniform": uniform(costs.parent, [layer.blocks for layer in space.layers], is_feasible=is_feasible),
    }


def greedy(problem: Problem) -> tuple[Candidate, ...] | None:
    """Choose layer by layer under an equal share of every budget (Puzzle, appendix F.2.2); None when a limit is missed.

    Layers go in ascending order of their candidates' mean score; each takes the lowest score that fits its share, and
    what it leaves goes to the next. A layer in which nothing fits takes its cheapest candidate and leaves a debt.
    Where layers must share something, it chooses for each thing that they may share, and the lowest sum is taken.
    """
    found = [choice for one in problem.alternatives if (choice := _greedy(one)) is not None]
    return min(found, key=lambda choice: math.fsum(candidate.score for candidate in choice), default=None)


def _greedy(problem: Problem) -> tuple[Candidate, ...] | None:
    num_layers = len(problem.layers)
    # A peak is shared by all layers: the widest candidate's is set aside, and the sum is left to spend.
    share = [
        (limit.upper - limit.fixed - max(({} if limit.peak is None else limit.peak).values(), default=0.0)) / num_layers
        for limit in problem.limits
    ]
    saved = [0.0] * len(problem.limits)
    chosen: list[Candidate | None] = [None] * num_layers
    for layer in sorted(range(num_layers), key=lambda index: _mean_score(problem.layers[index])):
        budget = [one + left for one, left in zip(share, saved, strict=True)]

        def overrun(candidate: Candidate, budget: list[float] = budget) -> float:
            return sum(
                max(0.0, limit.cost[candidate.block.key] - available) / limit.upper
                for limit, available in zip(problem.limits, budget, strict=True)
            )

        pick = min(problem.layers[layer], key=lambda candidate: (overrun(candidate), candidate.score))
        chosen[layer] = pick
        saved = [
            available - limit.cost[pick.block.key] for limit, available in zip(problem.limits, budget, strict=True)
        ]
    complete = tuple(candidate for candidate in chosen if candidate is not None)
    return None if violated_limits([one.block for one in complete], problem.limits) else complete


def max_parameters(problem: Problem, parent: Architecture, *, settings: SearchConfig) -> tuple[BlockSpec, ...]:
    """Return the child with the most parameters within the limits.

    Raises:
        InfeasibleError, StageError: as the programme.
    """
    total = sum(block_parameters(parent, block) for block in parent.blocks)
    return _solve_with(problem, lambda block: -block_parameters(parent, block) / total, settings=settings)


def random_choice(problem: Problem, *, seed: int, settings: SearchConfig) -> tuple[BlockSpec, ...]:
    """Return the best child by scores drawn at random: within the limits and near them, as a real answer is.

    Raises:
        InfeasibleError, StageError: as the programme.
    """
    rng = random.Random(seed)
    return _solve_with(problem, lambda _: rng.random(), settings=settings)


def drop_layers(
    parent: Architecture, order: Sequence[int], *, is_feasible: FeasibleBlocks
) -> tuple[BlockSpec, ...] | None:
    """Leave out whole layers in this order until the limits are met; None when even all of them are not enough."""
    blocks = list(parent.blocks)
    for layer in order:
        if is_feasible(blocks):
            return tuple(blocks)
        blocks[layer] = dropped(layer)
    return tuple(blocks) if is_feasible(blocks) else None


def influence_order(influence: Sequence[float]) -> list[int]:
    """Return the layers from the least to the most influential; among equals the later goes first."""
    return sorted(range(len(influence)), key=lambda layer: (influence[layer], -layer))


def last_order(num_layers: int) -> list[int]:
    """Return the layers from the last but one to the first, then the last, whose output the head reads."""
    return [*range(num_layers - 2, -1, -1), num_layers - 1]


def uniform(
    parent: Architecture, layers: Sequence[Sequence[BlockSpec]], *, is_feasible: FeasibleBlocks
) -> tuple[BlockSpec, ...] | None:
    """Return the largest child whose layers are all alike and real; None when none meets the limits.

    A layer that may not become the common block keeps the parent's.
    """
    parent_block = parent.homogeneous_block()
    distinct = {block.key: block for options in layers for block in options}
    attention = {block.attention.key: block.attention for block in distinct.values() if block.attention.kind == "gqa"}
    ffn = {block.ffn.key: block.ffn for block in distinct.values() if block.ffn.kind == "swiglu"}
    found = []
    for one, other in itertools.product(attention.values(), ffn.values()):
        alike = BlockSpec(attention=one, ffn=other, parent_layers=(0,))
        blocks = tuple(
            (alike if alike.key in {option.key for option in options} else parent_block).model_copy(
                update={"parent_layers": (layer,)}
            )
            for layer, options in enumerate(layers)
        )
        if is_feasible(blocks):
            found.append(blocks)
    return max(found, key=lambda blocks: sum(block_parameters(parent, block) for block in blocks), default=None)


def _solve_with(
    problem: Problem, score: Callable[[BlockSpec], float], *, settings: SearchConfig
) -> tuple[BlockSpec, ...]:
    layers = tuple(
        tuple(replace(candidate, score=score(candidate.block)) for candidate in candidates)
        for candidates in problem.layers
    )
    answer = solve(
        replace(problem, layers=layers),
        time_limit_s=settings.time_limit_s,
        relative_gap=settings.relative_gap,
    )
    return answer.blocks


def _mean_score(candidates: Sequence[Candidate]) -> float:
    return statistics.fmean(candidate.score for candidate in candidates)
