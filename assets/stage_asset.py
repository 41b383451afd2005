"""How a stage of the registry becomes a Dagster asset, and its outcome a MaterializeResult.

Dagster resolves the annotations of an asset's function at run time, so this package never postpones them.
"""

from collections.abc import Callable, Set
from typing import Any

import dagster as dg

from assets.highlights import HIGHLIGHTS, NOTHING_FIRST
from assets.metadata import metric_metadata, outcome_metadata
from pipeline.execution import Outcome
from pipeline.fingerprint import fingerprint
from pipeline.recipe import Recipe
from pipeline.stages.checks import Check
from pipeline.stages.registry import Stage, get_stage

GPU_POOL = "gpu"


def stage_asset(name: str, *, recipe: Recipe, kinds: Set[str]) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """Return the decorator that makes a function the asset of a stage; everything but `kinds` is the registry's."""
    stage = get_stage(name)
    return dg.asset(
        name=stage.name,
        deps=list(stage.upstream),
        description=describe(stage),
        group_name=stage.group,
        kinds=set(kinds),
        code_version=code_version(stage, recipe=recipe),
        partitions_def=target_partitions(recipe) if stage.per_target else None,
        check_specs=[
            dg.AssetCheckSpec(name=check.name, asset=stage.name, description=check.description, blocking=check.blocking)
            for check in stage.checks
        ],
        # A stage with a process of its own computes on the accelerator; a server limits this pool, a laptop does not.
        pool=GPU_POOL if stage.in_child else None,
    )


def describe(stage: Stage) -> str:
    """Return what the UI says of a stage, as Markdown: what it is, what it reads, what to look at."""
    paragraphs = [
        stage.description,
        f"**Reads** {', '.join(f'`{name}`' for name in stage.upstream)}."
        if stage.upstream
        else "**Reads** the recipe alone.",
        f"**Look at** {HIGHLIGHTS.get(stage.name, NOTHING_FIRST).look_at}",
    ]
    if stage.per_target:
        paragraphs.append("One partition per target of the recipe.")
    if stage.over_targets:
        paragraphs.append("Takes every target that is there; those that are not are named.")
    return "\n\n".join(paragraphs)


def target_partitions(recipe: Recipe) -> dg.StaticPartitionsDefinition:
    """Return the partitions of every per-target asset: the recipe's targets."""
    return dg.StaticPartitionsDefinition(sorted(recipe.targets))


def code_version(stage: Stage, *, recipe: Recipe) -> str:
    """Return the stage's version and a hash of the recipe slice it reads, so that an edited recipe shows as stale.

    The slices of all targets count once each: a stage that reads nothing of a target keeps its version when one is
    added.
    """
    targets = sorted(recipe.targets) if stage.per_target else [recipe.default_target]
    slices = sorted({fingerprint(stage.config(recipe, target)) for target in targets})
    return f"{stage.version}-{fingerprint(slices)[:12]}"


def describe_outcome(outcome: Outcome, *, recipe: Recipe) -> dg.MaterializeResult:
    """Return what Dagster records of a finished artifact: its content hash, metadata and check results."""
    stage = get_stage(outcome.artifact.manifest.asset)
    return dg.MaterializeResult(
        asset_key=stage.name,
        data_version=dg.DataVersion(outcome.artifact.content_hash),
        metadata=outcome_metadata(outcome),
        check_results=[_evaluate(check, outcome, recipe=recipe) for check in stage.checks],
    )


def _evaluate(check: Check, outcome: Outcome, *, recipe: Recipe) -> dg.AssetCheckResult:
    metrics = outcome.artifact.record.result.metrics
    severity = dg.AssetCheckSeverity.ERROR if check.blocking else dg.AssetCheckSeverity.WARN
    if not check.applies_to(metrics):
        return dg.AssetCheckResult(
            check_name=check.name,
            passed=True,
            severity=severity,
            description=f"does not apply: {check.unless} was measured in place of {check.metric}",
        )
    value = metrics.get(check.metric)
    bound = check.bound_for(recipe)
    measured = "not measured" if value is None else f"{value:.6g}"
    return dg.AssetCheckResult(
        check_name=check.name,
        passed=value is not None and check.passes(value, recipe=recipe),
        severity=severity,
        description=f"{check.metric} is {measured}; wanted {check.comparison} {bound:.6g}",
        metadata={
            "metric": check.metric,
            "value": measured if value is None else metric_metadata(value),
            "comparison": check.comparison,
            "bound": bound,
        },
    )
