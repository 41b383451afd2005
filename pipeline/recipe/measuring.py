"""How checkpoints are measured, and what each artifact must reach."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.architecture import Frozen
from pipeline.recipe.profile import Scenario
from pipeline.recipe.types import Backend, Positive, PositiveFloat, Precision, Ratio

DECODE_STEPS = 8  # as many as one timing takes (pipeline.puzzle.timing), so that no filling comes before them


class SampledConfig(Frozen):
    """Samples of the first `num_items` reasoning items, thinking on; their mean is pass@1. 0 items: not measured."""

    num_items: Annotated[int, Field(ge=0)]
    num_samples: Positive
    temperature: PositiveFloat
    top_p: PositiveFloat


# What stands in front of an lm-eval task: the task's own text alone, or the chat template under one of the two modes.
LmEvalPrompt = Literal["plain", "on", "off"]

# Tasks of lm-eval's that are made of the recipe's own evaluation sets: these, and `refit_` with a multiple-choice set.
OWN_TASK_PREFIX = "refit_"
OWN_REASONING_TASKS = ("refit_reasoning", "refit_held_out_tasks")


class LmEvalTask(Frozen):
    """One task of lm-eval's: its own by name, one of `include_path`, or one of the recipe's evaluation sets.

    `prompts` says how it is asked, each being a measurement of its own. `num_fewshot` null keeps what the task says.
    """

    name: Annotated[str, Field(min_length=1)]
    prompts: Annotated[tuple[LmEvalPrompt, ...], Field(min_length=1)]
    num_fewshot: Annotated[int, Field(ge=0)] | None

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

    `include_path` is a directory of task files. Of a task with more than `max_items` items so many are drawn with
    `seed`: the first of a file are often its easiest. `checkpoints` are measured beside the parent.
    """

    tasks: Annotated[tuple[LmEvalTask, ...], Field(min_length=1)]
    include_path: str | None
    max_items: Positive | None
    seed: int
    checkpoints: Literal["last", "all"]

    @model_validator(mode="after")
    def _tasks_differ(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"a task is named twice: {names}; give its prompts in one entry")
        return self


class EvaluationConfig(Frozen):
    """How every checkpoint is measured; parent and children by the same harness.

    `robustness_items` of the reasoning items are asked under unusual system prompts; 0: none. `batch_size` rows run at
    once, but never fewer than `sampled.num_samples` where that is measured: the samples of an item share one reading of
    their prompt. `lm_eval` null: lm-eval is not asked.
    """

    robustness_items: Annotated[int, Field(ge=0)]
    sampled: SampledConfig
    sequence_length: Positive
    text_tokens_per_set: Positive
    batch_size: Positive
    max_new_tokens_on: Positive
    max_new_tokens_off: Positive
    precision: Precision
    lm_eval: LmEvalConfig | None


class MeasurementConfig(Frozen):
    """Interleaved measurement of several models: rounds of one timing each, in turn."""

    rounds: Positive
    warmups: Positive


class SpeedReportConfig(MeasurementConfig):
    """The measurement, the device whose cached tokens are counted, and where else models are timed.

    Every one of `backends` times block_profile.scenarios and, for one sequence, the reading of a prompt of each of
    `depths` tokens and a decode step behind it. The one that block_profile measures in must be among them: the target's
    limits are held to that.
    """

    device_memory_gib: PositiveFloat
    backends: Annotated[tuple[Backend, ...], Field(min_length=1)]
    depths: tuple[Positive, ...]

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
    """The measurement of the children that simpler methods choose, and how many of them are drawn at random."""

    num_random: Annotated[int, Field(ge=0)]

    @property
    def measurement(self) -> MeasurementConfig:
        """The part that decides how speed is measured."""
        return MeasurementConfig(rounds=self.rounds, warmups=self.warmups)


class Thresholds(Frozen):
    """What an artifact must reach for the line to go on; changing one re-checks, and re-runs nothing."""

    min_share_of_blocks_improved: Ratio
    max_profile_residual: PositiveFloat
    max_fusion_kl: PositiveFloat
    max_kd_kl_ratio: PositiveFloat
    max_cpt_perplexity_ratio: PositiveFloat
    max_sft_loss_ratio: PositiveFloat
    max_rl_kl: PositiveFloat
    min_toggle_compliance: Ratio
    max_export_logit_difference: PositiveFloat
