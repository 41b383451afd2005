"""What a stage needs beside its inputs, looked for before anything runs: days of training may lie before its turn."""

import importlib.util
import math

from pipeline.recipe import Recipe, RLConfig
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


def training_batches(recipe: Recipe) -> list[tuple[str, str, int, int, int]]:
    """Return every part of a training: stage, key of its batch, rows of a batch, tokens of a window, all tokens."""
    distilled, pretrained = recipe.distillation_mix.sequence_length, recipe.pretraining_mix.sequence_length
    found = [
        ("kd_checkpoint", "kd", recipe.kd.global_batch_size, distilled, recipe.kd.tokens),
        ("cpt_checkpoint", "cpt", recipe.cpt.global_batch_size, pretrained, recipe.cpt.tokens),
    ]
    for index, part in enumerate(recipe.sft.stages):
        window = recipe.reasoning_toggle_dataset.sequence_length
        found.append(("sft_checkpoint", f"sft.stages[{index}]", part.global_batch_size, window, part.tokens))
    for stage, config in (("kd", recipe.kd), ("cpt", recipe.cpt)):
        for index, phase in enumerate(config.long_context):
            key = f"{stage}.long_context[{index}]"
            found.append((f"{stage}_checkpoint", key, phase.global_batch_size, phase.sequence_length, phase.tokens))
    return found


def refused_settings(stage: Stage, *, recipe: Recipe, execution: ExecutionSettings) -> list[str]:
    """Return why a training would refuse to start, each in one sentence; nothing for a stage that trains no model."""
    # Without processes of their own, trainings are a world of one, whatever num_ranks says.
    num_ranks = 1 if execution.launcher == "in_process" else execution.num_ranks
    found: list[str] = []
    for name, key, batch, length, tokens in training_batches(recipe):
        if name != stage.name:
            continue
        if batch % num_ranks:
            found.append(
                f"ranks: {key}.global_batch_size is {batch}, which {num_ranks} ranks do "
                f"not divide: run with {math.gcd(batch, num_ranks)}, or change the batch"
            )
        if tokens < batch * length:
            found.append(
                f"data: {key}.tokens is {tokens:,}, less than one step of {batch * length:,} tokens ({batch} windows "
                f"of {length:,}): raise the tokens or lower global_batch_size"
            )
    for key, config in (("kd", recipe.kd), ("cpt", recipe.cpt), ("sft", recipe.sft), ("rl", recipe.rl)):
        if stage.name == f"{key}_checkpoint" and config.precision == "bf16" and execution.zero_stage == 0:
            found.append(f"precision: {key} trains in bf16, which ZeRO stage 0 does wrongly: set zero_stage to 1")
    if stage.name == "rl_checkpoint":
        found += _refused_by_rl(recipe.rl, zero_stage=execution.zero_stage, num_ranks=num_ranks)
    return found


def _refused_by_rl(config: RLConfig, *, zero_stage: int, num_ranks: int) -> list[str]:
    found: list[str] = []
    if zero_stage == 3:
        found.append(
            "ZeRO: rl_checkpoint samples from the whole model on every rank and refuses execution.zero_stage 3: run it "
            "with 2 or less, or make what comes before it alone: `make materialize TARGET=... SELECT='*sft_checkpoint'`"
        )
    per_prompt = 1 if config.algorithm.kind == "rpo" else config.samples_per_prompt
    rows_per_rank = config.prompts_per_step // num_ranks * per_prompt
    if rows_per_rank % config.updates_per_rollout:
        found.append(
            f"ranks: a rollout has {rows_per_rank} samples per rank, which rl.updates_per_rollout = "
            f"{config.updates_per_rollout} does not divide: change one of them"
        )
    if config.prompts_per_step % num_ranks:
        found.append(
            f"ranks: rl.prompts_per_step is {config.prompts_per_step}, which {num_ranks} ranks do not "
            "divide: change one of them"
        )
    return found
