"""What a run is refused for before it starts: runtimes that are not there, settings that a later stage refuses."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StageError
from pipeline.execution import Workspace, require_runtimes
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.runtimes import RuntimeMissingError
from pipeline.stage import ExecutionSettings
from tests.dagster.stores import open_tiny, publish_all


def opened(tmp_path: Path, *, recipe: Recipe | None = None, **execution: Any) -> Workspace:
    return replace(open_tiny(tmp_path, recipe=recipe), execution=ExecutionSettings(**execution))


def test_run_that_samples_with_a_missing_vllm_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REFIT_RUNTIMES", str(tmp_path / "none"))
    workspace = opened(tmp_path, sampler="vllm")

    with pytest.raises(RuntimeMissingError, match=r"rl_checkpoint samples with vllm .* make install-vllm"):
        require_runtimes(workspace, ["kd_checkpoint", "rl_checkpoint"], target="fused")
    require_runtimes(workspace, ["kd_checkpoint", "sft_checkpoint"], target="fused")
    (tmp_path / "none" / "vllm" / "bin").mkdir(parents=True)
    (tmp_path / "none" / "vllm" / "bin" / "python").touch()
    require_runtimes(workspace, ["rl_checkpoint"], target="fused")


@pytest.mark.parametrize(
    ("changes", "execution", "stage", "told"),
    [
        ({}, {"zero_stage": 3}, "rl_checkpoint", r"rl_checkpoint .* refuses execution\.zero_stage 3: run it with 2"),
        ({"sft": {"precision": "bf16"}}, {"zero_stage": 0}, "sft_checkpoint", "sft trains in bf16, which ZeRO stage 0"),
        ({}, {"num_ranks": 8}, "kd_checkpoint", "kd.global_batch_size is 4, which 8 ranks do not divide: run with 4"),
        ({}, {"num_ranks": 8}, "rl_checkpoint", "rl.prompts_per_step is 4, which 8 ranks do not divide"),
        ({"cpt": {"tokens": 511}}, {}, "cpt_checkpoint", "cpt.tokens is 511, less than one step of 512 tokens"),
        ({"rl": {"updates_per_rollout": 3}}, {}, "rl_checkpoint", "a rollout has 16 samples per rank"),
    ],
)
def test_run_whose_settings_a_later_stage_refuses_is_refused_before_it_starts(
    changes: dict[str, dict[str, object]], execution: dict[str, object], stage: str, told: str, tmp_path: Path
):
    shipped = load_recipe("tiny")
    recipe = shipped.model_copy(
        update={key: getattr(shipped, key).model_copy(update=inner) for key, inner in changes.items()}
    )
    workspace = opened(tmp_path, recipe=recipe, **execution)

    with pytest.raises(StageError, match=f"none is started:\n(.*\n)*.*{told}"):
        require_runtimes(workspace, ["corpora", stage], target="fused")
    require_runtimes(workspace, ["corpora", "block_library", "fused_checkpoint"], target="fused")
    require_runtimes(opened(tmp_path), ["corpora", stage], target="fused")


def test_run_is_refused_for_everything_at_once(tmp_path: Path):
    workspace = opened(tmp_path, num_ranks=8, zero_stage=3)

    with pytest.raises(StageError) as refused:
        require_runtimes(workspace, ["kd_checkpoint", "rl_checkpoint"], target="fused")
    kinds = [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]]
    assert kinds == ["ranks", "ZeRO", "ranks"]


def test_settings_are_not_refused_for_a_stage_that_is_done_or_runs_in_this_process(tmp_path: Path):
    workspace = opened(tmp_path, num_ranks=8)
    publish_all(workspace, target="fused")

    require_runtimes(workspace, ["kd_checkpoint"], target="fused")
    with pytest.raises(StageError, match="which 8 ranks do not divide"):
        require_runtimes(workspace, ["kd_checkpoint"], target="light")
    require_runtimes(opened(tmp_path, num_ranks=8, launcher="in_process"), ["kd_checkpoint"], target="light")


def test_run_that_asks_a_missing_lm_eval_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where the extra is not installed
    asking = opened(tmp_path, recipe=load_recipe("smol-full"))
    assert asking.recipe.evaluation.lm_eval is not None

    with pytest.raises(RuntimeMissingError, match=r"parent_evaluation asks lm-eval .* `make install-lm-eval`"):
        require_runtimes(asking, ["corpora", "parent_evaluation"], target="fused")
    require_runtimes(asking, ["corpora", "kd_checkpoint"], target="fused")
    require_runtimes(opened(tmp_path), ["parent_evaluation", "evaluation"], target="fused")
