"""Search space, block library, scores, profile, search, targets and fusion of a recipe."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.architecture import Frozen
from pipeline.devices import DEVICES
from pipeline.recipe.data import MultipleChoiceSet
from pipeline.recipe.training import OptimizerConfig
from pipeline.recipe.types import (
    Backend,
    Name,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Precision,
    Ratio,
    ServedPrecision,
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


class Scenario(Frozen):
    """One way the model is used: a batch of prompts, each answered with generation_tokens.

    A decode step is timed half-way through the generation: it costs what the steps cost on average. A list as
    `batch_size` in a recipe stands for one scenario each, which `sweep` names after the one that was written.
    """

    name: Name
    batch_size: Positive
    prompt_tokens: Positive
    generation_tokens: Positive
    sweep: Name | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens of the whole batch."""
        return self.batch_size * (self.prompt_tokens + self.generation_tokens)


class ProfileConfig(Frozen):
    """What blocks cost in time, by `backend`.

    `torch`, `llama_cpp` and `vllm` measure where the stage runs; `roofline` computes for a named device.

    Times are measured in `precision`, the median over `repeats` kept and `warmups` runs thrown away; whole models are
    always measured so, in the backend itself or, beside a roofline, in torch. Weights and cached values are counted,
    and a roofline computes, in `served_precision`, the one the child will be deployed in. A roofline may split the
    model over `tensor_parallel_size` such devices.
    """

    backend: Literal["torch", "llama_cpp", "vllm", "roofline"]
    device: Name | None = None
    tensor_parallel_size: Positive | None = None
    scenarios: Annotated[tuple[Scenario, ...], Field(min_length=1)]
    precision: Precision
    served_precision: ServedPrecision
    num_threads: Positive
    warmups: Positive
    repeats: Positive

    @model_validator(mode="before")
    @classmethod
    def _write_out_batch_sizes(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("scenarios"), list):
            return data
        written: list[Any] = []
        for scenario in data["scenarios"]:
            sizes = scenario.get("batch_size") if isinstance(scenario, dict) else None
            if not isinstance(sizes, list):
                written.append(scenario)
                continue
            if len(set(map(str, sizes))) < len(sizes) or len(sizes) < 2:
                raise ValueError(
                    f"block_profile.scenarios: {scenario.get('name')} has batch_size {sizes}: give one number, or two "
                    "and more different ones"
                )
            name = scenario.get("name")
            written += [{**scenario, "name": f"{name}-batch-{one}", "batch_size": one, "sweep": name} for one in sizes]
        return {**data, "scenarios": written}

    @model_validator(mode="after")
    def _scenarios_have_names_of_their_own(self) -> Self:
        names = [*(scenario.name for scenario in self.scenarios), *self.sweeps]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"block_profile.scenarios has {twice[0]!r} twice: name each scenario differently")
        return self

    @property
    def sweeps(self) -> dict[str, tuple[Scenario, ...]]:
        """The scenarios that were written with several batch sizes, by name, one scenario per size."""
        names = dict.fromkeys(scenario.sweep for scenario in self.scenarios if scenario.sweep is not None)
        return {name: tuple(one for one in self.scenarios if one.sweep == name) for name in names}

    @property
    def num_devices(self) -> int:
        """How many devices hold the model together."""
        return self.tensor_parallel_size or 1

    def scenario(self, name: str) -> Scenario:
        """Return a scenario by name."""
        return next(scenario for scenario in self.scenarios if scenario.name == name)

    @property
    def measured_in(self) -> Backend:
        """What times whole models: a roofline times nothing, and torch is there wherever a stage runs."""
        return "torch" if self.backend == "roofline" else self.backend

    @model_validator(mode="after")
    def _device_belongs_to_roofline(self) -> Self:
        if self.backend != "roofline":
            for name, value in (("device", self.device), ("tensor_parallel_size", self.tensor_parallel_size)):
                if value is not None:
                    raise ValueError(
                        f"block_profile.{name} is {value!r} with backend {self.backend!r}, which measures the "
                        "machine it runs on: take it out, or set backend: roofline"
                    )
            batched = [scenario.name for scenario in self.scenarios if scenario.batch_size > 1]
            if self.backend == "llama_cpp" and batched:
                raise ValueError(
                    f"block_profile.scenarios: {batched[0]} has a batch_size above 1, and llama-bench times one "
                    "sequence; set it to 1, or backend: torch"
                )
            return self
        if self.device not in DEVICES:
            raise ValueError(
                f"block_profile.device is {self.device!r}; backend 'roofline' needs one of {', '.join(DEVICES)}"
            )
        if self.served_precision == "fp8" and not DEVICES[self.device].computes_fp8:
            able = ", ".join(name for name, device in DEVICES.items() if device.computes_fp8)
            raise ValueError(
                f"block_profile.device {self.device} does not compute in the served_precision fp8; choose {able}, or "
                "served_precision: bf16"
            )
        return self


Objective = Literal["kl", "lm_loss", "hidden_cosine", "top1_error", "task_error"]


LayerPattern = Literal["heterogeneous", "homogeneous", "homogeneous_attention", "homogeneous_ffn", "depth_only"]
"""What layers may become: any block each; one block for all; one attention, or one FFN, for all; kept or left out."""


class PoolConfig(Frozen):
    """Different answers to one programme: each shares at most `max_overlap` of its layers with any before it.

    (Puzzle, appendix B: alpha.)
    """

    num_solutions: Positive
    max_overlap: Annotated[float, Field(ge=0, lt=1)]


BatchChoice = Literal["lowest_loss", "highest_throughput"]
"""Which batch size of a swept scenario is kept: the one where the search finds the least loss, or the most tokens/s."""


class RefinementConfig(Frozen):
    """Scoring of whole children, and the rounds that improve the best of them.

    Each of at most `rounds` rounds measures every block again with the best child's other blocks in place, and solves
    the programme with at most `max_changed_layers` layers changed. It ends when no answer is better as a whole model.
    """

    tokens: Positive
    rounds: Annotated[int, Field(ge=0)]
    max_changed_layers: Positive


class SearchConfig(Frozen):
    """The integer programme: which score it minimises, when the solver may stop, and what is done with its answers.

    `layers` says what a child's layers have in common. `heterogeneous`: nothing. `homogeneous`: all are the same block.
    `homogeneous_attention` and `homogeneous_ffn`: all have the same attention, or the same FFN. `depth_only`: each is
    the parent's or is left out whole. Of a scenario with several batch sizes, `batch_choice` keeps the one with the
    `lowest_loss` or the `highest_throughput`.
    Predicted times must beat their bounds by the share `speed_margin`; measured ones may miss theirs by the share
    `speed_tolerance`.
    """

    objective: Objective
    layers: LayerPattern
    pool: PoolConfig
    refinement: RefinementConfig
    batch_choice: BatchChoice
    time_limit_s: PositiveFloat
    relative_gap: NonNegativeFloat
    max_recalibrations: Annotated[int, Field(ge=0)]
    speed_margin: Annotated[float, Field(ge=0, lt=1)]
    speed_tolerance: Ratio

    def most_rounds(self, *, num_layers: int) -> int:
        """Return how many rounds of refinement there can be: none where all layers only change together and may not."""
        if self.layers == "homogeneous" and self.refinement.max_changed_layers < num_layers:
            return 0
        return self.refinement.rounds


Quantity = Literal[
    "decode_speed",
    "prefill_speed",
    "throughput",
    "latency_ms",
    "time_to_first_token_ms",
    "weights_and_cache_mib",
    "memory_mib",
    "cached_tokens",
    "num_parameters",
    "kv_bytes_per_token",
]
COUNTED_WITHOUT_SCENARIO = ("cached_tokens", "num_parameters", "kv_bytes_per_token")


class Limit(Frozen):
    """One requirement on a child: a measured or counted quantity, an absolute bound or one relative to the parent.

    `decode_speed` and `prefill_speed` are tokens per second of one phase of `scenario`; `throughput` is the scenario's
    prompt and generated tokens per second of its `latency_ms` (Puzzle, appendix B); `time_to_first_token_ms` is its
    prefill. `weights_and_cache_mib` is weights plus the scenario's KV cache, what published memory limits count;
    `memory_mib` adds the activations of its prefill. `cached_tokens` is how many tokens' KV cache fits beside the
    weights in `device_memory_gb` (10^9 bytes, all devices that hold the model together). The rest are counted. Speeds
    and cached tokens are lower bounds, everything else upper bounds.
    """

    quantity: Quantity
    scenario: Name | None
    bound: PositiveFloat
    relative_to: Literal["parent", "absolute"]
    device_memory_gb: PositiveFloat | None = None

    @model_validator(mode="after")
    def _measured_quantities_name_a_scenario(self) -> Self:
        needs = self.quantity not in COUNTED_WITHOUT_SCENARIO
        if needs != (self.scenario is not None):
            raise ValueError(
                f"limit {self.quantity} has scenario {self.scenario!r}; it {'needs one' if needs else 'takes none'}"
            )
        return self

    @model_validator(mode="after")
    def _cached_tokens_name_a_memory(self) -> Self:
        needs = self.quantity == "cached_tokens"
        if needs != (self.device_memory_gb is not None):
            raise ValueError(
                f"limit {self.quantity} has device_memory_gb {self.device_memory_gb}; it "
                f"{'needs one' if needs else 'takes none'}"
            )
        if needs and self.relative_to == "parent":
            raise ValueError(
                "limit cached_tokens is relative to the parent, beside which none may fit; give the number of tokens "
                "and relative_to: absolute"
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
