"""A small reinforcement learning: its config, a policy that often ends its turn, prompts, and a stage's inputs."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import write_atomically
from pipeline.model.checkpoint import TensorReader, read_architecture, save_checkpoint
from pipeline.progress import Reporter, SilentReporter
from pipeline.reasoning.prompts import PROMPTS_FILE, RLItem, prompts_text
from pipeline.recipe import GRPO, HeldOutRewardConfig, OptimizerConfig, RLConfig, StopRulesConfig
from pipeline.stage import ExecutionSettings, StageInputs

CONFIG = RLConfig(
    algorithm=GRPO(
        kind="grpo", baseline="leave_one_out", normalise_by_std=True, clip_low=0.2, clip_high=0.28, kl_weight=0.01
    ),
    steps=3,
    prompts_per_step=4,
    samples_per_prompt=6,
    max_new_tokens=10,
    temperature=1.0,
    share_thinking_on=0.25,
    updates_per_rollout=2,
    max_importance_weight=2.0,
    accuracy_reward=1.0,
    format_reward=0.2,
    instruction_reward="share",
    reward_model=None,
    difficulty=None,
    held_out=HeldOutRewardConfig(num_prompts=2, interval_steps=2),
    stop=StopRulesConfig(patience_steps=5, min_entropy_nats=0.001, max_kl_nats=5.0, max_held_out_drop=1.0),
    optimizer=OptimizerConfig(
        learning_rate=1e-3,
        min_learning_rate_ratio=1.0,
        warmup_ratio=0.0,
        schedule="constant",
        weight_decay=0.0,
        betas=(0.9, 0.95),
        max_grad_norm=1.0,
    ),
    precision="fp32",
    seed=6,
)


def rl_artifacts(root: Path, *, parent_dir: Path, items: Sequence[RLItem]) -> dict[str, Path]:
    tensors = dict(TensorReader(parent_dir))
    tensors["model.embed_tokens.weight"][2] *= 6
    save_checkpoint(root / "sft", architecture=read_architecture(parent_dir), tensors=tensors, tokenizer_dir=parent_dir)
    write_atomically(root / "prompts" / PROMPTS_FILE, prompts_text(items).encode())
    return {"sft_checkpoint": root / "sft", "rl_prompts": root / "prompts"}


def rl_inputs(
    artifacts: dict[str, Path],
    *,
    reporter: Reporter | None = None,
    zero_stage: int = 1,
    micro_batch_size: int = 4,
    checkpoint_interval_steps: int = 2,
    sample_interval_steps: int = 10,
    recompute_activations: bool = False,
) -> StageInputs:
    return StageInputs(
        artifacts=artifacts,
        store_root=artifacts["rl_prompts"],
        downloads=artifacts["rl_prompts"],
        execution=ExecutionSettings.model_validate(
            {
                "micro_batch_size": micro_batch_size,
                "checkpoint_interval_steps": checkpoint_interval_steps,
                "sample_interval_steps": sample_interval_steps,
                "zero_stage": zero_stage,
                "recompute_activations": recompute_activations,
                "num_threads": 1,
            }
        ),
        reporter=reporter or SilentReporter(),
    )
