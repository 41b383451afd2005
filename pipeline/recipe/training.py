"""Distillation, continued pre-training, fine-tuning and reinforcement learning of a recipe."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

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
    once in its own order. `replay_share` of the windows are text of the pre-training mixture, evenly between the rest:
    what is not rehearsed is forgotten.
    """

    blend: Name
    shuffle: bool
    replay_share: Annotated[float, Field(ge=0, lt=1)]
    tokens: Positive
    global_batch_size: Positive
    optimizer: OptimizerConfig


class SFTConfig(Frozen):
    """Supervised fine-tuning on the assistant's tokens, end token included; each stage starts from the one before."""

    stages: Annotated[tuple[SFTStage, ...], Field(min_length=1)]
    precision: Precision
    seed: int


class GRPO(Frozen):
    """Group-relative policy optimisation; a higher `clip_high` than `clip_low` is "clip higher" (DAPO)."""

    kind: Literal["grpo"]
    baseline: Literal["leave_one_out", "group_mean"]
    normalise_by_std: bool
    clip_low: PositiveFloat
    clip_high: PositiveFloat
    kl_weight: NonNegativeFloat


class RLOO(Frozen):
    """REINFORCE with a leave-one-out baseline, the KL to the start in the reward; one update per rollout."""

    kind: Literal["rloo"]
    kl_weight: NonNegativeFloat


RPODivergence = Literal["squared", "backward_kl", "forward_kl"]


class RPO(Frozen):
    """Reward-aware preference optimisation on the best and the worst sample of each group.

    Online the policy samples; offline the checkpoint that training starts from does, throughout, and the KL that is
    reported and bounded is that of the checkpoint to the policy. `max_importance_weight` bounds nothing here.
    """

    kind: Literal["rpo"]
    divergence: RPODivergence
    beta: PositiveFloat
    reward_scale: PositiveFloat
    online: bool


class OnPolicyDistillation(Frozen):
    """The parent's log-probability of what the policy sampled, against the policy's own; rewards are watched alone.

    Its KL is that to the parent.
    """

    kind: Literal["on_policy_distillation"]
    clip_low: PositiveFloat
    clip_high: PositiveFloat


RLAlgorithm = Annotated[GRPO | RLOO | RPO | OnPolicyDistillation, Field(discriminator="kind")]


class CurriculumConfig(Frozen):
    """The pass rate that batches aim at goes from `start` to `end`; `sigma` is the spread around it."""

    start: Ratio
    end: Ratio
    sigma: PositiveFloat


class DifficultyConfig(Frozen):
    """Pass rates of the starting checkpoint, thinking on, from `num_samples` replies to each prompt.

    Prompts below `min_pass_rate` are dropped, and those at `max_pass_rate` or above. Without a curriculum the rest
    comes in random order.
    """

    num_samples: Positive
    min_pass_rate: Annotated[float, Field(ge=0, lt=1)]
    max_pass_rate: Annotated[float, Field(gt=0, le=1)]
    curriculum: CurriculumConfig | None

    @model_validator(mode="after")
    def _rates_are_a_range(self) -> Self:
        if self.min_pass_rate >= self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate is {self.min_pass_rate:g}, max_pass_rate {self.max_pass_rate:g}: no prompt is left"
            )
        return self


class HeldOutRewardConfig(Frozen):
    """Prompts that are sampled from every `interval_steps` and never trained on."""

    num_prompts: Positive
    interval_steps: Positive


class StopRulesConfig(Frozen):
    """Bounds that end a training when they are crossed for `patience_steps` steps in a row.

    `max_held_out_drop` has to be crossed in two measurements besides, however many steps lie between them. The bound of
    the entropy is the one that on-policy distillation is held to.
    """

    patience_steps: Positive
    min_entropy_nats: NonNegativeFloat
    max_kl_nats: PositiveFloat
    max_held_out_drop: PositiveFloat


class RewardModelConfig(Frozen):
    """A sequence classifier with one output on this machine: a Hugging Face directory, safetensors, no code of its own.

    It reads the request and what stands behind the thought, in its own chat template. Its score, cut to `min_score` and
    `max_score`, earns `weight` times what it is above `min_score`; so 0, what a cut-off reply earns, stays the least.
    """

    path: str
    weight: PositiveFloat
    min_score: Annotated[float, Field(allow_inf_nan=False)]
    max_score: Annotated[float, Field(allow_inf_nan=False)]
    precision: Precision

    @model_validator(mode="after")
    def _scores_are_a_range(self) -> Self:
        if self.min_score >= self.max_score:
            raise ValueError(f"min_score is {self.min_score:g}, max_score {self.max_score:g}: it must be above")
        return self


class RLConfig(Frozen):
    """Reinforcement learning on verifiable rewards, a reward model's besides (Llama-Nemotron, sections 5 and 6).

    With `instruction_reward` all, the accuracy reward is paid when every instruction of a prompt is followed; with
    share, in proportion to those that are.

    `max_importance_weight` caps the ratio of trainer to sampler by which each token's gradient is corrected.
    """

    algorithm: RLAlgorithm
    steps: Positive
    prompts_per_step: Positive
    samples_per_prompt: Annotated[int, Field(ge=2)]
    max_new_tokens: Positive
    temperature: PositiveFloat
    share_thinking_on: Ratio
    updates_per_rollout: Positive
    max_importance_weight: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    accuracy_reward: NonNegativeFloat
    format_reward: NonNegativeFloat
    instruction_reward: Literal["share", "all"]
    reward_model: RewardModelConfig | None
    difficulty: DifficultyConfig | None
    held_out: HeldOutRewardConfig
    stop: StopRulesConfig
    optimizer: OptimizerConfig
    precision: Precision
    seed: int

    @model_validator(mode="after")
    def _rloo_is_on_policy(self) -> Self:
        if self.algorithm.kind == "rloo" and self.updates_per_rollout != 1:
            raise ValueError(f"rloo takes one update per rollout, updates_per_rollout is {self.updates_per_rollout}")
        return self
