"""refined_solution: the programme's answers and other methods' as whole models; the best of them improved."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from pipeline.architecture import BlockSpec
from pipeline.artifacts import ArtifactStore
from pipeline.fingerprint import fingerprint
from pipeline.model.checkpoint import TORCH_DTYPES, load_model, read_architecture
from pipeline.puzzle.baselines import Blocks, choices_from_library, choices_from_parent
from pipeline.puzzle.batches import settle
from pipeline.puzzle.depth import read_depth_order
from pipeline.puzzle.devices import Ranks, num_threads, place
from pipeline.puzzle.divergence import Divergence
from pipeline.puzzle.half_scores import measured_around, with_sums
from pipeline.puzzle.importance import block_influence
from pipeline.puzzle.initial import library_variants
from pipeline.puzzle.library import read_index
from pipeline.puzzle.mip import Problem
from pipeline.puzzle.refinement import POOL, ROUND, Refinement, ScoredSolution, refine
from pipeline.puzzle.score_table import read_scores, score_table, write_scores
from pipeline.puzzle.scoring import score_blocks
from pipeline.puzzle.search import read_costs, read_pool, write_solution
from pipeline.puzzle.search_space import dropped, resolve
from pipeline.puzzle.whole_models import score_models
from pipeline.report.drawings import save_figures
from pipeline.report.figures import architecture_strip
from pipeline.stage import WORK_DIR, Number, StageInputs, StageResult, Table
from pipeline.stages.configs import RefinedStage
from pipeline.stages.mip_solution import layer_table, limit_table
from pipeline.stages.score_inputs import SearchWindows, load_validation, score_functions


def run(config: RefinedStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Write solution.json, the best child found, and scores.parquet, the measures around the last round's centre."""
    architecture = read_architecture(inputs["parent_checkpoint"])
    space = resolve(config.search_space, architecture)
    dtype, device = TORCH_DTYPES[config.precision], Ranks().device
    parent = place(load_model(inputs["parent_checkpoint"], dtype=dtype), device)
    index = read_index(inputs["block_library"])
    load_variants = library_variants(
        architecture,
        index=index,
        store=ArtifactStore(inputs.store_root),
        dtype=dtype,
        device=device,
    )
    windows = SearchWindows.of(load_validation(inputs), config.search.refinement)
    # The task's items are the same in every round.
    num_parts = 1 if config.search.objective == "task_error" else len(windows.rounds)
    max_bytes = inputs.execution.max_activation_bytes

    def score_whole_models(children: Mapping[str, Sequence[BlockSpec]]) -> dict[str, Divergence]:
        return score_models(
            parent,
            children,
            load_variants,
            score_functions(inputs, windows.compared, task=config.task),
            work_dir=out_dir / WORK_DIR / "whole-models",
            max_activation_bytes=max_bytes,
            reporter=inputs.reporter,
        )

    def score_around(blocks: Sequence[BlockSpec], round_number: int) -> pl.DataFrame:
        # Named after what stands around: a run that was killed may find another centre in the same round.
        centre = fingerprint([block.key for block in blocks])
        work_dir = out_dir / WORK_DIR / f"round-{round_number}-{centre}"
        # What was trained as a pair is no sum of halves.
        measured = space if index.has_pairs else measured_around(space, blocks)
        scores = score_blocks(
            parent,
            measured,
            load_variants,
            score_functions(inputs, windows.rounds[(round_number - 1) % num_parts], task=config.task),
            work_dir=work_dir,
            max_activation_bytes=max_bytes,
            reporter=inputs.reporter,
            base=blocks,
        )
        return with_sums(score_table(scores, measured), space, blocks)

    pool = read_pool(inputs["mip_solution"]).solutions
    requirements, costs = settle(
        config.requirements,
        read_costs(inputs["block_profile"], profile=config.profile),
        [one.limit for one in pool[0].limits],
    )

    def other_methods(problem: Problem) -> dict[str, Blocks | None]:
        influence = block_influence(
            parent, windows.compared, work_dir=out_dir / WORK_DIR / "influence", max_activation_bytes=max_bytes
        )
        return {
            **choices_from_parent(
                space,
                costs,
                requirements,
                influence=influence,
                depth_order=read_depth_order(inputs["block_scores"]),
                speed_margin=config.search.speed_margin,
                may_drop=lambda layer: dropped(layer).key in {one.block.key for one in problem.layers[layer]},
            ),
            **choices_from_library(
                problem, architecture, num_random=0, settings=config.search, note=inputs.reporter.note
            ),
        }

    with num_threads(inputs.execution.num_threads):
        refinement = refine(
            pool,
            read_scores(inputs["block_scores"]),
            others=other_methods,
            score_whole_models=score_whole_models,
            score_around=score_around,
            num_parts=num_parts,
            costs=costs,
            requirements=requirements,
            settings=config.search,
            reporter=inputs.reporter,
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    record = refinement.best.record
    write_solution(out_dir, record)
    write_scores(out_dir, refinement.scores)
    strip = architecture_strip(costs.parent, record.architecture)
    return StageResult(
        metrics=_metrics(refinement, config),
        facts={"chosen": refinement.best.origin},
        figures=save_figures({"architecture": strip}, out_dir=out_dir),
        tables={
            "whole_models": _whole_models(refinement, config, architecture.homogeneous_block()),
            "layers": layer_table(record),
            "limits": limit_table(record),
        },
    )


def _metrics(refinement: Refinement, config: RefinedStage) -> dict[str, Number]:
    objective = config.search.objective
    first, best = refinement.scored[0], refinement.best
    return {
        f"{objective}_of_the_first_answer": first.value(objective),
        f"{objective}_of_the_chosen": best.value(objective),
        "top1_error_of_the_chosen": best.divergence.top1_error,
        "chosen_over_first": best.value(objective) / first.value(objective) if first.value(objective) else 1.0,
        **_composition(refinement, config),
        "num_whole_models": len(refinement.scored),
        "num_parameters": int(best.record.predicted["num_parameters"]),
        "num_attention_free_layers": int(best.record.predicted["num_attention_free_layers"]),
        "num_violated_limits": sum(not limit.is_met for limit in best.record.limits),
        "num_tokens": best.divergence.num_tokens,
    }


def _composition(refinement: Refinement, config: RefinedStage) -> dict[str, Number]:
    """Return what a sum predicts over what whole models measure: sums around the parent, and around a child."""
    ratios: dict[str, list[float]] = {"sum_of_scores": [], "sum_around_a_child": []}
    for one in refinement.scored:
        ratio = _sum_over_whole(one, config)
        for origin, name in ((POOL, "sum_of_scores"), (ROUND, "sum_around_a_child")):
            if ratio is not None and one.origin.startswith(origin):
                ratios[name].append(ratio)
    return {f"{name}_over_whole": statistics.median(found) for name, found in ratios.items() if found}


def _sum_over_whole(one: ScoredSolution, config: RefinedStage) -> float | None:
    whole = one.value(config.search.objective)
    return one.record.objective / whole if whole else None


def _whole_models(refinement: Refinement, config: RefinedStage, parent: BlockSpec) -> Table:
    return Table.of(
        (
            "origin",
            "num_changed_layers",
            "predicted_by_sum",
            "sum_over_whole",
            "kl",
            "lm_loss",
            "hidden_cosine",
            "top1_error",
            "num_parameters",
        ),
        [
            (
                one.origin,
                sum(block.key != parent.key for block in one.record.blocks),
                round(one.record.objective, 5),
                None if (ratio := _sum_over_whole(one, config)) is None else round(ratio, 4),
                round(one.divergence.kl, 5),
                round(one.divergence.lm_loss, 5),
                round(one.divergence.hidden_cosine, 5),
                round(one.divergence.top1_error, 5),
                int(one.record.predicted["num_parameters"]),
            )
            for one in refinement.scored
        ],
    )
