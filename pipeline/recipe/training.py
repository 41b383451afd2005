"""Distillation, continued pre-training, fine-tuning and reinforcement learning of a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.architecture import Frozen
from pipeline.recipe.types import Name, NonNegativeFloat, Positive, PositiveFloat, Precision, Ratio


class OptimizerConfig(Frozen):
    """AdamW with linear warm-up and a cosine or constant schedule."""

    learning_rate: PositiveFloat
    min_learning_rate_ratio: Ratio
    warmup_ratio: Ratio
    schedule: Literal["cosine", "constant"]
    weight_decay: NonNegativeFloat
    betas: tuple[Ratio, Ratio]
    max_grad_norm: PositiveFloat


class LongContextPhase(Frozen):
    """A later part of a training, on the mixture's windows of that length.

    It starts from the weights of the part before with an optimizer of its own: the same settings and schedule, at this
    learning rate.
    """

    sequence_length: Positive
    tokens: Positive
    global_batch_size: Positive
    learning_rate: PositiveFloat


class DistillationConfig(Frozen):
    """Knowledge distillation: cosine on hidden states plus KL on logits (Puzzle, equation 1)."""

    tokens: Positive
    global_batch_size: Positive
    long_context: tuple[LongContextPhase, ...]
    cosine_weight: NonNegativeFloat
    kl_weight: NonNegativeFloat
    optimizer: OptimizerConfig
    precision: Precision


class PretrainingConfig(Frozen):
    """Continued pre-training: next-token cross-entropy."""

    tokens: Positive
    global_batch_size: Positive
    long_context: tuple[LongContextPhase, ...]
    optimizer: OptimizerConfig
    precision: Precision


class SFTStage(Frozen):
    """One stage of fine-tuning, on one blend of the toggle dataset, with an optimizer of its own.

    With `shuffle` the blend is gone through as often as the tokens ask for, reshuffled every epoch; without, it is read
    once in its own order.
    """

    blend: Name
    shuffle: bool
    tokens: Positive
    global_batch_size: Positive
    optimizer: OptimizerConfig


class SFTConfig(Frozen):
    """Supervised fine-tuning on the assistant's tokens, end token included; each stage starts from the one before."""

    stages: Annotated[tuple[SFTStage, ...], Field(min_length=1)]
    precision: Precision
    seed: int


class RLConfig(Frozen):
    """Group-relative policy optimisation on verifiable rewards (Llama-Nemotron, section 5)."""

    steps: Positive
    prompts_per_step: Positive
    samples_per_prompt: Annotated[int, Field(ge=2)]
    max_new_tokens: Positive
    temperature: PositiveFloat
    share_thinking_on: Ratio
    updates_per_rollout: Positive
    baseline: Literal["leave_one_out", "group_mean"]
    normalise_by_std: bool
    clip_low: PositiveFloat
    clip_high: PositiveFloat
    kl_weight: NonNegativeFloat
    accuracy_reward: NonNegativeFloat
    format_reward: NonNegativeFloat
    optimizer: OptimizerConfig
    precision: Precision
    seed: int
