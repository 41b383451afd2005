"""A store with the first stages of the tiny recipe, made once and copied for every test."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.artifacts import ArtifactStore
from pipeline.execution import Workspace, materialize
from pipeline.recipe_file import load_recipe
from pipeline.stage import ExecutionSettings

MADE = ("parent_checkpoint", "corpora", "evaluation_sets", "distillation_mix", "pretraining_mix")
TARGET = "fused"


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    home = tmp_path_factory.mktemp("inspected")
    workspace = Workspace(
        recipe=load_recipe("tiny"),
        recipe_given="tiny",
        store=ArtifactStore(home / "store"),
        downloads=home / "downloads",
        execution=ExecutionSettings(launcher="in_process"),
    )
    for stage_name in MADE:
        materialize(workspace, stage_name, TARGET)
    return workspace


@pytest.fixture
def workspace(made_once: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(made_once.store.root, tmp_path / "store")
    return replace(made_once, store=ArtifactStore(tmp_path / "store"))
