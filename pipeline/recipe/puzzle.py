"""Search space, channel importance, block library and scores of a recipe."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.architecture import Frozen
from pipeline.recipe.data import MultipleChoiceSet
from pipeline.recipe.training import OptimizerConfig
from pipeline.recipe.types import (
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Precision,
    Ratio,
)

Share = Annotated[float, Field(gt=0, lt=1)]
AttentionOption = Literal["parent", "linear", "no_op"] | Positive | Share
FFNOption = Literal["parent", "linear", "no_op"] | Positive | Share

# `super`: the 16 blocks per layer of the library that NVIDIA published for Llama-3.3-70B. `paper`: the 54 of Puzzle,
# section 2. Shares of the parent's key/value heads and FFN width, so that they fit any parent.
PRESETS: dict[str, dict[str, tuple[str | float, ...]]] = {
    "super": {
        "attention": ("parent", "no_op"),
        "ffn": ("parent", 0.75, 0.625, 0.5, 0.25, 0.2, 0.1, "no_op"),
    },
    "paper": {
        "attention": ("parent", 0.5, 0.25, 0.125, "linear", "no_op"),
        "ffn": ("parent", 0.87, 0.75, 0.5, 0.25, 0.2, 0.1, "linear", "no_op"),
    },
}


class LayerOverride(Frozen):
    """Other options for some layers."""

    layers: Annotated[tuple[int, ...], Field(min_length=1)] = Field(description="numbers of layers, from 0")
    attention: tuple[AttentionOption, ...] | None = Field(default=None, description="null: the space's own list")
    ffn: tuple[FFNOption, ...] | None = Field(default=None, description="null: the space's own list")


class SearchSpaceConfig(Frozen):
    """The variants of each layer.

    `parent` leaves a subblock as it is, `linear` makes it one matrix, and `no_op` leaves it out. A whole number is that
    many key/value heads, which must divide the parent's, or that many FFN channels. A number between 0 and 1 is a share
    of the parent's heads or channels. In a recipe `preset: super` or `preset: paper` stands for both lists.
    `portable` keeps to what stock vLLM and llama.cpp run: real attention in layer 0, FFN widths that are multiples of
    256, no linear subblocks.
    """

    attention: Annotated[tuple[AttentionOption, ...], Field(min_length=1)] = Field(
        description="attention variants of every layer; must list `parent`"
    )
    ffn: Annotated[tuple[FFNOption, ...], Field(min_length=1)] = Field(
        description="FFN variants of every layer; must list `parent`"
    )
    overrides: tuple[LayerOverride, ...]
    portable: bool = Field(description="keep to what stock vLLM and llama.cpp run")

    @model_validator(mode="before")
    @classmethod
    def _write_out_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "preset" not in data:
            return data
        name, rest = data["preset"], {key: value for key, value in data.items() if key != "preset"}
        if name not in PRESETS:
            raise ValueError(f"search_space.preset is {name!r}; it is one of {', '.join(PRESETS)}")
        if given := sorted(PRESETS[name].keys() & rest.keys()):
            raise ValueError(f"search_space.preset {name!r} stands for {' and '.join(given)}: give one or the other")
        return {**rest, **PRESETS[name]}

    @model_validator(mode="after")
    def _parent_is_an_option(self) -> Self:
        for name, options in (("attention", self.attention), ("ffn", self.ffn)):
            if "parent" not in options:
                raise ValueError(f"search_space.{name} must list 'parent': every layer may stay as it is")
        return self

    def require_droppable_layers(self) -> None:
        """Raise a ValueError unless some layer may lose both its attention and its FFN."""
        lists = [(self.attention, self.ffn)]
        lists += [
            (self.attention if one.attention is None else one.attention, self.ffn if one.ffn is None else one.ffn)
            for one in self.overrides
        ]
        if not any("no_op" in attention and "no_op" in ffn for attention, ffn in lists):
            raise ValueError(
                "search.layers is depth_only, but search_space nowhere lists 'no_op' for attention and ffn together, "
                "so no layer can be left out: add it to both"
            )


KVHeadMode = Literal["mean", "contribution"]


class ImportanceConfig(Frozen):
    """Calibration, and how variants are cut by it."""

    tokens: Positive = Field(description="training tokens of distillation_mix that are read")
    batch_size: Positive = Field(description="windows per pass; the stage runs on one rank")
    channel_rounds: Positive = Field(
        description="steps in which the channels of narrower FFNs are removed, each measured with those already "
        "removed left out; 1 is Puzzle's independent contribution"
    )
    kv_heads: KVHeadMode = Field(
        description="fewer key/value heads are each the `mean` of a group (Puzzle, appendix A), or those of the "
        "largest `contribution`, and the queries of the others, their output zeroed, learn again"
    )
    precision: Precision = Field(description="of the parent's weights and arithmetic")


BlockLoss = Literal["tensor", "token", "kl"]
Subblock = Literal["attention", "ffn", "pair"]
"""What is trained as one: a subblock by itself, or both of a layer."""


class VariantOverride(Frozen):
    """Other training settings for some variants."""

    subblock: Subblock = Field(description="what the variants are of")
    variants: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="`kv1`, `ffn256`, `linear`, or a pair such as `kv1+ffn256`"
    )
    learning_rate: PositiveFloat | None = Field(default=None, description="null: block_library's own")
    warmup_ratio: Ratio | None = Field(default=None, description="null: block_library's own")
    max_grad_norm: PositiveFloat | None = Field(default=None, description="null: block_library's own")


class CoupledSpace(Frozen):
    """The options whose pairs mode `hybrid` trains together; they are written as those of the search space."""

    attention: Annotated[tuple[AttentionOption, ...], Field(min_length=1)] = Field(
        description="attention halves of the pairs"
    )
    ffn: Annotated[tuple[FFNOption, ...], Field(min_length=1)] = Field(description="FFN halves of the pairs")


class BlockLibraryConfig(Frozen):
    """Block-wise local distillation (Puzzle, section 3)."""

    mode: Literal["decoupled", "coupled", "hybrid"] = Field(
        description="`decoupled` trains every variant beside the parent's other subblock, `coupled` every attention x "
        "FFN pair of a layer as one block, `hybrid` every variant and the pairs of coupled_space besides"
    )
    coupled_space: CoupledSpace | None = Field(description="for mode hybrid; null for the others")
    tokens: Positive = Field(description="training tokens of distillation_mix, each read once")
    closed_form_tokens: Annotated[int, Field(ge=0)] = Field(
        description="of these, the first, from which each variant's last matrix gets a least-squares start; 0: none, "
        "as in Puzzle"
    )
    loss: BlockLoss = Field(
        description="error of a block's output: squared over the squared output of the whole batch (`tensor`, "
        "Puzzle's) or of each token (`token`), or an estimate of the final KL, nats per token (`kl`)"
    )
    batch_size: Positive = Field(
        description="windows per step, whatever the number of ranks: they share out the layers"
    )
    learning_rate: PositiveFloat = Field(description="peak of the schedule")
    min_learning_rate_ratio: Ratio = Field(description="what a cosine schedule ends at, as a share of the peak")
    warmup_ratio: Ratio = Field(
        description="share of the steps over which the learning rate rises linearly to its peak"
    )
    schedule: Literal["cosine", "constant"] = Field(description="of the learning rate behind the warm-up")
    weight_decay: NonNegativeFloat = Field(description="AdamW's, of matrices; norms and biases have none")
    betas: tuple[Ratio, Ratio] = Field(description="AdamW's, of the first and the second moment")
    max_grad_norm: PositiveFloat = Field(description="each block's gradient is scaled down to this norm")
    overrides: tuple[VariantOverride, ...]
    precision: Precision = Field(description="of the parent and of the arithmetic; blocks are trained in fp32")

    @model_validator(mode="after")
    def _closed_form_reads_tokens_of_the_training(self) -> Self:
        if self.closed_form_tokens > self.tokens:
            raise ValueError(
                f"block_library.closed_form_tokens is {self.closed_form_tokens:,} of {self.tokens:,} tokens: give at "
                "most block_library.tokens"
            )
        return self

    @model_validator(mode="after")
    def _coupled_space_belongs_to_hybrid(self) -> Self:
        if (self.mode == "hybrid") != (self.coupled_space is not None):
            needs = "needs one" if self.mode == "hybrid" else "takes none: give null"
            raise ValueError(
                f"block_library.coupled_space is {'null' if self.coupled_space is None else 'given'}; mode "
                f"{self.mode!r} {needs}"
            )
        return self

    def optimizer(self, subblock: Subblock, variant: str) -> OptimizerConfig:
        """Return one variant's optimiser settings; of several overrides that name it the last counts."""
        settings = {name: getattr(self, name) for name in OptimizerConfig.model_fields}
        for override in self.overrides:
            if override.subblock == subblock and variant in override.variants:
                settings |= override.model_dump(include=set(settings), exclude_none=True)
        return OptimizerConfig.model_validate(settings)


class BlockScoresConfig(Frozen):
    """Replace-1-block scores on the mixture's validation tokens (Puzzle, section 4.2).

    `task` adds the error on multiple-choice items that evaluation never asks (Puzzle, appendix F.1.4); null: no task.
    """

    tokens: Positive = Field(description="validation tokens of distillation_mix")
    depth_steps: Positive = Field(
        description="how often leaving out each whole layer is measured, one more gone each time, at most until all "
        "are; 1: around the parent alone. It orders layers for the method drop_by_score"
    )
    task: MultipleChoiceSet | None = Field(description="null: no task")
    precision: Precision = Field(description="of weights and arithmetic")
