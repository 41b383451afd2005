"""The dependency matrix of a child, and which runs of its FFNs are fused."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.architecture import Frozen
from pipeline.recipe.types import (
    Positive,
    PositiveFloat,
    Precision,
)


class DependencyConfig(Frozen):
    """The dependency matrix of a child, on the mixture's validation tokens (FFN Fusion, section 3)."""

    tokens: Positive
    precision: Precision


class FusionConfig(Frozen):
    """FFN fusion of attention-free runs (FFN Fusion, section 3).

    No two blocks of a run depend on each other by more than `max_dependency`, a cosine distance of the dependency
    matrix; a fused FFN's weights in the served precision, split over the tensor-parallel devices, take at most
    `max_ffn_gb_per_device`; a run that alone moves the child by more than `max_run_kl` nats per token stays unfused.
    Errors are measured in `precision` on `calibration_tokens`.
    """

    min_run_layers: Annotated[int, Field(ge=2)]
    max_run_layers: Annotated[int, Field(ge=2)]
    max_dependency: Annotated[float, Field(gt=0, le=2)]
    max_ffn_gb_per_device: PositiveFloat
    max_run_kl: PositiveFloat
    keep_last_ffn: bool
    norm_rule: Literal["fold_each", "last"]
    calibration_tokens: Positive
    precision: Precision
