"""Predicted and counted quantities of any choice of blocks, and a target's limits as linear rows. Pure.

Every quantity a target can limit is a fixed part plus a cost per block, so a limit is `fixed + sum of costs <= upper`:

    decode_speed    batch_size / decode_s >= bound          becomes  decode_ms <= 1000 * batch_size / bound
    prefill_speed   batch_size * prompt_tokens / prefill_s  becomes  prefill_ms <= 1000 * batch_size * prompt / bound
    throughput      batch_size * (prompt_tokens + generation_tokens) / latency_s, a bound on latency_ms likewise
    latency_ms      prefill_ms + generation_tokens * decode_ms
    time_to_first_token_ms                                  prefill_ms
    memory_mib      weights + KV cache of batch_size * (prompt_tokens + generation_tokens) tokens
    cached_tokens   (device_memory - weights) / kv_bytes_per_token >= bound
                                                            becomes  weights + bound * kv_bytes_per_token <= memory
    num_parameters, kv_bytes_per_token                      counted

A bound relative to the parent multiplies (divides, for a speed) what the parent was measured or counted to need.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.architecture import Architecture, BlockSpec
from pipeline.costs import BYTES_PER_PARAMETER, MIB, block_parameters, embedding_parameters, kv_values_per_token
from pipeline.errors import RecipeError
from pipeline.puzzle.calibration import PHASES, Calibration, Phase
from pipeline.recipe import Limit, ProfileConfig, Scenario

FIXED = "fixed"

SPEEDS = ("decode_speed", "prefill_speed", "throughput")
TIMED = (*SPEEDS, "latency_ms", "time_to_first_token_ms")
LOWER_BOUNDS = (*SPEEDS, "cached_tokens")

GB = 10**9
# Without attention nothing is cached and any number of tokens fits; finite, so that JSON carries it.
ANY_NUMBER_OF_TOKENS = 1e15


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """What blocks cost on the profiled hardware.

    `time_ms` holds the profiled times by (scenario, phase, part, variant key), part being attention, ffn or fixed.
    """

    parent: Architecture
    profile: ProfileConfig
    time_ms: Mapping[tuple[str, str, str, str], float]
    calibration: Calibration

    def scenario(self, name: str) -> Scenario:
        """Return a profiled scenario by name."""
        return next(scenario for scenario in self.profile.scenarios if scenario.name == name)

    def block_ms(self, block: BlockSpec, scenario: str, phase: Phase) -> float:
        """Return the uncalibrated time of one block; a no-op that the search space leaves out takes none."""
        total_ms = 0.0
        for part, spec in (("attention", block.attention), ("ffn", block.ffn)):
            key = (scenario, phase, part, spec.key)
            if key not in self.time_ms and spec.kind != "no_op":
                raise RecipeError(f"block_profile has no time for {' '.join(key)}: materialize block_profile again")
            total_ms += self.time_ms.get(key, 0.0)
        return total_ms

    def sum_ms(self, blocks: Sequence[BlockSpec], scenario: str, phase: Phase) -> float:
        """Return the uncalibrated time of a model: its blocks and what is outside them."""
        fixed = self.time_ms[scenario, phase, FIXED, FIXED]
        return fixed + sum(self.block_ms(block, scenario, phase) for block in blocks)

    def predicted_ms(self, blocks: Sequence[BlockSpec], scenario: str, phase: Phase) -> float:
        """Return the calibrated time of a model."""
        return self.calibration.get(scenario, phase).factor * self.sum_ms(blocks, scenario, phase)

    @property
    def bytes_per_value(self) -> float:
        """Bytes of one weight or cache value in the precision the child is deployed in."""
        return BYTES_PER_PARAMETER[self.profile.served_precision]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearLimit:
    """One limit of a target as `fixed + sum of cost(block) <= upper`; `reference` is the parent's own total.

    `kv_bytes` holds each block's cache bytes per token where the limit is on cached tokens: its total is weights and
    the cache of `bound` tokens, and another number of tokens is read out of it with these.
    """

    limit: Limit
    name: str
    fixed: float
    upper: float
    reference: float
    work: float
    cost: Mapping[str, float]
    kv_bytes: Mapping[str, float] | None = None

    def total(self, blocks: Sequence[BlockSpec]) -> float:
        """Return what a choice of blocks needs."""
        return self.fixed + sum(self.cost[block.key] for block in blocks)

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
            return self._in_unit(self.fixed + sum(min(self.cost[block.key] for block in layer) for layer in layers))
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


def linear_limits(
    limits: Sequence[Limit], *, costs: CostModel, blocks: Sequence[BlockSpec], speed_margin: float
) -> tuple[LinearLimit, ...]:
    """Return the rows of a target's limits, with the cost of every block that may be chosen.

    A predicted time must stay below its bound by the share `speed_margin`, because what is measured later scatters
    around the prediction; counted quantities need none.
    """
    distinct = {block.key: block for block in blocks}
    return tuple(_linear(limit, costs=costs, blocks=distinct, speed_margin=speed_margin) for limit in limits)


def cached_tokens_limit(
    limit: Limit, *, model: Architecture, bytes_per_value: float, blocks: Mapping[str, BlockSpec]
) -> LinearLimit:
    """Return the row of a limit on cached tokens: weights and the cache of `bound` tokens, in bytes."""
    assert limit.device_memory_gb is not None

    def kv_bytes(block: BlockSpec) -> float:
        return bytes_per_value * kv_values_per_token(model, block.attention)

    def cost_bytes(block: BlockSpec) -> float:
        return bytes_per_value * block_parameters(model, block) + limit.bound * kv_bytes(block)

    fixed = bytes_per_value * embedding_parameters(model)
    return LinearLimit(
        limit=limit,
        name=describe_limit(limit),
        fixed=fixed,
        upper=limit.device_memory_gb * GB,
        reference=fixed + sum(map(cost_bytes, model.blocks)),
        work=0.0,
        cost={key: cost_bytes(block) for key, block in blocks.items()},
        kv_bytes={key: kv_bytes(block) for key, block in blocks.items()},
    )


def describe_limit(limit: Limit) -> str:
    """Return a limit as a person would write it: `decode_speed (chat) >= 1.5 x parent`."""
    where = "" if limit.scenario is None else f" ({limit.scenario})"
    sign = ">=" if limit.quantity in LOWER_BOUNDS else "<="
    unit = " x parent" if limit.relative_to == "parent" else ""
    unit = unit if limit.device_memory_gb is None else f" in {limit.device_memory_gb:,g} GB"
    return f"{limit.quantity}{where} {sign} {limit.bound:,g}{unit}"


def predict(blocks: Sequence[BlockSpec], *, costs: CostModel) -> dict[str, float]:
    """Return every predicted and counted quantity of a choice of blocks, by name."""
    model = costs.parent
    num_parameters = embedding_parameters(model) + sum(block_parameters(model, block) for block in blocks)
    kv_bytes = costs.bytes_per_value * sum(kv_values_per_token(model, block.attention) for block in blocks)
    found: dict[str, float] = {
        "num_parameters": num_parameters,
        "kv_bytes_per_token": kv_bytes,
        "num_attention_free_layers": sum(block.attention.kind != "gqa" for block in blocks),
    }
    for scenario in costs.profile.scenarios:
        time_ms = {phase: costs.predicted_ms(blocks, scenario.name, phase) for phase in PHASES}
        parent_ms = {phase: costs.calibration.get(scenario.name, phase).parent_ms for phase in PHASES}
        tokens = scenario.num_tokens
        latency_ms = time_ms["prefill"] + scenario.generation_tokens * time_ms["decode"]
        found |= {
            f"{scenario.name}_prefill_ms": time_ms["prefill"],
            f"{scenario.name}_decode_ms": time_ms["decode"],
            f"{scenario.name}_prefill_speedup": parent_ms["prefill"] / time_ms["prefill"],
            f"{scenario.name}_decode_speedup": parent_ms["decode"] / time_ms["decode"],
            f"{scenario.name}_latency_ms": latency_ms,
            f"{scenario.name}_throughput": 1000.0 * tokens / latency_ms,
            f"{scenario.name}_memory_mib": (num_parameters * costs.bytes_per_value + kv_bytes * tokens) / MIB,
        }
    return found


def headline_scenario(limits: Sequence[Limit], quantity: str, *, profile: ProfileConfig) -> str:
    """Return the scenario of the first limit on `quantity`, or the profile's first: the one a headline metric is of."""
    named = [limit.scenario for limit in limits if limit.quantity == quantity and limit.scenario is not None]
    return named[0] if named else profile.scenarios[0].name


def compared_phase(limits: Sequence[Limit], *, profile: ProfileConfig) -> tuple[str, Phase]:
    """Return scenario and phase of a target's first limit on a speed, in which its children are compared.

    Without such a limit it is decoding in the profile's first scenario.
    """
    quantity = next((limit.quantity for limit in limits if limit.quantity in SPEEDS), "decode_speed")
    phase: Phase = "prefill" if quantity == "prefill_speed" else "decode"
    return headline_scenario(limits, quantity, profile=profile), phase


def _linear(limit: Limit, *, costs: CostModel, blocks: Mapping[str, BlockSpec], speed_margin: float) -> LinearLimit:
    if limit.quantity == "cached_tokens":
        return cached_tokens_limit(limit, model=costs.parent, bytes_per_value=costs.bytes_per_value, blocks=blocks)
    fixed, cost, reference, work = _parts(limit, costs=costs, blocks=blocks)
    is_speed = limit.quantity in SPEEDS
    if limit.relative_to == "parent":
        upper = reference / limit.bound if is_speed else reference * limit.bound
    else:
        upper = 1000.0 * work / limit.bound if is_speed else limit.bound
    if limit.quantity in TIMED:
        upper *= 1 - speed_margin
    return LinearLimit(
        limit=limit,
        name=describe_limit(limit),
        fixed=fixed,
        upper=upper,
        reference=reference,
        work=work,
        cost=cost,
    )


def _parts(
    limit: Limit, *, costs: CostModel, blocks: Mapping[str, BlockSpec]
) -> tuple[float, dict[str, float], float, float]:
    """Return the fixed part, the cost of each block, the parent's total, and the tokens of work that a speed counts."""
    if limit.scenario is None:
        return (*_counted(limit, costs=costs, blocks=blocks), 0.0)
    scenario = costs.scenario(limit.scenario)
    if limit.quantity == "memory_mib":
        return (*_memory(scenario, costs=costs, blocks=blocks), 0.0)
    generated = float(scenario.generation_tokens)
    weight: dict[Phase, float] = {
        "prefill": float(limit.quantity != "decode_speed"),
        "decode": {"decode_speed": 1.0, "throughput": generated, "latency_ms": generated}.get(limit.quantity, 0.0),
    }
    entries = {phase: costs.calibration.get(scenario.name, phase) for phase in PHASES}
    factor = {phase: weight[phase] * entries[phase].factor for phase in PHASES}
    fixed = sum(factor[phase] * costs.sum_ms((), scenario.name, phase) for phase in PHASES)
    cost = {
        key: sum(factor[phase] * costs.block_ms(block, scenario.name, phase) for phase in PHASES)
        for key, block in blocks.items()
    }
    reference = sum(weight[phase] * entries[phase].parent_ms for phase in PHASES)
    work = {
        "decode_speed": scenario.batch_size,
        "prefill_speed": scenario.batch_size * scenario.prompt_tokens,
        "throughput": scenario.num_tokens,
    }
    return fixed, cost, reference, work.get(limit.quantity, 0.0)


def _counted(
    limit: Limit, *, costs: CostModel, blocks: Mapping[str, BlockSpec]
) -> tuple[float, dict[str, float], float]:
    model = costs.parent
    if limit.quantity == "num_parameters":
        fixed = float(embedding_parameters(model))
        cost = {key: float(block_parameters(model, block)) for key, block in blocks.items()}
        return fixed, cost, fixed + sum(block_parameters(model, block) for block in model.blocks)
    values = {key: kv_values_per_token(model, block.attention) for key, block in blocks.items()}
    reference = sum(kv_values_per_token(model, block.attention) for block in model.blocks)
    return (
        0.0,
        {key: costs.bytes_per_value * count for key, count in values.items()},
        costs.bytes_per_value * reference,
    )


def _memory(
    scenario: Scenario, *, costs: CostModel, blocks: Mapping[str, BlockSpec]
) -> tuple[float, dict[str, float], float]:
    model, per_value_mib = costs.parent, costs.bytes_per_value / MIB
    cached = scenario.num_tokens

    def block_mib(block: BlockSpec) -> float:
        return per_value_mib * (block_parameters(model, block) + cached * kv_values_per_token(model, block.attention))

    fixed = per_value_mib * embedding_parameters(model)
    reference = fixed + sum(block_mib(block) for block in model.blocks)
    return fixed, {key: block_mib(block) for key, block in blocks.items()}, reference
