"""What counts as stale, and what the nightly schedule asks for."""

import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import dagster as dg
import pytest

from assets.jobs import RERUN_TAG, build_schedule
from assets.stage_asset import code_version
from pipeline.definitions import build_defs
from pipeline.execution import Workspace, find_artifact
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.stages.registry import STAGES, get_stage
from resources.staleness import find_stale_stages
from resources.time_zone import find_time_zone
from tests.dagster.stores import open_tiny, publish_all

AFTER_KD = [
    "kd_checkpoint",
    "fusion_report",
    "cpt_checkpoint",
    "sft_checkpoint",
    "rl_checkpoint",
    "evaluation",
    "speed_report",
    "exported_model",
    "model_card",
    "report",
    "pareto",
]


def _edited(recipe: Recipe, **sections: dict[str, object]) -> Recipe:
    changes = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update=changes)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """The tiny recipe with every artifact of both targets published."""
    workspace = open_tiny(tmp_path)
    for target in workspace.recipe.targets:
        publish_all(workspace, target=target)
    return workspace


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        yield instance


def _tick(workspace: Workspace, instance: dg.DagsterInstance) -> dg.RunRequest | dg.SkipReason:
    context = dg.build_schedule_context(instance=instance, scheduled_execution_time=datetime(2026, 3, 1, 2, 0))
    result = build_schedule(workspace)(context)
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


def test_stale_stages_of_an_empty_store_are_all():
    assert len(find_stale_stages(open_tiny(Path("/nonexistent")), "fused")) == len(STAGES)


def test_stale_stages_after_publishing_everything_are_none(workspace: Workspace):
    assert find_stale_stages(workspace, "fused") == []
    assert find_stale_stages(workspace, "light") == []


def test_stale_stages_after_editing_kd_are_kd_and_what_follows(workspace: Workspace, tmp_path: Path):
    edited = open_tiny(tmp_path, recipe=_edited(workspace.recipe, kd={"tokens": 4096}))

    assert find_stale_stages(edited, "fused") == AFTER_KD


def test_stale_stages_after_editing_thresholds_are_none(workspace: Workspace, tmp_path: Path):
    edited = open_tiny(tmp_path, recipe=_edited(workspace.recipe, thresholds={"max_rl_kl": 0.5}))

    assert find_stale_stages(edited, "fused") == []


def test_stale_stages_without_a_runtime_are_what_it_measures_and_what_follows(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REFIT_RUNTIMES", str(tmp_path / "none"))
    edited = open_tiny(tmp_path, recipe=_edited(workspace.recipe, speed_report={"backends": ("torch", "vllm")}))

    assert find_stale_stages(edited, "fused") == ["speed_report", "model_card", "report", "pareto"]


def test_code_version_changes_with_the_slice_a_stage_reads_and_no_other():
    recipe = load_recipe("tiny")
    edited = _edited(recipe, kd={"tokens": 4096})

    changed = [
        stage.name for stage in STAGES if code_version(stage, recipe=recipe) != code_version(stage, recipe=edited)
    ]

    assert changed == ["kd_checkpoint"]


def test_code_version_of_training_survives_another_target():
    recipe = load_recipe("tiny")
    one_target = recipe.model_copy(update={"targets": {"fused": recipe.targets["fused"]}})
    kd = get_stage("kd_checkpoint")

    assert code_version(kd, recipe=recipe) == code_version(kd, recipe=one_target)


def test_schedule_is_shipped_stopped(workspace: Workspace):
    assert build_schedule(workspace).default_status is dg.DefaultScheduleStatus.STOPPED


def test_schedule_runs_at_night_where_the_machine_is(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")

    assert build_schedule(workspace).execution_timezone == "Asia/Tokyo"


@pytest.mark.parametrize(
    ("link", "zone"),
    [
        ("/usr/share/zoneinfo/Europe/Berlin", "Europe/Berlin"),
        ("../usr/share/zoneinfo/America/Argentina/Ushuaia", "America/Argentina/Ushuaia"),
        ("/var/db/timezone/zoneinfo/America/New_York", "America/New_York"),
        ("/usr/share/zoneinfo/Europe", "UTC"),
        ("/elsewhere/clock", "UTC"),
    ],
)
def test_time_zone_is_what_localtime_links_to(link: str, zone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TZ", raising=False)
    (tmp_path / "localtime").symlink_to(link)

    assert find_time_zone(localtime=tmp_path / "localtime") == zone


def test_time_zone_where_localtime_is_no_link_is_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TZ", raising=False)

    assert find_time_zone(localtime=tmp_path / "localtime") == "UTC"


def test_time_zone_that_has_no_name_is_passed_over_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TZ", "CEST-2")
    (tmp_path / "localtime").symlink_to("/usr/share/zoneinfo/Europe/Berlin")

    with pytest.warns(UserWarning, match="TZ is 'CEST-2', .* runs in Europe/Berlin"):
        assert find_time_zone(localtime=tmp_path / "localtime") == "Europe/Berlin"


def test_schedule_with_nothing_changed_skips(workspace: Workspace, instance: dg.DagsterInstance):
    result = _tick(workspace, instance)

    assert isinstance(result, dg.SkipReason)
    assert "current" in str(result.skip_message)


def test_schedule_after_an_edit_requests_stale_and_downstream_of_one_target(
    workspace: Workspace, instance: dg.DagsterInstance, tmp_path: Path
):
    edited = open_tiny(tmp_path, recipe=_edited(workspace.recipe, kd={"tokens": 4096}))

    request = _tick(edited, instance)

    assert isinstance(request, dg.RunRequest)
    assert request.partition_key == "fused"
    assert [key.to_user_string() for key in request.asset_selection or []] == AFTER_KD


def test_schedule_after_a_lost_artifact_requests_it_and_what_follows(
    workspace: Workspace, instance: dg.DagsterInstance, tmp_path: Path
):
    lost = find_artifact(workspace, "evaluation", "light")
    assert lost is not None
    shutil.rmtree(lost.path)

    request = _tick(open_tiny(tmp_path), instance)

    assert isinstance(request, dg.RunRequest)
    assert request.partition_key == "light"  # the other target's is still there
    assert [key.to_user_string() for key in request.asset_selection or []] == [
        "evaluation",
        "model_card",
        "report",
        "pareto",
    ]


def test_schedule_as_dagster_evaluates_it_requests_a_run_of_the_job(
    workspace: Workspace, instance: dg.DagsterInstance, tmp_path: Path
):
    edited = open_tiny(tmp_path, recipe=_edited(workspace.recipe, kd={"tokens": 4096}))
    repository = build_defs(workspace=edited).get_repository_def()
    when = datetime(2026, 3, 1, 2, 0)

    with dg.build_schedule_context(
        instance=instance, scheduled_execution_time=when, repository_def=repository
    ) as context:
        tick = repository.get_schedule_def("rerun_stale").evaluate_tick(context)

    (request,) = tick.run_requests or []
    assert request.partition_key == "fused"
    job = repository.get_job("all_stages")
    assert set(request.asset_selection or []) <= job.asset_layer.executable_asset_keys
    assert [key.to_user_string() for key in request.asset_selection or []] == AFTER_KD


def test_schedule_turns_to_the_next_target_once_one_was_requested_this_night(
    workspace: Workspace, instance: dg.DagsterInstance, tmp_path: Path
):
    edited = open_tiny(tmp_path, recipe=_edited(workspace.recipe, kd={"tokens": 4096}))
    for target in ("fused", "light"):
        request = _tick(edited, instance)
        assert isinstance(request, dg.RunRequest)
        assert request.partition_key == target
        _add_run(instance, status=dg.DagsterRunStatus.FAILURE, tags=dict(request.tags))

    result = _tick(edited, instance)

    assert isinstance(result, dg.SkipReason)
    assert "already run this night" in str(result.skip_message)


def test_schedule_while_a_run_is_in_progress_skips(instance: dg.DagsterInstance, tmp_path: Path):
    run_id = _add_run(instance, status=dg.DagsterRunStatus.STARTED, tags={RERUN_TAG: "earlier/fused"})

    result = _tick(open_tiny(tmp_path), instance)

    assert isinstance(result, dg.SkipReason)
    assert run_id in str(result.skip_message)


def _add_run(instance: dg.DagsterInstance, *, status: dg.DagsterRunStatus, tags: dict[str, str]) -> str:
    run = dg.DagsterRun(job_name="all_stages", status=status, tags=tags)
    instance.run_storage.add_run(run)
    return run.run_id
