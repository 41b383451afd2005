"""rl_checkpoint: reinforcement learning on verifiable rewards, from the supervised checkpoint.

    python -m pipeline materialize rl_checkpoint          # on every rank that the execution settings name

Policy and sampler are one model, or vLLM samples with the policy's weights (`execution.sampler`). The reference is the
supervised checkpoint, frozen, in the same precision, so that the KL begins at zero. For on-policy distillation it is
the parent, the teacher, and the KL to it is published as `kl_to_teacher`, not as `final_kl`. A training that a stop
rule ended is published, for people to look at, and fails its check.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import torch

from pipeline.errors import StageError
from pipeline.model.checkpoint import TORCH_DTYPES, load_model, load_tokenizer
from pipeline.reasoning.experience import longest_prompt
from pipeline.reasoning.prompts import load_prompts
from pipeline.reasoning.reward_model import RewardModel
from pipeline.reasoning.rl import PolicyTraining, train_policy, units_per_update
from pipeline.reasoning.samplers import OwnSampler, Sampler, VLLMSampler
from pipeline.recipe import OnPolicyDistillation, RLConfig
from pipeline.stage import WORK_DIR, StageInputs, StageResult, Table
from pipeline.stages.training_figures import with_curve
from pipeline.training.distributed import init_distributed
from pipeline.training.fitting import export_checkpoint, open_engine, prepare_process, training_facts
from pipeline.training.metrics import write_curve

SAMPLES_FILE = "rollout_samples.parquet"
_NUM_SHOWN = 16


def run(config: RLConfig, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Train sft_checkpoint on rl_prompts."""
    if inputs.execution.zero_stage == 3:
        raise StageError(
            "execution.zero_stage is 3 for rl_checkpoint: its ranks sample replies of different lengths, and sharded "
            "weights would make them wait for each other forever; set zero_stage to 2 or less"
        )
    device = prepare_process(inputs.execution)
    start_dir = inputs["sft_checkpoint"]
    engine = open_engine(
        start_dir,
        optimizer=config.optimizer,
        total_steps=config.steps * config.updates_per_rollout,
        precision=config.precision,
        execution=inputs.execution,
        global_batch_size=units_per_update(config, world_size=init_distributed().world_size),
    )
    is_distillation = isinstance(config.algorithm, OnPolicyDistillation)
    reference = load_model(
        inputs["parent_checkpoint"] if is_distillation else start_dir, dtype=TORCH_DTYPES[config.precision]
    )
    torch.nn.Module.to(reference, device)
    tokenizer, items = load_tokenizer(start_dir), load_prompts(inputs["rl_prompts"])
    try:
        with contextlib.ExitStack() as opened:
            sampler: Sampler = OwnSampler(engine.model)
            if inputs.execution.sampler == "vllm":
                sampler = opened.enter_context(
                    VLLMSampler(
                        engine.model,
                        tokenizer_dir=start_dir,
                        work_dir=out_dir / WORK_DIR / f"vllm-{engine.rank}",
                        precision=config.precision,
                        max_tokens=longest_prompt(items, tokenizer=tokenizer) + config.max_new_tokens,
                        num_rows=config.prompts_per_step * config.samples_per_prompt // engine.world_size,
                        num_threads=torch.get_num_threads(),
                    )
                )
            training = train_policy(
                engine,
                sampler=sampler,
                reference=reference,
                tokenizer=tokenizer,
                reward_model=None if config.reward_model is None else RewardModel(config.reward_model, device=device),
                items=items,
                config=config,
                work_dir=out_dir / WORK_DIR,
                checkpoint_interval_steps=inputs.execution.checkpoint_interval_steps,
                sample_interval_steps=inputs.execution.sample_interval_steps,
                reporter=inputs.reporter,
            )
        export_checkpoint(engine, start_dir=start_dir, out_dir=out_dir)
        if engine.rank == 0:
            write_curve(out_dir, training.curve)
            pl.DataFrame(training.samples).write_parquet(out_dir / SAMPLES_FILE)
        facts = {**training_facts(engine), "sampler": inputs.execution.sampler}
    finally:
        engine.close()
    result = _result(training, kl_name="kl_to_teacher" if is_distillation else "final_kl", facts=facts)
    return with_curve(result, asset="rl_checkpoint", curve=training.curve, out_dir=out_dir)


def _result(training: PolicyTraining, *, kl_name: str, facts: dict[str, str]) -> StageResult:
    first, last, at_end = training.curve[0], training.curve[-1], training.held_out
    columns = tuple(last)
    shown = ("step", "task", "mode", "question", "completion", "answer", "reward")
    return StageResult(
        metrics={
            "num_steps": len(training.curve),
            "num_samples": training.num_samples,
            "num_sampled_tokens": int(last["tokens"]),
            kl_name: training.final_kl,
            "num_stops": int(training.stopped is not None),
            "held_out_reward_first": first["held_out_reward"],
            "held_out_reward_last": at_end["held_out_reward"],
            "held_out_accuracy_first": first["held_out_accuracy"],
            "held_out_accuracy_last": at_end["held_out_accuracy"],
            "reward_first": first["reward"],
            "reward_last": last["reward"],
            "accuracy_first": first["accuracy"],
            "accuracy_last": last["accuracy"],
            "format_rate_first": first["format_rate"],
            "format_rate_last": last["format_rate"],
            "truncation_rate_last": last["truncation_rate"],
            "share_zero_advantage_groups_last": last["share_zero_advantage_groups"],
            "max_sampler_mismatch_nats": max(row["sampler_mismatch_nats"] for row in training.curve),
            "num_verifier_errors": int(sum(row["num_verifier_errors"] for row in training.curve)),
        },
        facts={**facts, "stopped": training.stopped or "no"},
        tables={
            **_held_out_table(first, at_end),
            **({"pass_rates": _pass_rates_table(training.pass_rates)} if training.pass_rates else {}),
            "training_curve": Table.of(columns, [[row[column] for column in columns] for row in training.curve]),
            "samples": Table.of(shown, [[sample[name] for name in shown] for sample in training.samples[-_NUM_SHOWN:]]),
        },
    )


def _held_out_table(first: Mapping[str, float], last: Mapping[str, float]) -> dict[str, Table]:
    """What each kind of prompt earned before training and at its end; nothing where there is one kind."""
    names = ("held_out_reward_", "held_out_accuracy_")
    kinds = sorted(name.removeprefix(names[0]) for name in first if name.startswith(names[0]))
    columns = ("prompts", "reward, first", "reward, last", "accuracy, first", "accuracy, last")
    rows = [(kind, *(row[name + kind] for name in names for row in (first, last))) for kind in kinds]
    return {"held_out": Table.of(columns, rows)} if rows else {}


def _pass_rates_table(pass_rates: tuple[float, ...]) -> Table:
    """How many prompts the starting checkpoint solves how often."""
    counts = Counter(pass_rates)
    return Table.of(("pass_rate", "num_prompts"), [(rate, counts[rate]) for rate in sorted(counts)])
