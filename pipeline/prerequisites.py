"""What a stage needs beside its inputs, looked for before anything runs: days of training may lie before its turn."""

import importlib.util

from pipeline.recipe import Recipe
from pipeline.runtimes import RuntimeMissingError, require_python, runtime_ids
from pipeline.stage import ExecutionSettings
from pipeline.stages.launch import missing_allocation
from pipeline.stages.registry import Stage

_EVALUATIONS = ("parent_evaluation", "evaluation")


def missing_runtimes(stage: Stage, *, recipe: Recipe, execution: ExecutionSettings) -> dict[str, str]:
    """Return what a stage runs in and what is not installed here: by name, what for and how to install it."""
    found: dict[str, str] = {}
    for backend in stage.measures_in(recipe):
        try:
            runtime_ids((backend,))
        except RuntimeMissingError as err:
            found[backend] = f"{stage.name} measures in {backend}, and {err}"
    if stage.name == "rl_checkpoint" and execution.sampler == "vllm":
        try:
            require_python("vllm")
        except RuntimeMissingError as err:
            found["vllm"] = f"{stage.name} samples with vllm (execution.sampler), and {err}, or set sampler to torch"
    # Looked for and not imported: with what it imports it takes seconds, in every process that runs one asset.
    if stage.name in _EVALUATIONS and recipe.evaluation.lm_eval is not None and not importlib.util.find_spec("lm_eval"):
        found["lm-eval"] = (
            f"{stage.name} asks lm-eval (evaluation.lm_eval), which is not installed: run `make install-lm-eval`, or "
            "set evaluation.lm_eval to null"
        )
    return found


def missing_nodes(stage: Stage, *, execution: ExecutionSettings) -> str | None:
    """Return why the ranks of a stage cannot be started from here, or None."""
    told = missing_allocation(execution) if stage.runs_on_all_ranks else None
    return None if told is None else f"{stage.name} starts its ranks by srun (execution.launcher is slurm), and {told}"


def refused_settings(stage: Stage, *, execution: ExecutionSettings) -> str | None:
    """Return why a stage would refuse the execution settings, or None."""
    if stage.name == "rl_checkpoint" and execution.zero_stage == 3:
        return (
            "rl_checkpoint samples from the whole model on every rank and refuses execution.zero_stage 3: run it with "
            "2 or less, or make what comes before it alone: `make materialize TARGET=... SELECT='*sft_checkpoint'`"
        )
    return None
