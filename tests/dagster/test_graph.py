"""The graph as a whole: its keys and edges, its checks, and that it loads without torch."""

import re
import tomllib
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph

import assets
from pipeline.definitions import build_defs, load_assets
from pipeline.recipe_file import load_recipe
from pipeline.stages.registry import STAGES, get_stage
from tests.dagster.commands import run_module, run_python
from tests.dagster.stores import open_tiny

SNAPSHOT = Path(__file__).parent / "graph.txt"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory):
    defs = build_defs(workspace=open_tiny(tmp_path_factory.mktemp("home")))
    dg.Definitions.validate_loadable(defs)
    return defs.resolve_asset_graph()


def test_graph_keys_and_edges_equal_snapshot(graph: BaseAssetGraph):
    lines = []
    for key in sorted(graph.get_all_asset_keys()):
        inputs = sorted(upstream.to_user_string() for upstream in graph.get(key).parent_keys)
        lines.append(f"{key.to_user_string()} <- {', '.join(inputs)}".strip())

    assert "\n".join(lines) + "\n" == SNAPSHOT.read_text(encoding="utf-8"), (
        "the graph changed: if that was meant, write the new one to tests/dagster/graph.txt"
    )


def test_graph_every_edge_is_a_registry_input(graph: BaseAssetGraph):
    for stage in STAGES:
        assert {key.to_user_string() for key in graph.get(dg.AssetKey(stage.name)).parent_keys} == set(stage.upstream)


def test_graph_stages_are_listed_inputs_first():
    seen: set[str] = set()
    for stage in STAGES:
        assert set(stage.upstream) <= seen, stage.name
        seen.add(stage.name)


def test_graph_shared_stages_depend_on_shared_stages_only():
    per_target = {stage.name for stage in STAGES if stage.per_target}
    for stage in STAGES:
        assert stage.per_target or per_target.isdisjoint(stage.inputs), stage.name


def test_graph_fan_in_is_shared_and_over_stages_of_targets():
    fan_in = [stage for stage in STAGES if stage.over_targets]
    assert [stage.name for stage in fan_in] == ["pareto"]
    assert not any(stage.per_target for stage in fan_in)
    assert all(get_stage(name).per_target for stage in fan_in for name in stage.over_targets)


def test_graph_targets_are_the_partitions(graph: BaseAssetGraph):
    for stage in STAGES:
        partitions = graph.get(dg.AssetKey(stage.name)).partitions_def
        expected = sorted(load_recipe("tiny").targets) if stage.per_target else None
        assert (partitions.get_partition_keys() if partitions else None) == expected


def test_graph_checks_are_those_of_the_registry(graph: BaseAssetGraph):
    expected = {(stage.name, check.name, check.blocking) for stage in STAGES for check in stage.checks}

    assert {
        (key.asset_key.to_user_string(), key.name, graph.get_check_spec(key).blocking) for key in graph.asset_check_keys
    } == expected


def test_graph_every_stage_has_one_asset_module_and_none_is_left_over():
    modules = {path.stem for path in Path(str(assets.__file__)).parent.glob("*.py")}

    shared = {"__init__", "stage_asset", "metadata", "highlights", "jobs", "bld_block"}
    assert modules == {stage.name for stage in STAGES} | shared


def test_asset_modules_are_short_and_do_not_postpone_annotations():
    for path in sorted(Path(str(assets.__file__)).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "from __future__ import annotations" not in text, path.name
        if path.stem in {stage.name for stage in STAGES}:
            assert len(text.splitlines()) <= 25, path.name


def test_description_says_what_a_stage_is_what_it_reads_and_what_to_look_at(graph: BaseAssetGraph):
    for stage in STAGES:
        description = graph.get(dg.AssetKey(stage.name)).description or ""
        assert description.startswith(stage.description), stage.name
        assert all(f"`{name}`" in description for name in stage.upstream), stage.name
        assert "**Look at** " in description, stage.name


def test_gpu_pool_holds_every_training_stage():
    pools = {definition.key.to_user_string(): definition.op.pool for definition in load_assets(load_recipe("tiny"))}

    assert all(pools[stage.name] == "gpu" for stage in STAGES if stage.trains)


def test_definitions_load_without_torch(tmp_path: Path):
    probe = (
        "import sys, pipeline.definitions\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'pulp', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loading the graph imported {sorted(heavy)}' if heavy else 0)\n"
    )

    done = run_python("-c", probe, home=tmp_path)

    assert done.returncode == 0, done.stderr


def test_definitions_with_unknown_recipe_name_it_and_list_the_others(tmp_path: Path):
    done = run_module("pipeline.definitions", home=tmp_path, recipe="nope")

    assert done.returncode != 0
    assert re.search(r"RecipeError: no recipe 'nope'.*\btiny\b", done.stderr)


def test_workspace_file_and_project_settings_name_the_same_location():
    root = SNAPSHOT.parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["dg"]["project"]
    (location,) = yaml.safe_load((root / "workspace.yaml").read_text())["load_from"]

    assert location["python_module"]["location_name"] == project["code_location_name"]
    assert location["python_module"]["module_name"] == project["code_location_target_module"]
