"""What block distillation costs, and how it is cut by that: FLOPs, bytes, stretches of layers, rounds. Pure.

Planning, the stage and the bench share these figures.
"""

import itertools
from collections.abc import Iterable, Sequence

from pipeline.architecture import Architecture, BlockSpec
from pipeline.costs import attention_parameters, block_parameters, ffn_parameters
from pipeline.puzzle.block_keys import BlockKey

# Weights and two moments of AdamW in fp32; gradients exist for one block at a time.
STATE_BYTES_PER_PARAMETER = 12.0
GRADIENT_BYTES_PER_PARAMETER = 4.0


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


def held_bytes(architecture: Architecture, keys: Iterable[BlockKey]) -> float:
    """Return what training these blocks at once holds beside activations: all their state and the largest gradient."""
    sizes = [block_parameters(architecture, key.block) for key in keys]
    return STATE_BYTES_PER_PARAMETER * sum(sizes) + GRADIENT_BYTES_PER_PARAMETER * max(sizes, default=0)


def bounded_rounds(
    architecture: Architecture, keys: Iterable[BlockKey], *, max_bytes: float | None
) -> tuple[tuple[BlockKey, ...], ...]:
    """Return the blocks in rounds that each hold at most `max_bytes`, in order of layers; one that is larger, alone."""
    rounds: list[list[BlockKey]] = []
    total = largest = 0
    for key in sorted(keys, key=lambda key: key.layer):
        size = block_parameters(architecture, key.block)
        total, largest = total + size, max(largest, size)
        held = STATE_BYTES_PER_PARAMETER * total + GRADIENT_BYTES_PER_PARAMETER * largest
        if rounds and (max_bytes is None or held <= max_bytes):
            rounds[-1].append(key)
        else:
            rounds.append([key])
            total = largest = size
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


def _forward_flops(architecture: Architecture, block: BlockSpec, *, context_tokens: int) -> float:
    products = 4.0 * architecture.num_attention_heads * architecture.head_dim * context_tokens / 2
    flops = 2.0 * attention_parameters(architecture, block.attention) + 2.0 * ffn_parameters(architecture, block.ffn)
    return flops + products * (block.attention.kind == "gqa")
