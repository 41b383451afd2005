"""baselines: what simpler methods choose under the target's own limits, scored as whole models and measured.

All are scored on validation windows by which nothing was chosen: the search began at some of these children, too, and
took the best of all on others (pipeline.stages.score_inputs).
Each child is compared before any distillation, beside the refined solution and its twin without block distillation.
Where a target pins blocks, only methods that choose single blocks are compared.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import torch

from pipeline.architecture import Architecture
from pipeline.artifacts import ArtifactStore, write_atomically
from pipeline.costs import num_parameters
from pipeline.model.checkpoint import TORCH_DTYPES, TensorReader, load_model, read_architecture
from pipeline.model.heterogeneous import build_model
from pipeline.puzzle.backends import measure_as_profiled
from pipeline.puzzle.baselines import (
    PUZZLE,
    WITHOUT_BLD,
    Blocks,
    choices_from_library,
    choices_from_parent,
)
from pipeline.puzzle.batches import settle
from pipeline.puzzle.depth import read_depth_order
from pipeline.puzzle.devices import Ranks, num_threads, place
from pipeline.puzzle.divergence import Divergence
from pipeline.puzzle.importance import block_influence, load_importance
from pipeline.puzzle.initial import library_variants, untrained_variants
from pipeline.puzzle.library import read_index
from pipeline.puzzle.measure import Interval
from pipeline.puzzle.predictions import CostModel, compared_phase
from pipeline.puzzle.score_table import read_scores
from pipeline.puzzle.search import build_problem, read_costs, read_solution
from pipeline.puzzle.search_space import resolve
from pipeline.puzzle.tables import CHILDREN, SCHEMAS, write_table
from pipeline.puzzle.verification import CHILD, PARENT
from pipeline.puzzle.whole_models import score_models
from pipeline.stage import WORK_DIR, StageInputs, StageResult, Table
from pipeline.stages.configs import BaselinesStage
from pipeline.stages.score_inputs import SearchWindows, load_validation, score_functions

ARCHITECTURES = "architectures.json"


def run(config: BaselinesStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write children.parquet, one row per child, and architectures.json, their blocks by method."""
    architecture = read_architecture(inputs["parent_checkpoint"])
    space = resolve(config.search_space, architecture)
    dtype, device = TORCH_DTYPES[config.precision], Ranks().device
    parent = place(load_model(inputs["parent_checkpoint"], dtype=dtype), device)
    windows = SearchWindows.of(load_validation(inputs), config.search.refinement)
    functions = score_functions(inputs, windows.unseen, task=config.task)
    solution = read_solution(inputs["refined_solution"])
    requirements, costs = settle(
        config.requirements,
        read_costs(inputs["block_profile"], profile=config.profile),
        [one.limit for one in solution.limits],
    )
    config = config.model_copy(update={"requirements": requirements, "profile": costs.profile})
    chosen = solution.blocks
    library = library_variants(
        architecture,
        index=read_index(inputs["block_library"]),
        store=ArtifactStore(inputs.store_root),
        dtype=dtype,
        device=device,
    )
    untrained = untrained_variants(
        space,
        architecture,
        parent_tensors=TensorReader(inputs["parent_checkpoint"]),
        importance=load_importance(inputs["channel_importance"]),
        dtype=dtype,
        device=device,
    )
    with num_threads(inputs.execution.num_threads):
        problem = build_problem(
            read_scores(inputs["block_scores"]),
            costs=costs,
            requirements=config.requirements,
            settings=config.search,
        )
        from_library = {
            PUZZLE: chosen,
            **choices_from_library(
                problem,
                architecture,
                num_random=config.baselines.num_random,
                settings=config.search,
                note=inputs.reporter.note,
            ),
        }
        # Pins would have to be obeyed by all: these know no single blocks.
        from_parent = (
            {}
            if config.requirements.pins
            else choices_from_parent(
                space,
                costs,
                config.requirements,
                influence=block_influence(
                    parent,
                    windows.compared,
                    work_dir=out_dir / WORK_DIR / "influence",
                    max_activation_bytes=inputs.execution.max_activation_bytes,
                ),
                depth_order=read_depth_order(inputs["block_scores"]),
                speed_margin=config.search.speed_margin,
            )
        )
        cut = {WITHOUT_BLD: chosen, **{name: one for name, one in from_parent.items() if one is not None}}
        scored = {
            weights: score_models(
                parent,
                group,
                variants,
                functions,
                work_dir=out_dir / WORK_DIR / weights,
                max_activation_bytes=inputs.execution.max_activation_bytes,
                reporter=inputs.reporter,
            )
            for weights, group, variants in (("library", from_library, library), ("surgery", cut, untrained))
        }
    children: dict[str, Blocks] = {**from_library, **cut}
    del parent
    speeds = _measure(architecture, children, config, inputs, device=device, work_dir=out_dir / WORK_DIR)
    out_dir.mkdir(parents=True, exist_ok=True)
    table = _table(scored, children, speeds, costs=costs, config=config)
    write_table(out_dir, CHILDREN, table)
    named = {name: architecture.with_blocks(blocks).to_json() for name, blocks in children.items()}
    write_atomically(out_dir / ARCHITECTURES, (json.dumps(named, indent=1) + "\n").encode())
    ordered = table.sort("kl")
    kl = dict(zip(table["method"], table["kl"], strict=True))
    others = {name: value for name, value in kl.items() if name not in (PUZZLE, WITHOUT_BLD)}
    best = min(others, key=lambda name: others[name], default=None)
    missing = [name for name, blocks in from_parent.items() if blocks is None]
    missing += [] if "greedy" in from_library else ["greedy"]
    wanted = ["max_parameters", *(f"random {seed}" for seed in range(config.baselines.num_random))]
    without_answer = [name for name in wanted if name not in from_library]
    return StageResult(
        metrics={
            "num_children": len(table),
            "num_non_finite_scores": int((~table["kl"].is_finite()).sum()),
            "puzzle_kl": kl[PUZZLE],
            "kl_without_block_distillation": kl[WITHOUT_BLD],
            **({"best_baseline_kl": kl[best], "kl_over_best_baseline": kl[PUZZLE] / kl[best]} if best else {}),
        },
        facts={
            "best baseline": best or "none meets the limits",
            **(
                {"left out": "drop_by_influence, drop_by_score, drop_last, uniform: the target pins blocks"}
                if not from_parent
                else {}
            ),
            **({"do not meet the limits": ", ".join(missing)} if missing else {}),
            **({"the solver had no answer for": ", ".join(without_answer)} if without_answer else {}),
        },
        tables={
            "children": Table.of(
                (*ordered.columns,), [tuple(_shown(value) for value in row) for row in ordered.iter_rows()]
            )
        },
    )


def _measure(
    architecture: Architecture,
    children: Mapping[str, Blocks],
    config: BaselinesStage,
    inputs: StageInputs,
    *,
    device: torch.device,
    work_dir: Path,
) -> dict[str, Interval]:
    """Return every child's measured speed-up; time does not depend on the values of weights, so they are random."""
    scenario, phase = compared_phase(config.requirements.limits, profile=config.profile)
    dtype = TORCH_DTYPES[config.profile.precision]
    timed = place(build_model(architecture, dtype=dtype, seed=1), device)
    found: dict[tuple[str, ...], Interval] = {}
    speeds: dict[str, Interval] = {}
    for name, blocks in children.items():
        key = tuple(block.key for block in blocks)
        if key not in found:
            inputs.reporter.note(f"measuring {name}")
            child = place(build_model(architecture.with_blocks(blocks), dtype=dtype, seed=0), device)
            found[key] = measure_as_profiled(
                {PARENT: timed, CHILD: child},
                profile=config.profile,
                scenarios=[one for one in config.profile.scenarios if one.name == scenario],
                measurement=config.baselines.measurement,
                work_dir=work_dir,
                reporter=inputs.reporter,
            ).speedup(CHILD, scenario, phase, over=PARENT)
        speeds[name] = found[key]
    return speeds


def _table(
    scored: Mapping[str, Mapping[str, Divergence]],
    children: Mapping[str, Blocks],
    speeds: Mapping[str, Interval],
    *,
    costs: CostModel,
    config: BaselinesStage,
) -> pl.DataFrame:
    scenario, phase = compared_phase(config.requirements.limits, profile=config.profile)
    parent_ms = costs.calibration.get(scenario, phase).parent_ms
    rows = []
    for weights, found in scored.items():
        for method, one in found.items():
            blocks, speed = children[method], speeds[method]
            rows.append(
                (
                    method,
                    weights,
                    one.kl,
                    one.lm_loss,
                    one.hidden_cosine,
                    one.top1_error,
                    one.num_tokens,
                    num_parameters(costs.parent.with_blocks(blocks)),
                    scenario,
                    phase,
                    parent_ms / costs.predicted_ms(blocks, scenario, phase),
                    speed.median,
                    speed.low,
                    speed.high,
                )
            )
    return pl.DataFrame(rows, schema=SCHEMAS[CHILDREN], orient="row")


def _shown(value: object) -> str | int | float | bool | None:
    if isinstance(value, float):
        return round(value, 5)
    assert isinstance(value, str | int)
    return value
