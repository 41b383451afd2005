"""How checkpoints are measured, and what each artifact must reach."""

from typing import Annotated

from pydantic import Field

from pipeline.architecture import Frozen
from pipeline.recipe.types import Positive, PositiveFloat, Precision, Ratio


class SampledConfig(Frozen):
    """Samples of the first `num_items` reasoning items, thinking on; their mean is pass@1. 0 items: not measured."""

    num_items: Annotated[int, Field(ge=0)]
    num_samples: Positive
    temperature: PositiveFloat
    top_p: PositiveFloat


class EvaluationConfig(Frozen):
    """How every checkpoint is measured; parent and children by the same harness.

    `robustness_items` of the reasoning items are asked under unusual system prompts; 0: none.
    """

    robustness_items: Annotated[int, Field(ge=0)]
    sampled: SampledConfig
    sequence_length: Positive
    text_tokens_per_set: Positive
    batch_size: Positive
    max_new_tokens_on: Positive
    max_new_tokens_off: Positive
    precision: Precision


class MeasurementConfig(Frozen):
    """Interleaved measurement of several models: rounds of one timing each, in turn."""

    rounds: Positive
    warmups: Positive


class SpeedReportConfig(MeasurementConfig):
    """The measurement, and the device whose cached tokens are counted."""

    device_memory_gib: PositiveFloat

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
