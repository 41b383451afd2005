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

    tokens: Positive = Field(description="validation tokens of distillation_mix")
    precision: Precision = Field(description="of the child's weights and arithmetic")


class FusionConfig(Frozen):
    """FFN fusion of attention-free runs (FFN Fusion, section 3)."""

    min_run_layers: Annotated[int, Field(ge=2)] = Field(description="fewest FFNs that are joined into one")
    max_run_layers: Annotated[int, Field(ge=2)] = Field(description="most FFNs that are joined into one")
    max_dependency: Annotated[float, Field(gt=0, le=2)] = Field(
        description="largest entry of the dependency matrix, a cosine distance, between any two FFNs of a run"
    )
    max_ffn_gb_per_device: PositiveFloat = Field(
        description="10^9 bytes that a fused FFN's weights may take on one device, in block_profile.served_precision "
        "and split over block_profile.tensor_parallel_size devices"
    )
    max_run_kl: PositiveFloat = Field(
        description="nats per token; a run that alone moves the child by more stays unfused"
    )
    keep_last_ffn: bool = Field(
        description="leave the last FFN of each stretch of attention-free layers as it is (FFN Fusion, table 5)"
    )
    norm_rule: Literal["fold_each", "last"] = Field(
        description="`fold_each` multiplies each FFN's norm scale into its matrices; `last` takes the last one's for "
        "all"
    )
    calibration_tokens: Positive = Field(
        description="validation tokens of distillation_mix on which errors are measured"
    )
    precision: Precision = Field(description="of the models whose errors are measured")
