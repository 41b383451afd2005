"""A target's limits as linear rows, and the rows of what is counted rather than timed. Pure.

Every quantity that a target can limit is a fixed part, a cost per block and, for activations, the largest peak of any:

    weights_and_cache_mib   weights + KV cache of batch_size * (prompt_tokens + generation_tokens) tokens
    memory_mib              the same + the most that the prefill holds at once, layer after layer
    cached_tokens           (device_memory - weights) / kv_bytes_per_token >= bound
                                                becomes  weights + bound * kv_bytes_per_token <= memory
    num_parameters, kv_bytes_per_token

All but num_parameters are those of the devices together, which may hold copies of key/value heads (pipeline.costs).
pipeline.puzzle.predictions has the timed ones. Activations are a maximum and not a sum: the programme takes it as a
variable, so that a child that is narrow throughout is granted what it saves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.architecture import Architecture, BlockSpec
from pipeline.costs import (
    BYTES_PER_PARAMETER,
    MIB,
    ServedMemory,
    block_activation_bytes,
    block_parameters,
    embedding_parameters,
    kv_values_per_token,
    outer_activation_bytes,
    served_memory,
)
from pipeline.puzzle.totals import least_total
from pipeline.recipe import Limit, ProfileConfig, Scenario

SPEEDS = ("decode_speed", "prefill_speed", "throughput")
TIMED = (*SPEEDS, "latency_ms", "time_to_first_token_ms")
LOWER_BOUNDS = (*SPEEDS, "cached_tokens")

GB = 10**9
# Without attention nothing is cached and any number of tokens fits; finite, so that JSON carries it.
ANY_NUMBER_OF_TOKENS = 1e15


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearLimit:
    """One limit of a target as `fixed + sum of cost(block) + largest peak(block) <= upper`.

    `reference` is the parent's own total; without `peak` no block has one. `kv_bytes` holds each block's cache bytes
    per token where the limit is on cached tokens: its total is weights and the cache of `bound` tokens, and another
    number of tokens is read out of it with these.
    """

    limit: Limit
    name: str
    fixed: float
    upper: float
    reference: float
    work: float
    cost: Mapping[str, float]
    kv_bytes: Mapping[str, float] | None = None
    peak: Mapping[str, float] | None = None

    def total(self, blocks: Sequence[BlockSpec]) -> float:
        """Return what a choice of blocks needs."""
        used = self.fixed + sum(self.cost[block.key] for block in blocks)
        return used if self.peak is None else used + max(self.peak[block.key] for block in blocks)

    def reached(self, blocks: Sequence[BlockSpec]) -> float:
        """Return what a choice of blocks reaches, in the unit of the limit's bound."""
        total = self.total(blocks)
        if self.kv_bytes is not None:
            kv_bytes = sum(self.kv_bytes[block.key] for block in blocks)
            weights_bytes = total - self.limit.bound * kv_bytes
            return cached_tokens(self.upper, weights_bytes=weights_bytes, kv_bytes_per_token=kv_bytes)
        return self._in_unit(total)

    def best(self, layers: Sequence[Sequence[BlockSpec]]) -> float:
        """Return the best that any choice of one block per layer reaches, in the unit of the limit's bound."""
        if self.kv_bytes is None:
            costs = [[self.cost[block.key] for block in layer] for layer in layers]
            peak = self.peak
            peaks = None if peak is None else [[peak[block.key] for block in layer] for layer in layers]
            return self._in_unit(least_total(self.fixed, costs, peaks))
        # A ratio of two sums does not separate over layers. For a given number of tokens the least bytes do, and the
        # tokens that fit beside that choice never are fewer; when they are no more, nothing holds more (Dinkelbach).
        kv_bytes, tokens = self.kv_bytes, 0.0
        while True:
            chosen = [
                min(layer, key=lambda block: self.cost[block.key] + (tokens - self.limit.bound) * kv_bytes[block.key])
                for layer in layers
            ]
            reached = self.reached(chosen)
            if reached <= tokens * (1 + 1e-12):
                return reached
            tokens = reached

    def _in_unit(self, total: float) -> float:
        """Return a total as a speed, or as a ratio to the parent where the bound is relative."""
        if self.limit.quantity in SPEEDS:
            return self.reference / total if self.limit.relative_to == "parent" else 1000.0 * self.work / total
        return total / self.reference if self.limit.relative_to == "parent" else total


def cached_tokens(device_memory_bytes: float, *, weights_bytes: float, kv_bytes_per_token: float) -> float:
    """Return how many tokens' KV cache fits beside the weights: none where these do not fit themselves."""
    free_bytes = max(0.0, device_memory_bytes - weights_bytes)
    return free_bytes / kv_bytes_per_token if kv_bytes_per_token else ANY_NUMBER_OF_TOKENS * (free_bytes > 0)


def counted_limit(
    limit: Limit, *, model: Architecture, profile: ProfileConfig, blocks: Mapping[str, BlockSpec]
) -> LinearLimit:
    """Return the row of a limit on a quantity that is counted; `blocks` are those that may be chosen, by key."""
    size, num_devices = BYTES_PER_PARAMETER[profile.served_precision], profile.num_devices
    row = partial(_row, limit, model=model, blocks=blocks)
    if limit.quantity == "num_parameters":
        return row(per_parameter=1.0, per_kv_value=0.0, num_devices=1)
    if limit.quantity == "kv_bytes_per_token":
        return row(per_parameter=0.0, per_kv_value=size, num_devices=num_devices)
    if limit.quantity == "cached_tokens":
        return row(per_parameter=size, per_kv_value=size * limit.bound, num_devices=num_devices)
    assert limit.scenario is not None  # as every other counted limit has one
    scenario = profile.scenario(limit.scenario)
    peaks = None
    if limit.quantity == "memory_mib":
        peaks = _activations_mib(model, [*blocks.values(), *model.blocks], scenario=scenario, profile=profile)
    return row(
        per_parameter=size / MIB,
        per_kv_value=size / MIB * scenario.num_tokens,
        num_devices=num_devices,
        peaks=peaks,
    )


def memory_of(model: Architecture, *, scenario: Scenario, profile: ProfileConfig) -> ServedMemory:
    """Return what a model needs in one scenario, in the precision and on the devices that it is served in."""
    return served_memory(
        model,
        batch_size=scenario.batch_size,
        prompt_tokens=scenario.prompt_tokens,
        generation_tokens=scenario.generation_tokens,
        bytes_per_value=BYTES_PER_PARAMETER[profile.served_precision],
        num_devices=profile.num_devices,
    )


def _row(
    limit: Limit,
    *,
    model: Architecture,
    blocks: Mapping[str, BlockSpec],
    per_parameter: float,
    per_kv_value: float,
    num_devices: int,
    peaks: Mapping[str, float] | None = None,
) -> LinearLimit:
    def kv_values(block: BlockSpec) -> int:
        return kv_values_per_token(model, block.attention, num_devices=num_devices)

    def cost(block: BlockSpec) -> float:
        weights = per_parameter * block_parameters(model, block, num_devices=num_devices)
        return weights + per_kv_value * kv_values(block)

    fixed = per_parameter * embedding_parameters(model)
    reference = fixed + sum(map(cost, model.blocks))
    if peaks is not None:
        reference += max(peaks[block.key] for block in model.blocks)
    if limit.device_memory_gb is not None:
        upper = limit.device_memory_gb * GB
    else:
        upper = reference * limit.bound if limit.relative_to == "parent" else limit.bound
    kv_bytes = None
    if limit.quantity == "cached_tokens":
        kv_bytes = {key: per_parameter * kv_values(block) for key, block in blocks.items()}
    return LinearLimit(
        limit=limit,
        name=describe_limit(limit),
        fixed=fixed,
        upper=upper,
        reference=reference,
        work=0.0,
        cost={key: cost(block) for key, block in blocks.items()},
        kv_bytes=kv_bytes,
        peak=None if peaks is None else {key: peaks[key] for key in blocks},
    )


def _activations_mib(
    model: Architecture, blocks: Sequence[BlockSpec], *, scenario: Scenario, profile: ProfileConfig
) -> dict[str, float]:
    """Return what the prefill holds at once in each block, or outside all layers where that is more."""
    prefill = {
        "batch_size": scenario.batch_size,
        "prompt_tokens": scenario.prompt_tokens,
        "bytes_per_value": BYTES_PER_PARAMETER[profile.served_precision],
        "num_devices": profile.num_devices,
    }
    outside = outer_activation_bytes(model, **prefill)
    return {block.key: max(outside, block_activation_bytes(model, block, **prefill)) / MIB for block in blocks}


def describe_limit(limit: Limit) -> str:
    """Return a limit as a person would write it: `decode_speed (chat) >= 1.5 x parent`."""
    where = "" if limit.scenario is None else f" ({limit.scenario})"
    sign = ">=" if limit.quantity in LOWER_BOUNDS else "<="
    unit = " x parent" if limit.relative_to == "parent" else ""
    unit = unit if limit.device_memory_gb is None else f" in {limit.device_memory_gb:,g} GB"
    return f"{limit.quantity}{where} {sign} {limit.bound:,g}{unit}"
