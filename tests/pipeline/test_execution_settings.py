"""Execution settings that are refused: files that cannot be read, keys and values that mean nothing together."""

from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.execution import load_execution
from pipeline.stage import ExecutionSettings


@pytest.mark.parametrize(
    "text", ["launcher: rocket\n", "ranks: 2\n", "num_ranks: 0\n", "- a list\n", "zero_stage: [\n", ""]
)
def test_execution_settings_that_cannot_be_read_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "execution.yaml"
    path.write_text(text)

    with pytest.raises(RecipeError, match="REFIT_EXECUTION is"):
        load_execution(str(path))


def test_execution_settings_missing_are_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="REFIT_EXECUTION is"):
        load_execution(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_nodes": 2, "num_ranks": 2}, "num_nodes is 2, which takes launcher: slurm; got local"),
        ({"launcher": "slurm", "num_nodes": 2, "num_ranks": 3}, "num_ranks is 3, which num_nodes = 2 does not divide"),
    ],
)
def test_nodes_that_ranks_cannot_be_spread_over_are_refused(settings: dict[str, object], told: str):
    with pytest.raises(ValueError, match=told):
        ExecutionSettings.model_validate(settings)
