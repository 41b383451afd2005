"""How checkpoints are measured, and what each artifact must reach."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.architecture import Frozen
from pipeline.recipe.profile import Scenario
from pipeline.recipe.types import Backend, Positive, PositiveFloat, Precision, Ratio

DECODE_STEPS = 8  # as many as one timing takes (pipeline.puzzle.timing), so that no filling comes before them


class SampledConfig(Frozen):
    """Samples of reasoning items with thinking on; the mean share of right ones is pass@1."""

    num_items: Annotated[int, Field(ge=0)] = Field(
        description="reasoning items that are sampled, taken task by turn; 0: not measured"
    )
    num_samples: Positive = Field(description="replies to each item")
    temperature: PositiveFloat = Field(description="of sampling")
    top_p: PositiveFloat = Field(
        description="tokens are drawn from the likeliest ones whose probabilities add up to this"
    )


# What stands in front of an lm-eval task: the task's own text alone, or the chat template under one of the two modes.
LmEvalPrompt = Literal["plain", "on", "off"]

# Tasks of lm-eval's that are made of the recipe's own evaluation sets: these, and `refit_` with a multiple-choice set.
OWN_TASK_PREFIX = "refit_"
OWN_REASONING_TASKS = ("refit_reasoning", "refit_held_out_tasks")


class LmEvalTask(Frozen):
    """One task of lm-eval's: its own by name, one of `include_path`, or one of the recipe's evaluation sets."""

    name: Annotated[str, Field(min_length=1)] = Field(
        description="lm-eval's own name or one of include_path; of the recipe's sets `refit_reasoning`, "
        "`refit_held_out_tasks`, or `refit_` and a multiple-choice set"
    )
    prompts: Annotated[tuple[LmEvalPrompt, ...], Field(min_length=1)] = Field(
        description="`plain` is the task's text alone; `on` and `off` put it into the chat template under that mode; "
        "each is a measurement of its own"
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        description="worked examples in front of an item; null: what the task says"
    )

    @property
    def is_own(self) -> bool:
        """Whether the task is made of the recipe's evaluation sets."""
        return self.name.startswith(OWN_TASK_PREFIX)

    @model_validator(mode="after")
    def _prompts_make_sense(self) -> Self:
        if len(set(self.prompts)) != len(self.prompts):
            raise ValueError(f"task {self.name} names a prompt twice: {list(self.prompts)}")
        if self.name in OWN_REASONING_TASKS and "plain" in self.prompts:
            raise ValueError(f"task {self.name} is a conversation, so its prompts are on and off, got plain")
        return self


class LmEvalConfig(Frozen):
    """Tasks measured through lm-eval's library beside the project's own harness; needs the extra `lm-eval`.

    Items are drawn, not taken from the beginning: the first of a file are often its easiest.
    """

    tasks: Annotated[tuple[LmEvalTask, ...], Field(min_length=1)]
    include_path: str | None = Field(description="directory of task files; null: none")
    max_items: Positive | None = Field(
        description="most items of a task; where it has more, so many are drawn; null: all"
    )
    seed: int = Field(description="of what is drawn and sampled")
    checkpoints: Literal["last", "all"] = Field(
        description="which are measured beside the parent: rl_checkpoint alone, or every one of the target"
    )

    @model_validator(mode="after")
    def _tasks_differ(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"a task is named twice: {names}; give its prompts in one entry")
        return self


class EvaluationConfig(Frozen):
    """How every checkpoint is measured; parent and children by the same harness."""

    robustness_items: Annotated[int, Field(ge=0)] = Field(
        description="reasoning items that are asked under unusual system prompts, too; 0: none"
    )
    sampled: SampledConfig
    sequence_length: Positive = Field(
        description="tokens of a window of held-out text, and the most of a multiple-choice text"
    )
    text_tokens_per_set: Positive = Field(
        description="most tokens that are predicted of each held-out source, in evenly spaced windows"
    )
    batch_size: Positive = Field(
        description="windows, choices or replies that run at once; never fewer than sampled.num_samples where items "
        "are sampled"
    )
    max_new_tokens_on: Positive = Field(description="most tokens of a reply with thinking on")
    max_new_tokens_off: Positive = Field(description="most tokens of a reply with thinking off")
    precision: Precision = Field(description="of weights and arithmetic")
    lm_eval: LmEvalConfig | None = Field(description="null: lm-eval is not asked")


class MeasurementConfig(Frozen):
    """Interleaved measurement of several models: rounds of one timing each, in turn."""

    rounds: Positive = Field(description="rounds that count; each times every model once in every scenario")
    warmups: Positive = Field(description="rounds in front of those, thrown away")


class SpeedReportConfig(MeasurementConfig):
    """The measurement, which is child_checkpoint's too, the memory to fill, and where else models are timed.

    Every one of `backends` times block_profile.scenarios and, for one sequence, the reading of a prompt of each of
    `depths` tokens and a decode step behind it. The one that block_profile measures in must be among them: the target's
    limits are held to that.
    """

    device_memory_gib: PositiveFloat = Field(
        description="GiB of all devices that hold the model together, in which cached tokens are counted"
    )
    backends: Annotated[tuple[Backend, ...], Field(min_length=1)] = Field(description="runtimes to time the models in")
    depths: tuple[Positive, ...] = Field(
        description="prompt tokens at which one sequence is timed besides the scenarios; [] for none"
    )

    @property
    def depth_scenarios(self) -> tuple[Scenario, ...]:
        """The depths as scenarios of one sequence, whose timed decode steps come right behind the prompt."""
        return tuple(
            Scenario(name=f"depth-{depth}", batch_size=1, prompt_tokens=depth, generation_tokens=DECODE_STEPS)
            for depth in self.depths
        )

    @model_validator(mode="after")
    def _nothing_is_measured_twice(self) -> Self:
        for name, values in (("backends", self.backends), ("depths", self.depths)):
            if len(set(values)) < len(values):
                raise ValueError(f"speed_report.{name} is {list(values)}: name each once")
        return self

    @property
    def measurement(self) -> MeasurementConfig:
        """The part that decides how speed is measured."""
        return MeasurementConfig(rounds=self.rounds, warmups=self.warmups)


class BaselinesConfig(MeasurementConfig):
    """The measurement of the children that simpler methods choose, which is fusion_report's too."""

    num_random: Annotated[int, Field(ge=0)] = Field(description="children within the limits that are drawn at random")

    @property
    def measurement(self) -> MeasurementConfig:
        """The part that decides how speed is measured."""
        return MeasurementConfig(rounds=self.rounds, warmups=self.warmups)


class Thresholds(Frozen):
    """What an artifact must reach; changing one re-checks, and re-runs nothing.

    A check that blocks stops whatever reads the artifact; one that warns is shown and stops nothing.
    """

    min_share_of_blocks_improved: Ratio = Field(
        description="block_library: share of the trained blocks whose validation loss ended below that of their "
        "surgical start; warns"
    )
    max_profile_residual: PositiveFloat = Field(
        description="block_profile: the largest difference between a sum of block times and the whole model's, as a "
        "share of the latter, over scenarios and phases; warns"
    )
    max_fusion_kl: PositiveFloat = Field(
        description="fused_checkpoint: KL to the unfused child, nats per token; blocks"
    )
    max_kd_kl_ratio: PositiveFloat = Field(
        description="kd_checkpoint: KL to the parent on validation tokens, after training over before; blocks"
    )
    max_cpt_perplexity_ratio: PositiveFloat = Field(
        description="cpt_checkpoint: perplexity on validation tokens of pretraining_mix, after training over before; "
        "blocks"
    )
    max_sft_loss_ratio: PositiveFloat = Field(
        description="sft_checkpoint: loss per assistant's token on held-out samples, after training over before; blocks"
    )
    max_rl_kl: PositiveFloat = Field(
        description="rl_checkpoint: KL to sft_checkpoint after the last update, nats per token; blocks; not for "
        "on-policy distillation"
    )
    min_toggle_compliance: Ratio = Field(
        description="evaluation: share of rl_checkpoint's replies to reasoning items that have the form of their mode, "
        "in each of the two; blocks"
    )
    max_export_logit_difference: PositiveFloat = Field(
        description="exported_model: largest absolute difference of a logit between export and checkpoint, both in "
        "fp32; blocks"
    )
