"""What the search minimises, and the limits and pins of the targets it is run for."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.architecture import Frozen
from pipeline.recipe.puzzle import AttentionOption, FFNOption
from pipeline.recipe.types import (
    Name,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Ratio,
)

Objective = Literal["kl", "lm_loss", "hidden_cosine", "top1_error", "task_error"]


LayerPattern = Literal["heterogeneous", "homogeneous", "homogeneous_attention", "homogeneous_ffn", "depth_only"]
"""What layers may become: any block each; one block for all; one attention, or one FFN, for all; kept or left out."""


class PoolConfig(Frozen):
    """Different answers to one programme: each shares at most `max_overlap` of its layers with any before it."""

    num_solutions: Positive = Field(description="most answers")
    max_overlap: Annotated[float, Field(ge=0, lt=1)] = Field(description="share of layers (Puzzle, appendix B: alpha)")


BatchChoice = Literal["lowest_loss", "highest_throughput"]
"""Which batch size of a swept scenario is kept: the one where the search finds the least loss, or the most tokens/s."""


class RefinementConfig(Frozen):
    """Scoring of whole children, and the rounds that improve the best of them.

    Each of at most `rounds` rounds measures blocks again with the best child's other blocks in place, and solves the
    programme with at most `max_changed_layers` layers changed; the best answer as a whole model is the next child.
    What chooses among hundreds of blocks by few tokens fits those tokens: every round reads others, one that finds
    nothing better is followed by one that averages over both, until no others are left. Whole children are compared on
    more, and the baselines on as many that chose nothing: distillation_mix.validation_tokens holds all of these.
    """

    tokens: Positive = Field(
        description="first validation tokens of distillation_mix, on which whole children are compared; as many, the "
        "last, are for the baselines"
    )
    tokens_per_round: Positive = Field(
        description="validation tokens between those two on which a round measures blocks, each round on its own"
    )
    path_steps: Positive = Field(
        description="steps in which limits are tightened from the parent's needs to the target's for one more child to "
        "begin at, each chosen by scores around the child before it, which cost what a round's do; 1: no such child"
    )
    rounds: Annotated[int, Field(ge=0)] = Field(description="most rounds; 0: none, and no steps")
    answers_per_step: Positive = Field(
        description="children that a round proposes for each number of changed layers: the most, its half, ... and 1"
    )
    max_changed_layers: Positive = Field(
        description="most layers in which an answer may differ from the child that it starts from"
    )

    @property
    def num_reads(self) -> int:
        """How many steps and rounds there may be, each of which reads tokens of its own."""
        return self.path_steps - 1 + self.rounds if self.rounds else 0


class SearchConfig(Frozen):
    """The integer programme: which score it minimises, when the solver may stop, and what is done with its answers.

    `layers` says what a child's layers have in common. `heterogeneous`: nothing. `homogeneous`: all are the same block.
    `homogeneous_attention` and `homogeneous_ffn`: all have the same attention, or the same FFN. `depth_only`: each is
    the parent's or is left out whole.
    """

    objective: Objective = Field(
        description="score to minimise: KL to the parent or LM loss, nats per token; cosine distance to the parent's "
        "last hidden states; share of tokens with another likeliest next token than the parent's; share of wrong "
        "answers to block_scores.task"
    )
    layers: LayerPattern = Field(description="what a child's layers have in common")
    pool: PoolConfig
    refinement: RefinementConfig
    batch_choice: BatchChoice = Field(description="which batch size of a swept scenario is kept")
    time_limit_s: PositiveFloat = Field(
        description="seconds that one programme may take; the best answer by then is taken, and a pool ends where a "
        "later one has none"
    )
    relative_gap: NonNegativeFloat = Field(
        description="share by which an answer may exceed the solver's lower bound; 0: proven optimal"
    )
    max_recalibrations: Annotated[int, Field(ge=0)] = Field(
        description="times that the search is repeated with what the measured child says of speed, when it misses a "
        "limit; never with the roofline of a named device"
    )
    speed_margin: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="share by which predicted times must beat their bounds"
    )
    speed_tolerance: Ratio = Field(description="share by which measured times may miss their bounds")

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

    quantity: Quantity = Field(description="what is limited")
    scenario: Name | None = Field(
        description="of block_profile; null for cached_tokens, num_parameters and kv_bytes_per_token"
    )
    bound: PositiveFloat = Field(description="in the quantity's unit, or a multiple of the parent's value")
    relative_to: Literal["parent", "absolute"] = Field(
        description="`parent` makes the bound a multiple of the parent's value"
    )
    device_memory_gb: PositiveFloat | None = Field(
        default=None, description="10^9 bytes of all devices that hold the model together; for cached_tokens alone"
    )

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

    layers: Annotated[tuple[int, ...], Field(min_length=1)] = Field(description="numbers of layers, from 0")
    attention: AttentionOption | None = Field(default=None, description="the one attention that is left; null: any")
    ffn: FFNOption | None = Field(default=None, description="the one FFN that is left; null: any")


class Requirements(Frozen):
    """What a child must reach, and what is decided for the search in advance."""

    limits: tuple[Limit, ...]
    pins: tuple[Pin, ...]


class Target(Requirements):
    """Requirements under a name; targets are the partitions of the graph."""

    description: str = Field(description="in words, for reports")

    @property
    def requirements(self) -> Requirements:
        """The part that changes a result, without the prose."""
        return Requirements(limits=self.limits, pins=self.pins)
