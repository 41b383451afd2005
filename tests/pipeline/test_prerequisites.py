"""What a run is refused for before it starts: runtimes that are not there, settings that a later stage refuses."""

import sys
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.execution import require_runtimes
from pipeline.recipe_file import load_recipe
from pipeline.runtimes import RuntimeMissingError
from pipeline.stage import ExecutionSettings


def test_run_that_samples_with_a_missing_vllm_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REFIT_RUNTIMES", str(tmp_path / "none"))
    recipe, execution = load_recipe("tiny"), ExecutionSettings(sampler="vllm")

    with pytest.raises(RuntimeMissingError, match=r"rl_checkpoint samples with vllm .* make install-vllm"):
        require_runtimes(recipe, ["kd_checkpoint", "rl_checkpoint"], execution=execution)
    require_runtimes(recipe, ["kd_checkpoint", "sft_checkpoint"], execution=execution)
    (tmp_path / "none" / "vllm" / "bin").mkdir(parents=True)
    (tmp_path / "none" / "vllm" / "bin" / "python").touch()
    require_runtimes(recipe, ["rl_checkpoint"], execution=execution)


def test_run_at_a_zero_stage_that_a_later_stage_refuses_is_refused_before_it_starts():
    recipe = load_recipe("tiny")

    with pytest.raises(StageError, match=r"rl_checkpoint .* refuses execution\.zero_stage 3: run it with 2"):
        require_runtimes(recipe, ["kd_checkpoint", "rl_checkpoint"], execution=ExecutionSettings(zero_stage=3))
    require_runtimes(recipe, ["kd_checkpoint", "sft_checkpoint"], execution=ExecutionSettings(zero_stage=3))
    require_runtimes(recipe, ["rl_checkpoint"], execution=ExecutionSettings(zero_stage=2))


def test_run_that_asks_a_missing_lm_eval_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where the extra is not installed
    asking = load_recipe("smol-full")
    assert asking.evaluation.lm_eval is not None

    with pytest.raises(RuntimeMissingError, match=r"parent_evaluation asks lm-eval .* `make install-lm-eval`"):
        require_runtimes(asking, ["corpora", "parent_evaluation"], execution=ExecutionSettings())
    require_runtimes(asking, ["corpora", "kd_checkpoint"], execution=ExecutionSettings())
    require_runtimes(load_recipe("tiny"), ["parent_evaluation", "evaluation"], execution=ExecutionSettings())
