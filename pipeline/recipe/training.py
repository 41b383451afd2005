"""Distillation, continued pre-training, fine-tuning and reinforcement learning of a recipe."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.architecture import Frozen
from pipeline.recipe.types import Name, NonNegativeFloat, Positive, PositiveFloat, Precision, Ratio


class OptimizerConfig(Frozen):
    """AdamW with linear warm-up and a cosine or constant schedule."""

    learning_rate: PositiveFloat = Field(description="peak of the schedule")
    min_learning_rate_ratio: Ratio = Field(description="what a cosine schedule ends at, as a share of the peak")
    warmup_ratio: Ratio = Field(
        description="share of the steps over which the learning rate rises linearly to its peak"
    )
    schedule: Literal["cosine", "constant"] = Field(description="of the learning rate behind the warm-up")
    weight_decay: NonNegativeFloat = Field(description="AdamW's, of matrices; norms and biases have none")
    betas: tuple[Ratio, Ratio] = Field(description="AdamW's, of the first and the second moment")
    max_grad_norm: PositiveFloat = Field(description="a step's gradient is scaled down to this norm")


class LongContextPhase(Frozen):
    """A later part of a training, on the mixture's windows of that length.

    It starts from the weights of the part before with an optimizer of its own: the same settings and schedule, at this
    learning rate.
    """

    sequence_length: Positive = Field(description="tokens of a window; one of the mixture's long_context")
    tokens: Positive = Field(description="training tokens, each read once")
    global_batch_size: Positive = Field(
        description="windows per optimizer step, of all ranks together: num_ranks must divide it"
    )
    learning_rate: PositiveFloat = Field(description="peak of the schedule in this part")


class DistillationConfig(Frozen):
    """Knowledge distillation: cosine on hidden states plus KL on logits (Puzzle, equation 1)."""

    tokens: Positive = Field(description="training tokens of distillation_mix, each read once")
    global_batch_size: Positive = Field(
        description="windows per optimizer step, of all ranks together: num_ranks must divide it"
    )
    long_context: tuple[LongContextPhase, ...]
    cosine_weight: NonNegativeFloat = Field(
        description="of the cosine distance to the parent's hidden states, summed over layers, mean over tokens"
    )
    kl_weight: NonNegativeFloat = Field(description="of KL(parent || child), nats per token")
    optimizer: OptimizerConfig
    precision: Precision = Field(
        description="of weights and arithmetic, the parent's too; bf16 keeps fp32 weights, gradient sums and moments "
        "besides"
    )


class PretrainingConfig(Frozen):
    """Continued pre-training: next-token cross-entropy."""

    tokens: Positive = Field(description="training tokens of pretraining_mix, each read once")
    global_batch_size: Positive = Field(
        description="windows per optimizer step, of all ranks together: num_ranks must divide it"
    )
    long_context: tuple[LongContextPhase, ...]
    optimizer: OptimizerConfig
    precision: Precision = Field(
        description="of weights and arithmetic; bf16 keeps fp32 weights, gradient sums and moments besides"
    )


class SFTStage(Frozen):
    """One stage of fine-tuning, on one blend of the toggle dataset, with an optimizer of its own.

    Text of the pre-training mixture may be replayed: what is not rehearsed is forgotten.
    """

    blend: Name = Field(description="name of a blend of reasoning_toggle_dataset")
    shuffle: bool = Field(
        description="go through the blend as often as the tokens ask for, reshuffled every epoch; false reads it once "
        "in its own order"
    )
    replay_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="share of the windows that are text of pretraining_mix, evenly between the rest"
    )
    tokens: Positive = Field(description="tokens of the windows that are trained on, prompts and padding included")
    global_batch_size: Positive = Field(
        description="windows per optimizer step, of all ranks together: num_ranks must divide it"
    )
    optimizer: OptimizerConfig


class SFTConfig(Frozen):
    """Supervised fine-tuning on the assistant's tokens, end token included; each stage starts from the one before."""

    stages: Annotated[tuple[SFTStage, ...], Field(min_length=1)]
    precision: Precision = Field(
        description="of weights and arithmetic; bf16 keeps fp32 weights, gradient sums and moments besides"
    )
    seed: int = Field(description="of the shuffling")


class GRPO(Frozen):
    """Group-relative policy optimisation; a higher `clip_high` than `clip_low` is "clip higher" (DAPO)."""

    kind: Literal["grpo"]
    baseline: Literal["leave_one_out", "group_mean"] = Field(
        description="what a reward is held against: the mean of the group's other replies, or of the whole group"
    )
    normalise_by_std: bool = Field(
        description="divide advantages by the standard deviation of the rewards in their group"
    )
    clip_low: PositiveFloat = Field(
        description="the ratio of a token's probability to that at the rollout is clipped at 1 - clip_low"
    )
    clip_high: PositiveFloat = Field(description="and at 1 + clip_high")
    kl_weight: NonNegativeFloat = Field(description="of KL(policy || sft_checkpoint), nats per token, in the loss")


class RLOO(Frozen):
    """REINFORCE with a leave-one-out baseline, the KL to the start in the reward; one update per rollout."""

    kind: Literal["rloo"]
    kl_weight: NonNegativeFloat = Field(
        description="taken off a reply's reward for each nat of log(policy / sft_checkpoint), summed over its tokens"
    )


RPODivergence = Literal["squared", "backward_kl", "forward_kl"]


class RPO(Frozen):
    """Reward-aware preference optimisation on the best and the worst sample of each group.

    With r the reward and R the log-ratio of policy to starting checkpoint, summed over a reply's tokens,
    D = beta (R_best - R_worst) is brought to D* = reward_scale (r_best - r_worst). `squared` is (D - D*)^2. With B(x)
    the Bernoulli distribution of sigmoid(x), `backward_kl` is KL(B(D*) || B(D)) and `forward_kl` KL(B(D) || B(D*)).

    Online the policy samples; offline the checkpoint that training starts from does, throughout, and the KL that is
    reported and bounded is that of the checkpoint to the policy. `max_importance_weight` bounds nothing here.
    """

    kind: Literal["rpo"]
    divergence: RPODivergence = Field(description="distance of D from D*")
    beta: PositiveFloat = Field(description="factor on log-ratios, in D")
    reward_scale: PositiveFloat = Field(description="factor on rewards, in D*")
    online: bool = Field(description="whether the policy samples, or the checkpoint that training starts from")


class OnPolicyDistillation(Frozen):
    """The parent's log-probability of what the policy sampled, against the policy's own; rewards are watched alone.

    Its KL is that to the parent.
    """

    kind: Literal["on_policy_distillation"]
    clip_low: PositiveFloat = Field(
        description="the ratio of a token's probability to that at the rollout is clipped at 1 - clip_low"
    )
    clip_high: PositiveFloat = Field(description="and at 1 + clip_high")


RLAlgorithm = Annotated[GRPO | RLOO | RPO | OnPolicyDistillation, Field(discriminator="kind")]


class CurriculumConfig(Frozen):
    """The pass rate that batches aim at goes from `start` to `end`; `sigma` is the spread around it."""

    start: Ratio = Field(description="pass rate at the first step")
    end: Ratio = Field(description="pass rate at the last step")
    sigma: PositiveFloat = Field(
        description="standard deviation of the Gaussian around it by which a batch weighs pass rates"
    )


class DifficultyConfig(Frozen):
    """Pass rates of the starting checkpoint, thinking on, from `num_samples` replies to each prompt.

    Prompts below `min_pass_rate` are dropped, and those at `max_pass_rate` or above. Without a curriculum the rest
    comes in random order.
    """

    num_samples: Positive = Field(description="replies to each prompt")
    min_pass_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="share of right replies below which a prompt is dropped"
    )
    max_pass_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        description="share of right replies from which on a prompt is dropped"
    )
    curriculum: CurriculumConfig | None = Field(description="null: random order")

    @model_validator(mode="after")
    def _rates_are_a_range(self) -> Self:
        if self.min_pass_rate >= self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate is {self.min_pass_rate:g}, max_pass_rate {self.max_pass_rate:g}: no prompt is left"
            )
        return self


class HeldOutRewardConfig(Frozen):
    """Prompts that are sampled from every `interval_steps` and never trained on."""

    num_prompts: Positive = Field(description="prompts that are kept back, at least one of each kind")
    interval_steps: Positive = Field(description="steps between two measurements")


class StopRulesConfig(Frozen):
    """Bounds that end a training when they are crossed for `patience_steps` steps in a row.

    `max_held_out_drop` has to be crossed in two measurements besides, however many steps lie between them. The bound of
    the entropy is the one that on-policy distillation is held to.
    """

    patience_steps: Positive = Field(description="steps in a row")
    min_entropy_nats: NonNegativeFloat = Field(description="mean entropy per sampled token, nats")
    max_kl_nats: PositiveFloat = Field(description="KL to sft_checkpoint, nats per token")
    max_held_out_drop: PositiveFloat = Field(
        description="held-out reward below that of the first step, while the training reward is no lower"
    )


class RewardModelConfig(Frozen):
    """A sequence classifier with one output on this machine: a Hugging Face directory, safetensors, no code of its own.

    It reads the request and what stands behind the thought, in its own chat template. Its score, cut to `min_score` and
    `max_score`, earns `weight` times what it is above `min_score`; so 0, what a cut-off reply earns, stays the least.
    """

    path: str = Field(description="the directory")
    weight: PositiveFloat = Field(description="reward for each unit of the score above min_score")
    min_score: Annotated[float, Field(allow_inf_nan=False)] = Field(description="scores below count as this one")
    max_score: Annotated[float, Field(allow_inf_nan=False)] = Field(description="scores above count as this one")
    precision: Precision = Field(description="of weights and arithmetic")

    @model_validator(mode="after")
    def _scores_are_a_range(self) -> Self:
        if self.min_score >= self.max_score:
            raise ValueError(f"min_score is {self.min_score:g}, max_score {self.max_score:g}: it must be above")
        return self


class RLConfig(Frozen):
    """Reinforcement learning on verifiable rewards, a reward model's besides (Llama-Nemotron, sections 5 and 6).

    A reply that is cut off, or has not the form of its mode, earns 0.
    """

    algorithm: RLAlgorithm
    steps: Positive = Field(description="rollouts, each followed by its updates")
    prompts_per_step: Positive = Field(
        description="prompts of a rollout, of all ranks together: num_ranks must divide it"
    )
    samples_per_prompt: Annotated[int, Field(ge=2)] = Field(description="replies to each prompt, a group")
    max_new_tokens: Positive = Field(description="most tokens of a reply; one that is cut off earns 0")
    temperature: PositiveFloat = Field(
        description="of sampling; log-probabilities of the losses are those at this temperature"
    )
    share_thinking_on: Ratio = Field(
        description="share of a rollout's prompts, and of the held-out ones, that are asked with thinking on"
    )
    updates_per_rollout: Positive = Field(
        description="optimizer steps over which a rank's replies (with rpo pairs) are dealt; must divide them"
    )
    max_importance_weight: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        description="cap on the ratio of trainer to sampler by which each token's gradient is corrected"
    )
    accuracy_reward: NonNegativeFloat = Field(description="earned by a right answer or by followed instructions")
    format_reward: NonNegativeFloat = Field(
        description="earned by the form of the mode: one thought and an answer, or an answer without any tag"
    )
    instruction_reward: Literal["share", "all"] = Field(
        description="`all` pays the accuracy reward when every instruction of a prompt is followed, `share` in "
        "proportion to those that are"
    )
    reward_model: RewardModelConfig | None = Field(description="null: none")
    difficulty: DifficultyConfig | None = Field(description="null: all prompts, in random order")
    held_out: HeldOutRewardConfig
    stop: StopRulesConfig
    optimizer: OptimizerConfig
    precision: Precision = Field(
        description="of weights and arithmetic, the reference's and the sampler's too; bf16 keeps fp32 weights, "
        "gradient sums and moments of the policy besides"
    )
    seed: int = Field(description="of prompts, samples and the held-out split")

    @model_validator(mode="after")
    def _rloo_is_on_policy(self) -> Self:
        if self.algorithm.kind == "rloo" and self.updates_per_rollout != 1:
            raise ValueError(f"rloo takes one update per rollout, updates_per_rollout is {self.updates_per_rollout}")
        return self
