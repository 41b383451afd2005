"""Search space, block library, scores, profile, search, targets and fusion of a recipe."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.architecture import Frozen
from pipeline.recipe.types import Name, NonNegativeFloat, Positive, PositiveFloat, Precision, Ratio, ServedPrecision

AttentionOption = Literal["parent", "linear", "no_op"] | Positive
FFNOption = Literal["parent", "linear", "no_op"] | Positive


class LayerOverride(Frozen):
    """Other options for some layers; None keeps the space's own list."""

    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    attention: tuple[AttentionOption, ...] | None = None
    ffn: tuple[FFNOption, ...] | None = None


class SearchSpaceConfig(Frozen):
    """The variants of each layer: key/value heads, FFN widths, `parent`, `linear`, `no_op`.

    `portable` keeps to what stock vLLM and llama.cpp run: real attention in layer 0, FFN widths that are multiples of
    256, no linear subblocks.
    """

    attention: Annotated[tuple[AttentionOption, ...], Field(min_length=1)]
    ffn: Annotated[tuple[FFNOption, ...], Field(min_length=1)]
    overrides: tuple[LayerOverride, ...]
    portable: bool

    @model_validator(mode="after")
    def _parent_is_an_option(self) -> Self:
        for name, options in (("attention", self.attention), ("ffn", self.ffn)):
            if "parent" not in options:
                raise ValueError(f"search_space.{name} must list 'parent': every layer may stay as it is")
        return self


class ImportanceConfig(Frozen):
    """Calibration for channel contribution and KV-head statistics."""

    tokens: Positive
    batch_size: Positive
    precision: Precision


BlockLoss = Literal["tensor", "token"]


class BlockLibraryConfig(Frozen):
    """Decoupled block-wise local distillation (Puzzle, section 3).

    `loss` divides the squared error by the squared output of the whole batch (`tensor`, the paper's) or token by token.
    """

    tokens: Positive
    loss: BlockLoss
    batch_size: Positive
    learning_rate: PositiveFloat
    min_learning_rate_ratio: Ratio
    warmup_ratio: Ratio
    schedule: Literal["cosine", "constant"]
    weight_decay: NonNegativeFloat
    betas: tuple[Ratio, Ratio]
    max_grad_norm: PositiveFloat
    precision: Precision


class BlockScoresConfig(Frozen):
    """Replace-1-block scores on the mixture's validation tokens (Puzzle, section 4.2)."""

    tokens: Positive
    precision: Precision


class Scenario(Frozen):
    """One way the model is used: a batch of prompts, each answered with generation_tokens.

    A decode step is timed half-way through the generation: it costs what the steps cost on average.
    """

    name: Name
    batch_size: Positive
    prompt_tokens: Positive
    generation_tokens: Positive


class ProfileConfig(Frozen):
    """Measured block times. The median over `repeats` is kept; `warmups` runs are thrown away.

    Times are measured in `precision`; weights and cached values are counted in `served_precision`, the one the child
    will be deployed in.
    """

    scenarios: Annotated[tuple[Scenario, ...], Field(min_length=1)]
    precision: Precision
    served_precision: ServedPrecision
    num_threads: Positive
    warmups: Positive
    repeats: Positive


class SearchConfig(Frozen):
    """The integer programme: which score it minimises, and when the solver may stop.

    Predicted times must beat their bounds by the share `speed_margin`; measured ones may miss theirs by the share
    `speed_tolerance`.
    """

    objective: Literal["kl", "lm_loss"]
    time_limit_s: PositiveFloat
    relative_gap: NonNegativeFloat
    max_recalibrations: Annotated[int, Field(ge=0)]
    speed_margin: Annotated[float, Field(ge=0, lt=1)]
    speed_tolerance: Ratio


class Limit(Frozen):
    """One requirement on a child: a measured or counted quantity, an absolute bound or one relative to the parent.

    `decode_speed` and `prefill_speed` are tokens per second in `scenario`; `memory_mib` is weights plus the scenario's
    KV cache; the rest are counted. Speeds are lower bounds, everything else upper bounds.
    """

    quantity: Literal[
        "decode_speed", "prefill_speed", "latency_ms", "memory_mib", "num_parameters", "kv_bytes_per_token"
    ]
    scenario: Name | None
    bound: PositiveFloat
    relative_to: Literal["parent", "absolute"]

    @model_validator(mode="after")
    def _measured_quantities_name_a_scenario(self) -> Self:
        needs = self.quantity in ("decode_speed", "prefill_speed", "latency_ms", "memory_mib")
        if needs != (self.scenario is not None):
            raise ValueError(
                f"limit {self.quantity} has scenario {self.scenario!r}; it {'needs' if needs else 'takes no'} one"
            )
        return self


class Pin(Frozen):
    """Options that a target allows in some layers, to force an architecture through the search."""

    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    attention: AttentionOption | None = None
    ffn: FFNOption | None = None


class Requirements(Frozen):
    """What a child must reach, and what is decided for the search in advance."""

    limits: tuple[Limit, ...]
    pins: tuple[Pin, ...]


class Target(Requirements):
    """Requirements under a name; targets are the partitions of the graph."""

    description: str

    @property
    def requirements(self) -> Requirements:
        """The part that changes a result, without the prose."""
        return Requirements(limits=self.limits, pins=self.pins)


class FusionConfig(Frozen):
    """FFN fusion of attention-free runs (FFN Fusion, section 3)."""

    min_run_layers: Annotated[int, Field(ge=2)]
    max_run_layers: Annotated[int, Field(ge=2)]
    max_run_kl: PositiveFloat
    keep_last_ffn: bool
    norm_rule: Literal["fold_each", "last"]
    calibration_tokens: Positive
