"""From the tables of scores and times to a solution: builds the programme, solves it, and records what it promises."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl
from pydantic import Field

from pipeline.architecture import Architecture, BlockSpec, Frozen
from pipeline.artifacts import write_atomically
from pipeline.errors import ArtifactError, RecipeError
from pipeline.puzzle.batches import BatchAnswer, best_batch, settle, solve_batches, swept_scenarios
from pipeline.puzzle.calibration import Calibration
from pipeline.puzzle.limits import LinearLimit
from pipeline.puzzle.mip import Candidate, Problem, Solution, solve_pool, violated_limits
from pipeline.puzzle.patterns import is_kept_or_dropped
from pipeline.puzzle.predictions import CostModel, linear_limits, predict
from pipeline.puzzle.search_space import attention_from_key, ffn_from_key, pinned
from pipeline.puzzle.tables import PROFILE, read_table
from pipeline.recipe import (
    Limit,
    Objective,
    PoolConfig,
    ProfileConfig,
    Requirements,
    Scenario,
    SearchConfig,
)

CALIBRATION_FILE = "calibration.json"
ARCHITECTURE_FILE = "architecture.json"
SOLUTION_FILE = "solution.json"
POOL_FILE = "pool.json"


class LimitRecord(Frozen):
    """One limit and what the chosen blocks are predicted to reach, in the unit of its bound."""

    limit: Limit
    name: str
    predicted: float
    is_met: bool


class SolutionRecord(Frozen):
    """A solved programme: one block per layer and everything it promises."""

    target_name: str
    status: Literal["optimal", "feasible"]
    gap: float
    objective_name: Objective
    objective: float
    architecture: Architecture
    layer_scores: tuple[float, ...]
    predicted: dict[str, float]
    limits: tuple[LimitRecord, ...]

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The chosen block of every layer."""
        return self.architecture.blocks


class SolutionPool(Frozen):
    """The different answers to one programme, the best first."""

    solutions: tuple[SolutionRecord, ...] = Field(min_length=1)


def read_costs(profile_dir: Path, *, profile: ProfileConfig) -> CostModel:
    """Read a block_profile artifact.

    Raises:
        ArtifactError: when it was measured for other scenarios.
    """
    table = read_table(profile_dir, PROFILE)
    measured = set(table["scenario"].unique())
    wanted = {scenario.name for scenario in profile.scenarios}
    if measured != wanted:
        raise ArtifactError(f"{profile_dir} was measured for {sorted(measured)}, wanted {sorted(wanted)}")
    return CostModel(
        parent=Architecture.model_validate_json((profile_dir / ARCHITECTURE_FILE).read_bytes()),
        profile=profile,
        time_ms={
            (row["scenario"], row["phase"], row["part"], row["variant"]): row["time_ms"]
            for row in table.iter_rows(named=True)
        },
        calibration=Calibration.model_validate_json((profile_dir / CALIBRATION_FILE).read_bytes()),
    )


def recalibrated(costs: CostModel, calibration: Calibration) -> CostModel:
    """Return the same times under another calibration."""
    return replace(costs, calibration=calibration)


def search(
    scores: pl.DataFrame,
    *,
    costs: CostModel,
    target_name: str,
    requirements: Requirements,
    settings: SearchConfig,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[SolutionRecord, ...]:
    """Solve the programme of one target; return its pool of answers, the best first.

    `note` is told where the time limit keeps the pool from being full.

    Raises:
        InfeasibleError: when no choice of blocks meets its limits.
        RecipeError: when a pin asks for a block that was never scored.
    """
    problem = build_problem(scores, costs=costs, requirements=requirements, settings=settings)
    solutions = solve_pool(
        problem, settings.pool, time_limit_s=settings.time_limit_s, relative_gap=settings.relative_gap, note=note
    )
    return tuple(
        record_solution(
            solution,
            problem=problem,
            base_value=base_value(scores, settings.objective),
            costs=costs,
            target_name=target_name,
            settings=settings,
        )
        for solution in solutions
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSearch:
    """The pool of the batch that was chosen, and what was found at each; no batches where the target sweeps none."""

    records: tuple[SolutionRecord, ...]
    batches: tuple[BatchAnswer[SolutionRecord], ...]
    chosen: Scenario | None


def search_batches(
    scores: pl.DataFrame,
    *,
    costs: CostModel,
    target_name: str,
    requirements: Requirements,
    settings: SearchConfig,
    note: Callable[[str], None] = lambda _: None,
) -> BatchSearch:
    """Solve one programme for each batch size of the target's scenario, and the best of them for its pool of answers.

    `note` is told as by search.

    Raises:
        InfeasibleError: when no choice of blocks meets the limits at any batch.
        RecipeError: as search.
    """

    def solve_for(wanted: Requirements, settings: SearchConfig) -> tuple[SolutionRecord, ...]:
        _, settled = settle(requirements, costs, wanted.limits)
        return search(scores, costs=settled, target_name=target_name, requirements=wanted, settings=settings, note=note)

    scenarios = swept_scenarios(requirements.limits, costs.profile)
    if not scenarios:
        return BatchSearch(records=solve_for(requirements, settings), batches=(), chosen=None)
    one_answer = settings.model_copy(update={"pool": PoolConfig(num_solutions=1, max_overlap=0.0)})
    found = solve_batches(
        requirements,
        scenarios,
        solve=lambda wanted: solve_for(wanted, one_answer)[0],
        objective=lambda record: record.objective,
        tokens_per_s=lambda record, scenario: record.predicted[f"{scenario.name}_throughput"],
    )
    best = best_batch(found, settings.batch_choice)
    return BatchSearch(records=solve_for(best.requirements, settings), batches=found, chosen=best.scenario)


def record_solution(
    solution: Solution,
    *,
    problem: Problem,
    base_value: float,
    costs: CostModel,
    target_name: str,
    settings: SearchConfig,
) -> SolutionRecord:
    """Return a solution with everything it promises; `base_value` is what its summed scores are added to."""
    broken = violated_limits(solution.blocks, problem.limits)
    return SolutionRecord(
        target_name=target_name,
        status=solution.status,
        gap=solution.gap,
        objective_name=settings.objective,
        objective=base_value + solution.objective,
        architecture=costs.parent.with_blocks(solution.blocks),
        layer_scores=tuple(candidate.score for candidate in solution.chosen),
        predicted=predict(solution.blocks, costs=costs),
        limits=tuple(_limit_record(limit, solution.blocks, is_met=limit not in broken) for limit in problem.limits),
    )


def build_problem(
    scores: pl.DataFrame, *, costs: CostModel, requirements: Requirements, settings: SearchConfig
) -> Problem:
    """Return the candidates that the pins and `settings.layers` leave, with their scores, and the target's limits.

    A score is what the block adds to the measure of the model that was scored, so that this model's own blocks score 0.

    Raises:
        RecipeError: when the pins leave a layer none of its scored blocks, or `settings.layers` leaves no child.
    """
    parent = costs.parent.homogeneous_block()
    base = base_value(scores, settings.objective)
    layers: list[list[Candidate]] = [[] for _ in costs.parent.blocks]
    for row in scores.iter_rows(named=True):
        layers[row["layer"]].append(Candidate(block=block_of(row), score=row[settings.objective] - base))
    layers = pinned(layers, requirements.pins, parent=parent, block_of=lambda one: one.block, are="scored ")
    if settings.layers == "depth_only":
        layers = _kept_or_dropped(layers, parent=parent)
    blocks = [candidate.block for candidates in layers for candidate in candidates]
    problem = Problem(
        layers=tuple(tuple(candidates) for candidates in layers),
        limits=linear_limits(requirements.limits, costs=costs, blocks=blocks, speed_margin=settings.speed_margin),
        pattern=settings.layers,
    )
    if not problem.alternatives:
        raise RecipeError(
            f"search.layers is {settings.layers}, but what search_space, its overrides and the target's pins leave has "
            "nothing of that kind in common over all layers: take the overrides or pins out, or set search.layers: "
            "heterogeneous"
        )
    return problem


def block_of(row: Mapping[str, Any]) -> BlockSpec:
    """Return the block that a row of a score table is of."""
    return BlockSpec(
        attention=attention_from_key(row["attention"]),
        ffn=ffn_from_key(row["ffn"]),
        parent_layers=(row["layer"],),
    )


def base_value(scores: pl.DataFrame, objective: Objective) -> float:
    """Return the measure of the model that was scored, before any block of it is replaced.

    Raises:
        ArtifactError: when the table has no row of its own blocks, and the measure is not 0 by definition.
    """
    rows = scores.filter("is_base")
    if not rows.is_empty():
        return float(rows[objective][0])
    if objective in ("lm_loss", "task_error"):
        raise ArtifactError(
            f"the score table has no row of the parent's own block, so {objective} has nothing to be compared with: "
            "allow 'parent' in some layer of search_space, or minimise kl"
        )
    return 0.0  # no layer may stay as it is: scored around the parent, which is no distance from itself


def write_solution(directory: Path, record: SolutionRecord) -> None:
    """Write solution.json."""
    write_atomically(directory / SOLUTION_FILE, (record.model_dump_json(indent=1) + "\n").encode())


def read_solution(directory: Path) -> SolutionRecord:
    """Read solution.json of a mip_solution, refined_solution or child_checkpoint artifact."""
    return SolutionRecord.model_validate_json((directory / SOLUTION_FILE).read_bytes())


def write_pool(directory: Path, pool: SolutionPool) -> None:
    """Write pool.json."""
    write_atomically(directory / POOL_FILE, (pool.model_dump_json(indent=1) + "\n").encode())


def read_pool(directory: Path) -> SolutionPool:
    """Read pool.json of a mip_solution artifact."""
    return SolutionPool.model_validate_json((directory / POOL_FILE).read_bytes())


def _kept_or_dropped(layers: Sequence[Sequence[Candidate]], *, parent: BlockSpec) -> list[list[Candidate]]:
    """Return, layer by layer, the parent's own block and the empty one, as far as they were scored."""
    found = [[one for one in candidates if is_kept_or_dropped(one.block, parent=parent)] for candidates in layers]
    for layer, candidates in enumerate(found):
        if not candidates:
            raise RecipeError(
                f"search.layers is depth_only, but layer {layer} may be neither the parent's nor left out: it has "
                f"{[one.block.key for one in layers[layer]]}; change search_space.overrides or the target's pins there"
            )
    return found


def _limit_record(limit: LinearLimit, blocks: Sequence[BlockSpec], *, is_met: bool) -> LimitRecord:
    return LimitRecord(limit=limit.limit, name=limit.name, predicted=limit.reached(blocks), is_met=is_met)
