"""A whole plan: every stage's estimate, its time on a device, what is there already, and what stands against it."""

import shutil
from dataclasses import dataclass

from pipeline.environment import missing_paths
from pipeline.execution import Workspace, find_artifact, require_searchable
from pipeline.hardware import idle_gpus
from pipeline.model.architecture_files import parent_architecture
from pipeline.planning import devices
from pipeline.planning.case import Case, Estimate
from pipeline.planning.devices import Device
from pipeline.planning.estimates import estimate, has_estimate
from pipeline.planning.ranges import ZERO, Range
from pipeline.planning.sizes import ModelSizes, model_sizes
from pipeline.planning.warnings import (
    data_warnings,
    disk_warnings,
    execution_warnings,
    memory_warnings,
    target_warnings,
)
from pipeline.prerequisites import missing_runtimes
from pipeline.recipe import Recipe
from pipeline.stage import ExecutionSettings
from pipeline.stages.registry import STAGES


@dataclass(frozen=True, kw_only=True, slots=True)
class Actual:
    """What a finished artifact took: seconds, as its last run counted them, and bytes on disk."""

    wall_s: float
    disk_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One stage: its estimate, its time when the device is known, and what it took when it has been made."""

    name: str
    estimate: Estimate
    time_s: Range | None
    actual: Actual | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Every stage of a target in order, and what stands against running them."""

    recipe_name: str
    target_name: str
    sizes: ModelSizes
    execution: ExecutionSettings
    device: Device | None
    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]

    @property
    def total_time_s(self) -> Range | None:
        """The time of all stages, one after the other."""
        total = ZERO
        for stage in self.stages:
            if stage.time_s is None:
                return None
            total = total + stage.time_s
        return total

    @property
    def total_disk(self) -> Range:
        """What all artifacts of the target take up together."""
        total = ZERO
        for stage in self.stages:
            total = total + stage.estimate.disk
        return total


def make_plan(workspace: Workspace, *, target_name: str, device: Device | None) -> Plan:
    """Return the plan of one target of the workspace's recipe. Reads configuration and manifests, and loads no weights.

    To tell which artifacts are there, local files that the recipe names are hashed if they changed since the last time.

    Raises:
        RecipeError, CheckpointError: see require_searchable.
    """
    recipe = workspace.recipe
    require_searchable(recipe)
    target = recipe.targets[target_name]
    case = Case(
        recipe=recipe,
        sizes=model_sizes(recipe, target, parent=parent_architecture(recipe.parent)),
        execution=workspace.execution,
    )
    estimates = {stage.name: estimate(stage.name, case) for stage in STAGES}
    stages = tuple(
        StagePlan(
            name=name,
            estimate=one,
            time_s=None if device is None else stage_time_s(one, device=device, execution=workspace.execution),
            actual=_actual(workspace, name, target_name),
        )
        for name, one in estimates.items()
    )
    finished = {stage.name for stage in stages if stage.actual is not None}
    root = workspace.store.root
    existing = next(path for path in (root, *root.parents) if path.exists())
    warnings = [
        *target_warnings(case, target),
        *execution_warnings(case),
        *(memory_warnings(estimates, device=device, case=case) if device is not None else []),
        *disk_warnings(estimates, finished=finished, free_bytes=shutil.disk_usage(existing).free, root=str(existing)),
        *data_warnings(case),
        *_path_warnings(recipe, target_name=target_name),
        *_runtime_warnings(workspace),
        *(f"device: {told}" for told in (idle_gpus(),) if told is not None),
        *(
            f"stage: {name} has no estimate and counts as nothing: add one to pipeline/planning/estimates.py"
            for name in estimates
            if not has_estimate(name)
        ),
    ]
    return Plan(
        recipe_name=recipe.name,
        target_name=target_name,
        sizes=case.sizes,
        execution=workspace.execution,
        device=device,
        stages=stages,
        warnings=tuple(warnings),
    )


def _path_warnings(recipe: Recipe, *, target_name: str) -> list[str]:
    """Return the paths of the recipe behind which its stages find nothing, each once.

    Of stages that are done, too: what they read is part of what their artifacts are found by.
    """
    found: dict[str, str] = {}
    for stage in STAGES:
        for told in missing_paths(stage.config(recipe, target_name)):
            found.setdefault(told, stage.name)
    return [
        f"data: {told} names no file that is there, and {name} reads it: correct it, or put the files there first"
        for told, name in found.items()
    ]


def _runtime_warnings(workspace: Workspace) -> list[str]:
    """Return the runtimes that a stage needs and that are not installed here, each with the first such stage."""
    found: dict[str, str] = {}
    for stage in STAGES:
        found = missing_runtimes(stage, recipe=workspace.recipe, execution=workspace.execution) | found
    return [f"runtime: {told}" for told in found.values()]


def stage_time_s(one: Estimate, *, device: Device, execution: ExecutionSettings) -> Range:
    """Return FLOPs over a share of the peak, plus bytes over a share of the bandwidth, plus what is neither.

    A stage that trains divides its FLOPs by the ranks; every other stage runs on one.
    """
    num_ranks = execution.num_ranks if one.on_all_ranks else 1
    total = one.extra_s
    for flops, share in one.work:
        total = total + flops.over(share.times(device.peak_flops_per_s * num_ranks))
    return total + one.read_bytes.over(devices.DECODING.times(device.bandwidth_bytes_per_s * num_ranks))


def _actual(workspace: Workspace, stage_name: str, target_name: str) -> Actual | None:
    artifact = find_artifact(workspace, stage_name, target_name)
    if artifact is None:
        return None
    return Actual(
        wall_s=artifact.record.wall_s, disk_bytes=sum(entry.size_bytes for entry in artifact.manifest.files.values())
    )
