"""What block distillation costs, and how it is cut by that: FLOPs, bytes, stretches of layers, rounds. Pure.

Planning, the stage and the bench share these figures.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.architecture import Architecture, BlockSpec
from pipeline.costs import attention_parameters, block_parameters, ffn_parameters
from pipeline.puzzle.block_keys import BlockKey

# Weights and two moments of AdamW in fp32; gradients exist for one block at a time. Moments begin with the first step.
STATE_BYTES_PER_PARAMETER = 12.0
GRADIENT_BYTES_PER_PARAMETER = 4.0
WEIGHT_BYTES_PER_PARAMETER = 4.0
# Of the closed-form start, for a matrix that reads I and writes D values: I^2 + D I sums in fp32, and while they are
# solved four as many in fp64 beside them: the system and its factors, the right side and the solution.
SUM_BYTES = 4.0
SOLUTION_BYTES = 16.0


def training_flops_per_token(architecture: Architecture, keys: Iterable[BlockKey], *, context_tokens: int) -> float:
    """Return the FLOPs of every block's forward and backward pass over one token, the parent's pass left out.

    Two per weight forward, four backward; a frozen FFN behind an attention variant takes two forward and two backward.
    Attention's scores and sums take 4 * heads * head_dim * context / 2 forward (causal) and twice that backward.
    """
    parent = architecture.homogeneous_block()
    flops = 0.0
    for key in keys:
        flops += 3 * _forward_flops(architecture, key.block, context_tokens=context_tokens)
        if key.subblock == "attention":
            flops += 4.0 * ffn_parameters(architecture, parent.ffn)
    return flops


def parent_flops_per_token(architecture: Architecture, *, num_layers: int, context_tokens: int) -> float:
    """Return the FLOPs of the parent's pass through that many layers over one token."""
    return num_layers * _forward_flops(architecture, architecture.homogeneous_block(), context_tokens=context_tokens)


def flops_per_token(architecture: Architecture, keys: Sequence[BlockKey], *, context_tokens: int) -> float:
    """Return the FLOPs of one run that trains these blocks, over one token; the parent runs as far as the last."""
    num_layers = max((key.layer for key in keys), default=-1) + 1
    parent = parent_flops_per_token(architecture, num_layers=num_layers, context_tokens=context_tokens)
    return parent + training_flops_per_token(architecture, keys, context_tokens=context_tokens)


def flops_of_separate_runs(
    architecture: Architecture, keys: Sequence[BlockKey], *, context_tokens: int
) -> tuple[float, float]:
    """Return the FLOPs over one token of a run for each variant, all layers in it, and of a run for each block."""
    by_variant: dict[str, list[BlockKey]] = {}
    for key in keys:
        by_variant.setdefault(f"{key.subblock} {key.variant}", []).append(key)
    per_variant, per_block = (
        sum(flops_per_token(architecture, one, context_tokens=context_tokens) for one in runs)
        for runs in (by_variant.values(), [[key] for key in keys])
    )
    return per_variant, per_block


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldBytes:
    """What blocks that are trained at once hold beside activations, added up block by block in the order of layers.

    `most_parameters` are the largest block's; `closed_form` is the most that the closed-form start of any layer takes
    besides weights, and `_widths` are what the last layer's refitted matrices read, half by half.
    """

    num_parameters: int = 0
    most_parameters: int = 0
    closed_form: float = 0.0
    _layer: int = -1
    _widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, architecture: Architecture, keys: Iterable[BlockKey]) -> "HeldBytes":
        """Return what all of them hold."""
        held = cls()
        for key in sorted(keys, key=lambda key: key.layer):
            held = held.plus(architecture, key)
        return held

    def plus(self, architecture: Architecture, key: BlockKey) -> "HeldBytes":
        """Return what one block more makes of it, of the same layer or one behind."""
        size = block_parameters(architecture, key.block)
        widths = dict(self._widths) if key.layer == self._layer else {}
        for half, width in _refitted_widths(architecture, key.block):
            widths[half] = (*widths.get(half, ()), width)
        starts = [_closed_form_bytes(architecture.hidden_size, of_half) for of_half in widths.values()]
        return HeldBytes(
            num_parameters=self.num_parameters + size,
            most_parameters=max(self.most_parameters, size),
            closed_form=max(self.closed_form, *starts),
            _layer=key.layer,
            _widths=widths,
        )

    @property
    def weights(self) -> float:
        """What they hold before the first step of AdamW."""
        return WEIGHT_BYTES_PER_PARAMETER * self.num_parameters

    @property
    def training(self) -> float:
        """All their state and the largest gradient."""
        return STATE_BYTES_PER_PARAMETER * self.num_parameters + GRADIENT_BYTES_PER_PARAMETER * self.most_parameters

    def most(self, *, has_closed_form: bool) -> float:
        """The most at any moment: in training, or before it weights and the closed-form start of one layer."""
        return max(self.training, self.weights + self.closed_form) if has_closed_form else self.training


def bounded_rounds(
    architecture: Architecture, keys: Iterable[BlockKey], *, max_bytes: float | None, has_closed_form: bool
) -> tuple[tuple[BlockKey, ...], ...]:
    """Return the blocks in rounds that each hold at most `max_bytes`, in order of layers; one that is larger, alone."""
    rounds: list[list[BlockKey]] = []
    held = HeldBytes()
    for key in sorted(keys, key=lambda key: key.layer):
        held = held.plus(architecture, key)
        if rounds and (max_bytes is None or held.most(has_closed_form=has_closed_form) <= max_bytes):
            rounds[-1].append(key)
        else:
            rounds.append([key])
            held = HeldBytes().plus(architecture, key)
    return tuple(tuple(one) for one in rounds)


def layer_costs(architecture: Architecture, keys: Iterable[BlockKey], *, context_tokens: int) -> tuple[float, ...]:
    """Return each layer's share of the FLOPs per token, its part of the parent's pass included."""
    by_layer: dict[int, list[BlockKey]] = {}
    for key in keys:
        by_layer.setdefault(key.layer, []).append(key)
    one_layer = parent_flops_per_token(architecture, num_layers=1, context_tokens=context_tokens)
    return tuple(
        one_layer + training_flops_per_token(architecture, by_layer.get(layer, ()), context_tokens=context_tokens)
        for layer in range(architecture.num_hidden_layers)
    )


def split_layers(costs: Sequence[float], num_parts: int) -> tuple[range, ...]:
    """Return at most that many stretches of layers of about equal cost, none empty, in order.

    Stretch k ends behind the layer at which the running sum comes closest to (k + 1) / num_parts of the whole.
    """
    num_layers = len(costs)
    sums = [sum(costs[:index]) for index in range(num_layers + 1)]
    num_parts = min(num_parts, num_layers)
    ends = [0]
    for part in range(1, num_parts + 1):
        # Leaves at least one layer for each stretch that follows.
        candidates = range(ends[-1] + 1, num_layers - (num_parts - part) + 1)
        ends.append(min(candidates, key=lambda end: abs(sums[end] - sums[-1] * part / num_parts)))
    ends[-1] = num_layers
    return tuple(range(start, end) for start, end in itertools.pairwise(ends))


def _refitted_widths(architecture: Architecture, block: BlockSpec) -> Iterator[tuple[str, int]]:
    """Give each half of a block with what its last matrix reads."""
    for half, spec, width in (
        ("attention", block.attention, architecture.num_attention_heads * architecture.head_dim),
        ("ffn", block.ffn, block.ffn.intermediate_size or 0),
    ):
        if spec.kind != "no_op":
            yield half, architecture.hidden_size if spec.kind == "linear" else width


def _closed_form_bytes(hidden_size: int, widths: Iterable[int]) -> float:
    """Return the most that the systems of one half of a layer hold: all sums and a product to add, or a solution.

    They are solved from the narrowest to the widest, each dropped before the next.
    """
    widths = sorted(widths)
    sums = [SUM_BYTES * width * (width + hidden_size) for width in widths]
    product = SUM_BYTES * widths[-1] * max(widths[-1], hidden_size)
    solving = [sum(sums[number:]) + SOLUTION_BYTES / SUM_BYTES * one for number, one in enumerate(sums)]
    return max(sum(sums) + product, *solving)


def _forward_flops(architecture: Architecture, block: BlockSpec, *, context_tokens: int) -> float:
    products = 4.0 * architecture.num_attention_heads * architecture.head_dim * context_tokens / 2
    flops = 2.0 * attention_parameters(architecture, block.attention) + 2.0 * ffn_parameters(architecture, block.ffn)
    return flops + products * (block.attention.kind == "gqa")
