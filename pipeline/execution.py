"""Materialize a stage: identify, then reuse | resume | run. Knows stages and the store; knows no Dagster.

Identity (all hashes by pipeline.fingerprint):

    fingerprint(stage) = H(name, version, config slice, content hashes of the inputs, environment)

Those of report and model_card are also of what their inputs' stages reported: they print it, and no content holds it.
The content hash of an input is found by computing that input's own fingerprint and looking into the store, never by
asking which event came last; so a result can be reused after a scheduler's database is gone.
"""

import contextlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError

from pipeline.artifacts import (
    IDENTITY,
    Artifact,
    ArtifactStore,
    disk_error,
    write_atomically,
)
from pipeline.environment import environment_of
from pipeline.errors import MissingInputError, RecipeError, RefitError, StageError
from pipeline.fingerprint import canonical_json, fingerprint
from pipeline.hardware import hardware_id
from pipeline.home import refit_home
from pipeline.model.architecture_files import parent_architecture
from pipeline.prerequisites import missing_nodes, missing_runtimes, refused_settings
from pipeline.puzzle.search_space import pinned_blocks, require_timeable, resolve
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.runtimes import RuntimeMissingError, runtime_ids
from pipeline.stage import WORK_DIR, ExecutionSettings, Number, StageInputs, target_key
from pipeline.stages.configs import ReportStage
from pipeline.stages.process import ProgressListener, run_stage
from pipeline.stages.registry import BY_NAME, Stage, get_stage
from pipeline.stages.spec import RESULT_IN_WORK, SPEC_FILE
from pipeline.wrong_keys import wrong_keys


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """One recipe, the store its artifacts live in, and how stages run here."""

    recipe: Recipe
    recipe_given: str
    store: ArtifactStore
    downloads: Path
    execution: ExecutionSettings

    @property
    def home(self) -> Path:
        """The directory that the store lies in."""
        return self.store.root.parent


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished artifact and what it took to have it."""

    artifact: Artifact
    how: Literal["reused", "resumed", "ran"]


def open_workspace(recipe_name_or_path: str | None = None) -> Workspace:
    """Open the workspace that RECIPE (default `smol`), REFIT_HOME and REFIT_EXECUTION describe.

    Raises:
        RecipeError: when the recipe or the execution settings cannot be read.
    """
    home = refit_home()
    given = recipe_name_or_path or os.environ.get("RECIPE", "smol")
    return Workspace(
        recipe=load_recipe(given),
        recipe_given=given,
        store=ArtifactStore(home / "store"),
        downloads=home / "downloads",
        execution=load_execution(os.environ.get("REFIT_EXECUTION")),
    )


def load_execution(path: str | None) -> ExecutionSettings:
    """Read execution settings from a YAML file; None gives those of a laptop.

    Raises:
        RecipeError: when the file is missing or a key is unknown.
    """
    if path is None:
        return ExecutionSettings()
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise RecipeError(f"REFIT_EXECUTION is {path!r}, which cannot be read: {err}") from err
    if not isinstance(data, dict):
        raise RecipeError(f"REFIT_EXECUTION is {path!r}, which holds a {type(data).__name__}; want keys and values")
    try:
        return ExecutionSettings.model_validate(data)
    except ValidationError as err:
        lines = [f"  {line}" for line in wrong_keys(err, data)]
        raise RecipeError(f"REFIT_EXECUTION is {path!r}, which is wrong:\n" + "\n".join(lines)) from err


def stage_fingerprint(workspace: Workspace, stage: Stage, target: str) -> str:
    """Return the fingerprint of a stage's artifact; its inputs must be in the store.

    Raises:
        MissingInputError: naming the upstream asset to materialize.
        RuntimeMissingError: when it, or anything above it, is measured in a runtime that is not installed.
    """
    return _Resolver(workspace, target).fingerprint(stage)


def find_artifact(workspace: Workspace, stage_name: str, target: str) -> Artifact | None:
    """Return the artifact that this recipe now asks for, or None when it, or anything above it, is not in the store.

    What was measured in a runtime that is not installed here cannot be told from what another build measured: None.
    """
    stage = get_stage(stage_name)
    try:
        return workspace.store.find(stage.name, stage_fingerprint(workspace, stage, target))
    except (MissingInputError, RuntimeMissingError):
        return None


def materialize(
    workspace: Workspace, stage_name: str, target: str, *, on_progress: ProgressListener | None = None
) -> Outcome:
    """Return the stage's artifact: the one in the store, or one made now, resuming what an earlier run left.

    Raises:
        MissingInputError: when an upstream artifact is not there.
        ArtifactError: when the bytes of an upstream artifact are not those of its manifest.
        StageError: when an input failed a blocking check, or the stage ends without a result.
        CheckpointError, RecipeError: before anything runs, see require_searchable.
    """
    try:
        return _materialize(workspace, get_stage(stage_name), target, on_progress or (lambda _: None))
    except RefitError:
        raise
    except Exception as err:
        told = disk_error(err, path=workspace.store.root)
        if told is None:
            raise
        raise told from err


def _materialize(workspace: Workspace, stage: Stage, target: str, listener: ProgressListener) -> Outcome:
    # First of all: what cannot be searched stops data stages too, and costs nobody a hash of weights.
    require_searchable(workspace.recipe)
    store = workspace.store
    resolver = _Resolver(workspace, target)
    identity = resolver.identity(stage)
    key = fingerprint(identity)
    if found := store.find(stage.name, key):
        _remove_leftover_work(found, store)
        return Outcome(artifact=found, how="reused")
    store.require_free_space()
    with store.locked(stage.name, key, on_wait=lambda message: listener({"note": message})) as out_dir:
        if found := store.find(stage.name, key):  # another process finished it while this one waited for the lock
            return Outcome(artifact=found, how="reused")
        resumed = has_saved_work(out_dir)
        _write_identity(out_dir, identity, recipe=workspace.recipe.name, target=target)
        began = time.monotonic()
        inputs = resolver.inputs(stage)
        for artifact in inputs.values():
            require_sound(artifact, workspace.recipe)
        result = run_stage(
            stage,
            stage.config(workspace.recipe, target),
            StageInputs(
                artifacts={name: artifact.path for name, artifact in inputs.items()},
                store_root=workspace.store.root,
                downloads=workspace.downloads,
                execution=workspace.execution,
            ),
            out_dir,
            on_progress=listener,
        )
        artifact = store.publish(
            stage.name,
            key,
            result=result,
            wall_s=time.monotonic() - began,
            provenance={
                "stage_version": stage.version,
                "recipe": workspace.recipe.name,
                "target": target if stage.per_target else "",
                **{f"input.{name}": artifact.content_hash for name, artifact in inputs.items()},
                **{f"execution.{name}": str(value) for name, value in workspace.execution.model_dump().items()},
                **{f"hardware.{name}": value for name, value in hardware_id().items()},
            },
        )
    return Outcome(artifact=artifact, how="resumed" if resumed else "ran")


def _remove_leftover_work(artifact: Artifact, store: ArtifactStore) -> None:
    """Remove the `_work/` of a finished artifact: a kill between its manifest and the clean-up leaves it behind."""
    if not (artifact.path / WORK_DIR).is_dir():
        return
    # Suppressed: a store that cannot be written is read all the same.
    with contextlib.suppress(OSError), store.locked(artifact.manifest.asset, artifact.manifest.fingerprint):
        shutil.rmtree(artifact.path / WORK_DIR, ignore_errors=True)


class _Resolver:
    """Finds the artifacts of one recipe and target by recomputing the chain of fingerprints, each stage once.

    What it found stays what it finds: a target that is finished in the meantime is of the next resolver's inputs.
    """

    def __init__(self, workspace: Workspace, target: str) -> None:
        self._workspace = workspace
        self._target = target
        self._found: dict[str, Artifact] = {}
        self._inputs: dict[str, dict[str, Artifact]] = {}

    def fingerprint(self, stage: Stage) -> str:
        return fingerprint(self.identity(stage))

    def identity(self, stage: Stage) -> dict[str, object]:
        config = stage.config(self._workspace.recipe, self._target)
        identity: dict[str, object] = {
            "stage": stage.name,
            "version": stage.version,
            "config": config,
            "inputs": {name: artifact.content_hash for name, artifact in self.inputs(stage).items()},
        }
        backends = stage.measures_in(self._workspace.recipe)
        if backends:
            identity["hardware"] = hardware_id()
            identity |= runtime_ids(backends)
        if environment := environment_of(config, home=self._workspace.home):
            identity["environment"] = environment
        if isinstance(config, ReportStage):  # report and model_card
            identity["results"] = {name: _result_hash(artifact) for name, artifact in self.inputs(stage).items()}
        return identity

    def inputs(self, stage: Stage) -> dict[str, Artifact]:
        if stage.name not in self._inputs:
            self._inputs[stage.name] = self._find_inputs(stage)
        return self._inputs[stage.name]

    def _find_inputs(self, stage: Stage) -> dict[str, Artifact]:
        found = {name: self._artifact(name, reader=stage) for name in stage.inputs}
        for name in stage.over_targets:
            for target in sorted(self._workspace.recipe.targets):
                artifact = find_artifact(self._workspace, name, target)
                if artifact is not None and failed_blocking_check(artifact, self._workspace.recipe) is None:
                    found[target_key(name, target)] = artifact
        return found

    def _artifact(self, name: str, *, reader: Stage) -> Artifact:
        if name not in self._found:
            upstream = BY_NAME[name]
            store = self._workspace.store
            key = self.fingerprint(upstream)
            found = store.find(name, key)
            if found is None:
                given = shlex.quote(self._workspace.recipe_given)
                raise MissingInputError(
                    f"{reader.name} reads {name}, which is not materialized for recipe {self._workspace.recipe.name} "
                    f"({name}/{key} is not in {store.root}): run `make materialize RECIPE={given} SELECT='*{name}'"
                    + (f" TARGET={self._target}`" if upstream.per_target else "`")
                    + " first"
                )
            self._found[name] = found
        return self._found[name]


def stage_identity(workspace: Workspace, stage: Stage, target: str) -> dict[str, object]:
    """Return what a stage's fingerprint is the hash of, in plain JSON values; its inputs must be in the store.

    Raises:
        MissingInputError: naming the upstream asset to materialize.
        ArtifactError: when an input's files are not those of its manifest.
        RuntimeMissingError: as stage_fingerprint.
    """
    return json.loads(canonical_json(_Resolver(workspace, target).identity(stage)))


def require_searchable(recipe: Recipe) -> None:
    """Refuse a recipe whose search would find, days later, that it has nothing to search.

    Raises:
        CheckpointError: when the layers of its parent differ; see also parent_architecture.
        RecipeError: when its search space does not fit the parent or the runtime that times it, or a target's pins do
            not fit the search space.
    """
    space = resolve(recipe.search_space, parent_architecture(recipe.parent))
    require_timeable(space, backend=recipe.block_profile.backend)
    for name, target in recipe.targets.items():
        try:
            pinned_blocks(space, target.pins)
        except RecipeError as err:
            raise RecipeError(f"target {name}: {err}") from err


def require_runtimes(workspace: Workspace, stage_names: Iterable[str], *, target: str) -> None:
    """Refuse a run one of whose stages would find, when its turn comes, that it cannot run here or as it is set.

    Raises:
        RuntimeMissingError: naming the stage, what it needs, and how to install it.
        StageError: when stages that are still to be made refuse the settings, or their ranks cannot be started from
            here.
    """
    recipe, execution = workspace.recipe, workspace.execution
    refused: list[str] = []
    for stage in (BY_NAME[name] for name in stage_names if name in BY_NAME):
        for told in missing_runtimes(stage, recipe=recipe, execution=execution).values():
            raise RuntimeMissingError(told)
        no_nodes = missing_nodes(stage, execution=execution)
        found = refused_settings(stage, recipe=recipe, execution=execution)
        found += [] if no_nodes is None else [f"nodes: {no_nodes}"]
        # What is there was made under settings of its own, and is read under any.
        if found and find_artifact(workspace, stage.name, target) is None:
            refused += found
    if refused:
        lines = [f"  {told}" for told in refused]
        raise StageError("stages of this run would refuse to start, so none is started:\n" + "\n".join(lines))


def _result_hash(artifact: Artifact) -> str:
    """Return the hash of what a stage reported: metrics, facts and tables, which reports print, but not its time."""
    return fingerprint(json.loads(artifact.record.result.model_dump_json()))


def has_saved_work(out_dir: Path) -> bool:
    """Return whether an earlier run left more in an unfinished artifact than the files that start a stage."""
    starting = (SPEC_FILE, Path(RESULT_IN_WORK).name)
    files = (path for path in (out_dir / WORK_DIR).rglob("*") if path.is_file())
    return any(path.name not in starting and not path.name.startswith(".") for path in files)


def failed_blocking_check(artifact: Artifact, recipe: Recipe) -> str | None:
    """Return which blocking check of the recipe an artifact fails and by how much, or None when it passes all."""
    return first_failure(artifact.manifest.asset, artifact.record.result.metrics, recipe=recipe)


def first_failure(stage_name: str, metrics: Mapping[str, Number], *, recipe: Recipe) -> str | None:
    """Return which blocking check of a stage these metrics fail and by how much, or None when they pass all."""
    for check in BY_NAME[stage_name].checks:
        value = metrics.get(check.metric)
        if not check.blocking or not check.applies_to(metrics):
            continue
        if value is None or not check.passes(value, recipe=recipe):
            return f"{check.name}: {check.metric} is {value}, wanted {check.comparison} {check.bound_for(recipe)}"
    return None


def _write_identity(out_dir: Path, identity: dict[str, object], *, recipe: str, target: str) -> None:
    """Leave word of what an artifact is made from, for whoever asks later why it differs from another."""
    text = canonical_json({"recipe": recipe, "target": target, "identity": identity})
    write_atomically(out_dir / IDENTITY, f"{text}\n".encode())


def require_sound(artifact: Artifact, recipe: Recipe) -> None:
    """Refuse an artifact that failed a blocking check, in whichever run that was, or whose bytes have changed.

    Raises:
        StageError: naming the check, its value and its bound.
        ArtifactError: naming the file.
    """
    name, failure = artifact.manifest.asset, failed_blocking_check(artifact, recipe)
    if failure is not None:
        raise StageError(
            f"{name} failed its blocking check {failure}; change the recipe so that {name} passes, or the threshold if "
            "the value is acceptable"
        )
    _verify_once(artifact)


_VERIFIED: set[tuple[Path, str]] = set()


def _verify_once(artifact: Artifact) -> None:
    """Compare every byte with the manifest when this process first reads the artifact."""
    seen = (artifact.path, artifact.content_hash)
    if seen not in _VERIFIED:
        artifact.verify_hashes()
        _VERIFIED.add(seen)
