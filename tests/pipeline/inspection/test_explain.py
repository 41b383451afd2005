"""Why stages would run again: one change at a time, on artifacts that were really made."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import IDENTITY, PROGRESS, RESULT
from pipeline.execution import Workspace, find_artifact, materialize, stage_fingerprint, stage_identity
from pipeline.inspection.explain import Explanation, explain, render_explanations
from pipeline.recipe_file import parse_recipe
from pipeline.stage import WORK_DIR
from pipeline.stages.registry import STAGES, get_stage
from tests.dagster.stores import open_tiny, publish_all
from tests.pipeline.inspection.conftest import MADE, TARGET


def explained(workspace: Workspace) -> dict[str, Explanation]:
    return {one.stage: one for one in explain(workspace, target=TARGET)}


def edited(workspace: Workspace, section: str, **changes: Any) -> Workspace:
    plain = workspace.recipe.model_dump(mode="json")
    plain[section] |= changes
    return replace(workspace, recipe=parse_recipe(plain, origin="test"))


def test_what_is_there_is_reused_and_the_rest_was_never_made(workspace: Workspace):
    found = explained(workspace)
    assert [name for name, one in found.items() if one.action == "reuse"] == list(MADE)
    assert found["channel_importance"] == Explanation(
        stage="channel_importance", action="run", reason="never made before"
    )
    assert found["block_library"].reason == "input channel_importance will be made first"
    assert list(found) == [stage.name for stage in STAGES]


def test_an_edited_setting_is_told_with_its_old_and_new_value(workspace: Workspace):
    found = explained(edited(workspace, "distillation_mix", tokens=12288, seed=77))
    assert found["distillation_mix"] == Explanation(
        stage="distillation_mix", action="run", reason="config.mixture.seed: 1 -> 77", num_more=1
    )
    assert found["pretraining_mix"].action == "reuse"
    assert found["channel_importance"].reason == "input distillation_mix will be made first"


def test_a_setting_that_changes_no_stage_reruns_nothing(workspace: Workspace):
    assert explained(edited(workspace, "thresholds", max_kd_kl_ratio=0.5)) == explained(workspace)


def test_an_input_with_other_content_is_told(workspace: Workspace):
    plain = workspace.recipe.model_dump(mode="json")
    plain["parent"] |= {"seed": 99}
    other = replace(workspace, recipe=parse_recipe(plain, origin="test"))
    assert explained(other)["parent_checkpoint"].reason == "config.parent.seed: 1 -> 99"
    materialize(other, "parent_checkpoint", TARGET)
    mixture = explained(other)["distillation_mix"]
    assert mixture.action == "run"
    assert mixture.reason.startswith("input parent_checkpoint has other content: ")


def test_unfinished_work_is_resumed_and_says_how_far_it_came(workspace: Workspace):
    stage = get_stage("channel_importance")
    out_dir = workspace.store.directory(stage.name, stage_fingerprint(workspace, stage, TARGET))
    (out_dir / WORK_DIR).mkdir(parents=True)
    (out_dir / WORK_DIR / "state.bin").write_bytes(b"x")
    line = {"what": "calibration batches", "step": 3, "total": 8, "eta_s": None, "metrics": {}}
    (out_dir / PROGRESS).write_text(json.dumps(line) + "\n", encoding="utf-8")
    found = explained(workspace)["channel_importance"]
    assert (found.action, found.reason) == ("resume", "an unfinished run came to calibration batches 3 of 8")


def test_a_broken_artifact_blocks_what_reads_it(workspace: Workspace):
    artifact = find_artifact(workspace, "corpora", TARGET)
    assert artifact is not None
    next(iter(sorted(artifact.path.glob("*.parquet")))).unlink()
    found = explained(workspace)
    assert found["corpora"].action == "blocked"
    assert "is missing, its manifest says" in found["corpora"].reason
    assert found["evaluation_sets"].reason == "its input corpora is blocked"


def test_a_missing_runtime_blocks_what_measures_in_it_and_what_reads_that(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REFIT_RUNTIMES", str(tmp_path / "none"))
    profile = workspace.recipe.block_profile.model_copy(update={"backend": "vllm"})
    found = explained(replace(workspace, recipe=workspace.recipe.model_copy(update={"block_profile": profile})))
    assert found["block_profile"].action == "blocked"
    assert "make install-vllm" in found["block_profile"].reason
    assert found["mip_solution"].reason == "its input block_profile is blocked"
    assert found["evaluation_sets"].action == "reuse"


def test_an_artifact_without_a_written_identity_still_counts_as_made(workspace: Workspace):
    for path in workspace.store.root.glob(f"*/*/{IDENTITY}"):
        path.unlink()
    found = explained(edited(workspace, "pretraining_mix", tokens=6144))
    assert found["distillation_mix"].action == "reuse"
    assert found["pretraining_mix"].reason == "never made before"


def test_explaining_changes_nothing(workspace: Workspace):
    before = sorted((path, path.stat().st_mtime_ns) for path in workspace.store.root.rglob("*"))
    explain(workspace, target=TARGET)
    assert sorted((path, path.stat().st_mtime_ns) for path in workspace.store.root.rglob("*")) == before


def test_text_has_a_line_per_stage_and_counts(workspace: Workspace):
    lines = render_explanations(explain(workspace, target=TARGET)).splitlines()
    assert len(lines) == len(STAGES) + 2
    assert lines[-1] == f"{len(MADE)} reuse, {len(STAGES) - len(MADE)} run"


@pytest.mark.parametrize("target", ["fused", "light"])
def test_shared_stages_are_explained_alike_for_every_target(workspace: Workspace, target: str):
    found = {one.stage: one.action for one in explain(workspace, target=target)}
    assert all(found[name] == "reuse" for name in MADE)


def test_a_report_whose_input_reports_other_figures_says_so(tmp_path: Path):
    workspace = open_tiny(tmp_path)
    artifacts = publish_all(workspace, target=TARGET)
    report, path = get_stage("report"), artifacts["kd_checkpoint"].path / RESULT
    identity = {"recipe": "tiny", "target": TARGET, "identity": stage_identity(workspace, report, TARGET)}
    (artifacts["report"].path / IDENTITY).write_text(json.dumps(identity))
    path.write_text(path.read_text().replace('"made_by": "a test"', '"made_by": "another"'))

    found = explained(workspace)["report"]

    assert (found.action, found.num_more) == ("run", 0)
    assert found.reason.startswith("input kd_checkpoint has other results: ")
