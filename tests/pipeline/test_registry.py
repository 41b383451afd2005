"""The registry: consistent in itself, with the recipe, and with the code that it names."""

import importlib
import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.architecture import Frozen
from pipeline.errors import RecipeError
from pipeline.fingerprint import fingerprint
from pipeline.recipe_file import load_recipe
from pipeline.stages import code_record
from pipeline.stages.checks import Check
from pipeline.stages.registry import BY_NAME, STAGES, Stage, get_stage

CHECK = Check(name="c", metric="m", comparison="<=", bound=1.0, blocking=True, description="d")


def test_stage_names_differ():
    assert len(BY_NAME) == len(STAGES)


def test_stage_unknown_lists_the_known():
    with pytest.raises(RecipeError, match=r"no stage 'nope'; the stages are parent_checkpoint, corpora"):
        get_stage("nope")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stage_config_is_a_frozen_model_that_can_be_fingerprinted(stage: Stage):
    recipe = load_recipe("tiny")

    config = stage.config(recipe, recipe.default_target)

    assert isinstance(config, Frozen)
    assert fingerprint(config) == fingerprint(type(config).model_validate(config.model_dump(mode="json")))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stage_shared_by_targets_reads_nothing_of_one(stage: Stage):
    recipe = load_recipe("tiny")
    if not stage.per_target:
        assert stage.config(recipe, "fused") == stage.config(recipe, "light")


@pytest.mark.parametrize("name", ["mip_solution", "child_checkpoint", "speed_report", "report", "model_card"])
def test_stage_with_unknown_target_names_the_known(name: str):
    with pytest.raises(RecipeError, match="no target 'nope'; it has fused, light"):
        get_stage(name).config(load_recipe("tiny"), "nope")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stage_module_exists_and_is_named_after_its_asset(stage: Stage):
    assert stage.module == f"pipeline.stages.{stage.name}"
    assert importlib.util.find_spec(stage.module) is not None


def test_stage_that_trains_runs_in_a_process_of_its_own():
    assert all(stage.in_child for stage in STAGES if stage.trains)


@pytest.mark.parametrize(
    ("comparison", "value", "passes"),
    [("<=", 1.0, True), ("<=", 1.1, False), (">=", 1.0, True), (">=", 0.9, False), ("==", 1.0, True), ("==", 2, False)],
)
def test_check_compares_with_its_bound(comparison: str, value: float, passes: bool):
    assert replace(CHECK, comparison=comparison).passes(value, recipe=load_recipe("tiny")) is passes


@pytest.mark.parametrize("comparison", ["<=", ">=", "=="])
def test_check_of_nan_never_passes(comparison: str):
    assert not replace(CHECK, comparison=comparison).passes(math.nan, recipe=load_recipe("tiny"))


def test_check_bound_may_come_from_the_recipe():
    recipe = load_recipe("tiny")
    check = replace(CHECK, bound=lambda thresholds: thresholds.max_rl_kl)

    assert check.bound_for(recipe) == recipe.thresholds.max_rl_kl


def test_code_is_what_was_recorded():
    recorded, current = code_record.recorded_code(), code_record.current_code()
    changed = [name for name in current if recorded.get(name) != current[name]]

    assert not changed, (
        "this code is not what code_record.json records; of these versions, raise every one whose code now computes "
        f"something else: {'; '.join(code_record.version_to_raise(name) for name in changed)}. Then run "
        "`.venv/bin/python -m pipeline.stages.code_record`"
    )
    assert recorded.keys() == current.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pipeline.puzzle.library.BLD_VERSION", "BLD_VERSION in pipeline/puzzle/library.py"),
        ("pipeline.evaluation.suite.HARNESS_VERSION", "HARNESS_VERSION in pipeline/evaluation/suite.py"),
        ("kd_checkpoint", "version of kd_checkpoint in pipeline/stages/registry.py"),
    ],
)
def test_version_to_raise_says_where_it_stands(name: str, expected: str):
    assert code_record.version_to_raise(name) == expected


@pytest.mark.parametrize(("name", "module"), code_record.CONSTANTS.items())
def test_constant_is_the_one_its_module_has_and_is_reached_by_what_it_guards(name: str, module: str):
    owner, _, constant = name.rpartition(".")

    assert code_record.current_code()[name]["version"] == getattr(importlib.import_module(owner), constant)
    assert owner in code_record.reachable_modules(module)


def test_source_hash_ignores_comments_docstrings_and_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = _hash_of('"""Doc."""\n\n# why\nX = 1  # because\n', tmp_path / "a", monkeypatch)
    second = _hash_of('"""Another."""\nX = 1\n', tmp_path / "b", monkeypatch)
    third = _hash_of("X = 2\n", tmp_path / "c", monkeypatch)

    assert first == second
    assert first != third


def test_source_hash_follows_imports_inside_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = "def f():\n    from pipeline.inner import Y\n    return Y\n"
    first = _hash_of(module, tmp_path / "a", monkeypatch, inner="Y = 1\n")
    second = _hash_of(module, tmp_path / "b", monkeypatch, inner="Y = 2\n")

    assert first != second


def test_source_hash_follows_what_a_module_reads_or_runs_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def hashed(place: str, *, page: str = "a page", program: str = "Z = 1\n") -> str:
        (tmp_path / place / "pipeline").mkdir(parents=True)
        (tmp_path / place / "pipeline" / "page.j2").write_text(page)
        (tmp_path / place / "pipeline" / "program.py").write_text(program)
        module = "from pipeline.inner import Y\n"
        return _hash_of(module, tmp_path / place, monkeypatch, inner="Y = 1\n")

    alone = hashed("alone")
    monkeypatch.setattr(
        code_record, "BY_PATH", {"pipeline.inner": "pipeline/pro*.py", "pipeline.outer": "pipeline/*.j2"}
    )
    first = hashed("a")
    assert len({alone, first, hashed("b", page="another"), hashed("c", program="Z = 2\n")}) == 4
    assert hashed("d", program="# why\nZ = 1\n") == first

    monkeypatch.setattr(code_record, "BY_PATH", {"pipeline.outer": "pipeline/*.moved"})
    with pytest.raises(FileNotFoundError, match=r"pipeline\.outer reads pipeline/\*\.moved"):
        hashed("e")


def test_every_file_that_no_import_names_is_recorded_with_the_module_that_reads_it():
    root = code_record.PACKAGE_ROOT / "pipeline"
    recorded = {file for module in code_record.BY_PATH for file in code_record.files_by_path(module)}
    by_value = (root / "recipes", root / "architectures")
    found = {
        file
        for file in root.rglob("*")
        if file.is_file()
        and file.suffix not in (".py", ".pyc")
        and file != code_record.RECORD
        and file.parent not in by_value
    }
    assert found <= recorded
    assert root / "reasoning" / "grader.py" in recorded
    for module in code_record.BY_PATH:
        assert any(module in code_record.reachable_modules(stage.module) for stage in STAGES), module


def _hash_of(text: str, root: Path, monkeypatch: pytest.MonkeyPatch, *, inner: str = "") -> str:
    (root / "pipeline").mkdir(parents=True, exist_ok=True)
    (root / "pipeline" / "outer.py").write_text(text)
    (root / "pipeline" / "inner.py").write_text(inner)
    monkeypatch.setattr(code_record, "PACKAGE_ROOT", root)
    code_record._imports.cache_clear()
    code_record._code.cache_clear()
    try:
        return code_record.source_hash("pipeline.outer")
    finally:
        code_record._imports.cache_clear()
        code_record._code.cache_clear()


def test_a_renamed_recipe_changes_what_prints_its_name_and_nothing_else():
    recipe = load_recipe("tiny")
    renamed = recipe.model_copy(update={"name": "mine", "description": "Mine."})
    target = recipe.default_target
    changed = [stage.name for stage in STAGES if stage.config(recipe, target) != stage.config(renamed, target)]
    assert changed == ["model_card", "report"]
