"""A second materialization through the real command line: everything reused, also after Dagster's database is gone."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from pipeline.definitions import build_defs
from pipeline.execution import Workspace
from pipeline.stages.registry import STAGES
from resources.block_partitions import BLD_BLOCK
from tests.dagster.commands import environment, materialize_command, run_module
from tests.dagster.stores import open_tiny, publish, publish_all


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = open_tiny(tmp_path)
    publish_all(workspace, target="fused")
    return workspace


def _materialize(workspace: Workspace, instance: dg.DagsterInstance, **options: object) -> dg.ExecuteInProcessResult:
    return (
        build_defs(workspace=workspace)
        .resolve_implicit_global_asset_job_def()
        .execute_in_process(instance=instance, partition_key="fused", raise_on_error=False, **options)
    )


def test_whole_graph_from_the_command_line_is_reused_again_without_dagster_home(workspace: Workspace, tmp_path: Path):
    for _ in range(2):
        done = run_module(*materialize_command(select="*", target="fused"), home=tmp_path)

        assert done.returncode == 0, done.stderr[-3000:]
        for stage in STAGES:
            assert f"{stage.name} reused: " in done.stderr, stage.name
        shutil.rmtree(environment(tmp_path)["DAGSTER_HOME"])


def test_reused_asset_is_recorded_with_its_content_hash_and_partition(workspace: Workspace):
    with dg.DagsterInstance.ephemeral() as instance:
        assert _materialize(workspace, instance).success

        for stage in STAGES:
            event = instance.get_latest_materialization_event(dg.AssetKey(stage.name))
            assert event is not None
            materialization = event.asset_materialization
            assert materialization is not None
            assert materialization.metadata["how"] == dg.MetadataValue.text("reused")
            assert materialization.partition == ("fused" if stage.per_target else None)


def test_run_that_a_later_stage_would_refuse_starts_nothing_unless_all_is_there(workspace: Workspace, tmp_path: Path):
    settings = workspace.execution.model_copy(update={"num_ranks": 8})
    empty = replace(open_tiny(tmp_path / "other"), execution=settings)

    with dg.DagsterInstance.ephemeral() as instance:
        assert _materialize(replace(workspace, execution=settings), instance).success
    with dg.DagsterInstance.ephemeral() as instance:
        assert not _materialize(empty, instance).success
        assert instance.get_latest_materialization_event(dg.AssetKey("corpora")) is None
    assert not list(empty.store.root.glob("*/*"))


def test_block_library_adds_a_partition_per_trained_block_once(workspace: Workspace):
    with dg.DagsterInstance.ephemeral() as instance:
        for _ in range(2):
            assert _materialize(workspace, instance).success

        expected = {"000|ffn.width-96", "002|attention.linear"}
        assert {str(key) for key in instance.get_materialized_partitions(BLD_BLOCK)} == expected
        assert len(instance.fetch_materializations(BLD_BLOCK, limit=100).records) == len(expected)


def test_failing_blocking_check_stops_what_follows(workspace: Workspace, tmp_path: Path):
    home = tmp_path / "other"
    bad = open_tiny(home)
    for stage in STAGES:
        worse = {"num_contaminated_documents_left": 3} if stage.name == "pretraining_mix" else {}
        publish(bad, stage, target="fused", **worse)

    with dg.DagsterInstance.ephemeral() as instance:
        result = _materialize(bad, instance)

        assert not result.success
        assert instance.get_latest_materialization_event(dg.AssetKey("cpt_checkpoint")) is None
        assert instance.get_latest_materialization_event(dg.AssetKey("kd_checkpoint")) is not None


def test_missing_runtime_of_a_late_stage_stops_a_run_at_its_first_asset(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REFIT_RUNTIMES", str(tmp_path / "none"))
    speed = workspace.recipe.speed_report.model_copy(update={"backends": ("torch", "vllm")})
    asking = replace(workspace, recipe=workspace.recipe.model_copy(update={"speed_report": speed}))
    with dg.DagsterInstance.ephemeral() as instance:
        result = _materialize(asking, instance)

        assert not result.success
        assert not any(event.is_successful_output for event in result.all_events)
        failures = [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
        assert failures
        for failure in failures:
            assert failure is not None
            assert failure.cause is not None
            assert "speed_report measures in vllm" in failure.cause.message
            assert "make install-vllm" in failure.cause.message
        without = _materialize(asking, instance, asset_selection=[dg.AssetKey("parent_checkpoint")])
        assert without.success


def test_missing_input_is_one_clear_failure(tmp_path: Path):
    done = run_module(*materialize_command(select="kd_checkpoint", target="fused"), home=tmp_path)

    assert done.returncode != 0
    assert "Failure: kd_checkpoint: " in done.stderr
    advice = re.search(r"run `make materialize RECIPE=tiny SELECT='([^']+)'", done.stderr)
    assert advice is not None, done.stderr
    # What is advised makes the missing artifact from nothing.
    graph = build_defs(workspace=open_tiny(tmp_path / "other")).resolve_asset_graph()
    selected = dg.AssetSelection.from_string(advice[1]).resolve(graph)
    assert all(graph.get(key).parent_keys <= selected for key in selected)


def test_unknown_target_is_refused(tmp_path: Path):
    done = run_module("resources.home", "--select", "kd_checkpoint", "--target", "nope", home=tmp_path)

    assert done.returncode == 1
    assert done.stderr == "error: recipe tiny has no target 'nope'; it has fused, light\n"
