"""A stage over all targets: it reads those that are there, and its fingerprint names what it read."""

import contextlib
import json
from pathlib import Path

import pytest

from pipeline import execution
from pipeline.architecture import Frozen
from pipeline.artifacts import IDENTITY
from pipeline.execution import Workspace, materialize, stage_fingerprint, stage_identity
from pipeline.fingerprint import fingerprint
from pipeline.stage import StageInputs, StageResult
from pipeline.stages.registry import STAGES, Stage, get_stage
from tests.dagster.stores import open_tiny, publish, publish_all


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_tiny(tmp_path)


def test_fan_in_takes_the_targets_that_are_there_and_changes_with_each(workspace: Workspace):
    pareto = get_stage("pareto")
    keys = [stage_fingerprint(workspace, pareto, "fused")]
    for target in ("fused", "light"):
        publish_all(workspace, target=target)
        keys.append(stage_fingerprint(workspace, pareto, "fused"))
        inputs = stage_identity(workspace, pareto, "light")["inputs"]
        assert isinstance(inputs, dict)
        assert f"baselines@{target}" in inputs
    assert len(set(keys)) == 3
    assert len(inputs) == 2 * len(pareto.over_targets)


def test_fan_in_runs_on_the_targets_that_its_key_names(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    pareto = get_stage("pareto")

    def finish(target: str) -> None:
        for stage in STAGES:
            if stage is not pareto:
                publish(workspace, stage, target=target)

    finish("fused")
    key = stage_fingerprint(workspace, pareto, "fused")
    read: list[list[str]] = []

    def run_stage(_stage: Stage, _config: Frozen, inputs: StageInputs, _out_dir: Path, **_: object) -> StageResult:
        read.append(sorted(inputs.artifacts))
        return StageResult()

    monkeypatch.setattr(execution, "run_stage", run_stage)
    with contextlib.ExitStack() as other_process:
        other_process.enter_context(workspace.store.locked("pareto", key))

        def finish_another_target(_: dict[str, object]) -> None:
            finish("light")
            other_process.close()

        made = materialize(workspace, "pareto", "fused", on_progress=finish_another_target).artifact

    assert made.manifest.fingerprint == key
    assert read == [["baselines@fused", "evaluation@fused", "speed_report@fused"]]
    assert {name for name in made.manifest.provenance if "@" in name} == {f"input.{name}" for name in read[0]}
    assert fingerprint(json.loads((made.path / IDENTITY).read_text())["identity"]) == key
    assert stage_fingerprint(workspace, pareto, "fused") != key


def test_fan_in_leaves_out_a_target_that_failed_a_blocking_check(tmp_path: Path):
    workspace = open_tiny(tmp_path)
    for stage in STAGES:
        worse = {"rl_toggle_compliance_on": -1.0} if stage.name == "evaluation" else {}
        publish(workspace, stage, target="fused", **worse)

    inputs = stage_identity(workspace, get_stage("pareto"), "fused")["inputs"]

    assert isinstance(inputs, dict)
    assert sorted(inputs) == ["baselines@fused", "speed_report@fused"]
