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
    """Other options for some layers; None keeps the space's own list."""

    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    attention: tuple[AttentionOption, ...] | None = None
    ffn: tuple[FFNOption, ...] | None = None


class SearchSpaceConfig(Frozen):
    """The variants of each layer: key/value heads, FFN widths, shares of the parent's, `parent`, `linear`, `no_op`.

    `preset: super` or `preset: paper` in a recipe stands for both lists.
    `portable` keeps to what stock vLLM and llama.cpp run: real attention in layer 0, FFN widths that are multiples of
    256, no linear subblocks.
    """

    attention: Annotated[tuple[AttentionOption, ...], Field(min_length=1)]
    ffn: Annotated[tuple[FFNOption, ...], Field(min_length=1)]
    overrides: tuple[LayerOverride, ...]
    portable: bool

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
    """Calibration, and how variants are cut by it.

    The channels of narrower FFNs are removed in `channel_rounds` steps, each measured with those already removed left
    out; 1 is the paper's independent contribution. `kv_heads` gives fewer key/value heads the `mean` of a group's
    (Puzzle, appendix A), or keeps the heads of the largest `contribution` and lets the queries of the others, their
    output zeroed, learn again.
    """

    tokens: Positive
    batch_size: Positive
    channel_rounds: Positive
    kv_heads: KVHeadMode
    precision: Precision


BlockLoss = Literal["tensor", "token", "kl"]
Subblock = Literal["attention", "ffn", "pair"]
"""What is trained as one: a subblock by itself, or both of a layer."""


class VariantOverride(Frozen):
    """Other training settings for some variants: `kv1`, `ffn256`, `linear`, a pair as `kv1+ffn256`; None keeps them."""

    subblock: Subblock
    variants: Annotated[tuple[str, ...], Field(min_length=1)]
    learning_rate: PositiveFloat | None = None
    warmup_ratio: Ratio | None = None
    max_grad_norm: PositiveFloat | None = None


class CoupledSpace(Frozen):
    """The options whose pairs the hybrid trains together."""

    attention: Annotated[tuple[AttentionOption, ...], Field(min_length=1)]
    ffn: Annotated[tuple[FFNOption, ...], Field(min_length=1)]


class BlockLibraryConfig(Frozen):
    """Block-wise local distillation (Puzzle, section 3).

    `mode` trains every variant beside the parent's other subblock (`decoupled`), every attention x FFN pair of a layer
    as one block (`coupled`), or every variant and the pairs of `coupled_space` besides (`hybrid`). `loss` divides the
    squared error by the squared output of the whole batch (`tensor`, the paper's) or token by token, or estimates the
    final KL from the gradient of the parent's log-probabilities (`kl`). The first `closed_form_tokens` of `tokens` give
    each variant's last matrix a least-squares start; 0: the paper's.
    """

    mode: Literal["decoupled", "coupled", "hybrid"]
    coupled_space: CoupledSpace | None
    tokens: Positive
    closed_form_tokens: Annotated[int, Field(ge=0)]
    loss: BlockLoss
    batch_size: Positive
    learning_rate: PositiveFloat
    min_learning_rate_ratio: Ratio
    warmup_ratio: Ratio
    schedule: Literal["cosine", "constant"]
    weight_decay: NonNegativeFloat
    betas: tuple[Ratio, Ratio]
    max_grad_norm: PositiveFloat
    overrides: tuple[VariantOverride, ...]
    precision: Precision

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

    tokens: Positive
    task: MultipleChoiceSet | None
    precision: Precision
