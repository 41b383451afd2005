"""block_profile as a roofline of the recipe `tiny`: its tables, its identity, and the search behind it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.devices import THIS_MACHINE
from pipeline.errors import RecipeError
from pipeline.execution import Workspace, materialize, stage_identity
from pipeline.model.checkpoint import read_architecture
from pipeline.puzzle.calibration import PHASES, Calibration
from pipeline.puzzle.search import CALIBRATION_FILE, read_costs, read_solution
from pipeline.puzzle.search_space import resolve
from pipeline.puzzle.tables import ACTIVATIONS, MEMORY, PROFILE, SCHEMAS, SCORES, read_table, write_table
from pipeline.recipe import Limit, Recipe, Requirements
from pipeline.recipe_file import load_recipe, parse_recipe
from pipeline.stage import StageInputs
from pipeline.stages import mip_solution
from pipeline.stages.configs import MipStage
from pipeline.stages.registry import get_stage
from tests.dagster.stores import open_tiny

STAGE = get_stage("block_profile")


def roofline_recipe(**changes: Any) -> Recipe:
    data = load_recipe("tiny").model_dump(mode="json")
    data["block_profile"] |= {"backend": "roofline", "device": "h100-80gb"} | changes
    return parse_recipe(data, origin="test")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = replace(open_tiny(tmp_path), recipe=roofline_recipe())
    materialize(workspace, "parent_checkpoint", target=workspace.recipe.default_target)
    return workspace


def test_block_profile_of_a_roofline_writes_the_measured_ones_tables_and_the_search_solves_them(
    workspace: Workspace, tmp_path: Path
):
    recipe = workspace.recipe
    parent_dir = materialize(workspace, "parent_checkpoint", target=recipe.default_target).artifact.path
    artifact = materialize(workspace, STAGE.name, target=recipe.default_target).artifact
    facts = artifact.record.result.facts
    assert facts["runtime"] == "roofline of h100-80gb"
    metrics = artifact.record.result.metrics
    assert (metrics["max_relative_residual"], metrics["max_drift"], metrics["num_repeats"]) == (0, 0, 0)
    times = read_table(artifact.path, PROFILE)
    # Attention kv2, kv1, linear, no_op; FFN 192, 96, linear, no_op; and what is outside: in two phases.
    assert len(times) == 2 * 9
    assert (times["spread_ms"].to_list(), times["num_repeats"].to_list()) == ([0.0] * 18, [0] * 18)
    assert times.filter(pl.col("variant") == "no_op")["time_ms"].to_list() == [0.0] * 4
    assert times.filter(pl.col("variant") != "no_op")["time_ms"].to_numpy().min() > 0
    assert len(read_table(artifact.path, MEMORY)) == 9
    activations = read_table(artifact.path, ACTIVATIONS)
    held_mib = dict(
        zip(activations["attention"] + "+" + activations["ffn"], activations["activations_mib"], strict=True)
    )
    assert len(held_mib) == len(activations) == 4 * 4 + 1
    # 64 prompt tokens of 4 bytes a value: three hidden vectors of 64, their normed one, three of the FFN's 192; cosines
    # and sines of 16 values. A layer without attention holds a hidden vector less.
    assert held_mib["kv2+ffn192"] == (64 * 4 * (4 * 64 + 3 * 192) + 2 * 4 * 16 * 64) / 2**20
    assert held_mib["no_op+ffn192"] == (64 * 4 * (3 * 64 + 3 * 192) + 2 * 4 * 16 * 64) / 2**20
    calibration = Calibration.model_validate_json((artifact.path / CALIBRATION_FILE).read_bytes())
    assert [entry.factor for entry in calibration.entries] == [1.0, 1.0]
    costs = read_costs(artifact.path, profile=recipe.block_profile)
    parent = read_architecture(parent_dir)
    for phase in PHASES:
        assert costs.predicted_ms(parent.blocks, "chat", phase) == pytest.approx(
            calibration.get("chat", phase).parent_ms
        )

    rows = []
    for layer, options in enumerate(resolve(recipe.search_space, parent).layers):
        for index, block in enumerate(options.blocks):
            rows.append((layer, block.attention.key, block.ffn.key, index == 0, *[float(index)] * 4, None, 1))
    scores_dir = tmp_path / "scores"
    write_table(scores_dir, SCORES, pl.DataFrame(rows, schema=SCHEMAS[SCORES], orient="row"))
    limit = Limit(quantity="throughput", scenario="chat", bound=1.5, relative_to="parent")
    config = MipStage(
        target_name="made",
        requirements=Requirements(limits=(limit,), pins=()),
        search=recipe.search,
        profile=recipe.block_profile,
    )
    inputs = StageInputs(
        artifacts={"block_scores": scores_dir, "block_profile": artifact.path},
        store_root=workspace.store.root,
        downloads=workspace.downloads,
    )
    result = mip_solution.run(config, inputs, tmp_path / "solution")
    assert result.metrics["num_violated_limits"] == 0
    assert read_solution(tmp_path / "solution").limits[0].predicted >= 1.5


def test_identity_of_a_roofline_names_no_machine_and_that_of_a_measurement_does(workspace: Workspace):
    target = workspace.recipe.default_target
    computed = stage_identity(workspace, STAGE, target)
    measured = stage_identity(replace(workspace, recipe=load_recipe("tiny")), STAGE, target)
    assert "hardware" not in computed
    assert "hardware" in measured
    other = stage_identity(replace(workspace, recipe=roofline_recipe(device="h200-141gb")), STAGE, target)
    assert computed["config"] != other["config"]


def test_roofline_of_this_machine_is_measured_here_and_says_so(workspace: Workspace):
    target = workspace.recipe.default_target
    here = replace(workspace, recipe=roofline_recipe(device=THIS_MACHINE, served_precision="fp32"))
    assert "hardware" in stage_identity(here, STAGE, target)
    artifact = materialize(here, STAGE.name, target=target).artifact
    facts = artifact.record.result.facts
    assert facts["runtime"] == "roofline of this machine"
    rates = [float(facts[name].split()[0].replace(",", "")) for name in ("matmul peak", "bandwidth", "empty kernel")]
    # GFLOP/s, GB/s and microseconds of any processor of these years, in fp32.
    assert 1 < rates[0] < 1e6
    assert 0.5 < rates[1] < 1e5
    assert 0.05 < rates[2] < 1e4
    assert (facts["dtype"], facts["threads"]) == ("fp32", str(here.recipe.block_profile.num_threads))
    times = read_table(artifact.path, PROFILE)
    widths = dict(
        times.filter((pl.col("phase") == "prefill") & (pl.col("part") == "ffn")).select("variant", "time_ms").rows()
    )
    assert widths["ffn192"] > widths["ffn96"] > widths["no_op"] == 0.0


@pytest.mark.parametrize("changes", [{"tensor_parallel_size": 2}, {"served_precision": "bf16"}])
def test_this_machine_is_one_device_and_computes_in_the_precision_of_timings(changes: dict[str, Any]):
    with pytest.raises(RecipeError, match="this-machine is measured alone, and in the precision"):
        roofline_recipe(device=THIS_MACHINE, **changes)
