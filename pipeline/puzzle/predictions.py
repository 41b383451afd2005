"""Predicted and counted quantities of any choice of blocks, and a target's limits as linear rows. Pure.

Every quantity a target can limit is a fixed part plus a cost per block, so a limit is `fixed + sum of costs <= upper`:

    decode_speed    batch_size / decode_s >= bound          becomes  decode_ms <= 1000 * batch_size / bound
    prefill_speed   batch_size * prompt_tokens / prefill_s  becomes  prefill_ms <= 1000 * batch_size * prompt / bound
    latency_ms      prefill_ms + generation_tokens * decode_ms
    memory_mib      weights + KV cache of batch_size * (prompt_tokens + generation_tokens) tokens
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


SPEEDS = ("decode_speed", "prefill_speed")
TIMED = (*SPEEDS, "latency_ms")


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
        """Return the uncalibrated time of one block."""
        attention = (scenario, phase, "attention", block.attention.key)
        ffn = (scenario, phase, "ffn", block.ffn.key)
        for key in (attention, ffn):
            if key not in self.time_ms:
                raise RecipeError(f"block_profile has no time for {' '.join(key)}: materialize block_profile again")
        return self.time_ms[attention] + self.time_ms[ffn]

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
    """One limit of a target as `fixed + sum of cost(block) <= upper`; `reference` is the parent's own total."""

    limit: Limit
    name: str
    fixed: float
    upper: float
    reference: float
    work: float
    cost: Mapping[str, float]

    def total(self, blocks: Sequence[BlockSpec]) -> float:
        """Return what a choice of blocks needs."""
        return self.fixed + sum(self.cost[block.key] for block in blocks)

    def quantity(self, total: float) -> float:
        """Return a total in the unit of the limit's bound: a speed, or a ratio to the parent where it is relative."""
        if self.limit.quantity in SPEEDS:
            return self.reference / total if self.limit.relative_to == "parent" else 1000.0 * self.work / total
        return total / self.reference if self.limit.relative_to == "parent" else total


def linear_limits(
    limits: Sequence[Limit], *, costs: CostModel, blocks: Sequence[BlockSpec], speed_margin: float
) -> tuple[LinearLimit, ...]:
    """Return the rows of a target's limits, with the cost of every block that may be chosen.

    A predicted time must stay below its bound by the share `speed_margin`, because what is measured later scatters
    around the prediction; counted quantities need none.
    """
    distinct = {block.key: block for block in blocks}
    return tuple(_linear(limit, costs=costs, blocks=distinct, speed_margin=speed_margin) for limit in limits)


def describe_limit(limit: Limit) -> str:
    """Return a limit as a person would write it: `decode_speed (chat) >= 1.5 x parent`."""
    where = "" if limit.scenario is None else f" ({limit.scenario})"
    sign = ">=" if limit.quantity in SPEEDS else "<="
    return f"{limit.quantity}{where} {sign} {limit.bound:,g}{' x parent' if limit.relative_to == 'parent' else ''}"


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
        cached = scenario.batch_size * (scenario.prompt_tokens + scenario.generation_tokens)
        found |= {
            f"{scenario.name}_prefill_ms": time_ms["prefill"],
            f"{scenario.name}_decode_ms": time_ms["decode"],
            f"{scenario.name}_prefill_speedup": parent_ms["prefill"] / time_ms["prefill"],
            f"{scenario.name}_decode_speedup": parent_ms["decode"] / time_ms["decode"],
            f"{scenario.name}_latency_ms": time_ms["prefill"] + scenario.generation_tokens * time_ms["decode"],
            f"{scenario.name}_memory_mib": (num_parameters * costs.bytes_per_value + kv_bytes * cached) / MIB,
        }
    return found


def headline_scenario(limits: Sequence[Limit], quantity: str, *, profile: ProfileConfig) -> str:
    """Return the scenario of the first limit on `quantity`, or the profile's first: the one a headline metric is of."""
    named = [limit.scenario for limit in limits if limit.quantity == quantity and limit.scenario is not None]
    return named[0] if named else profile.scenarios[0].name


def _linear(limit: Limit, *, costs: CostModel, blocks: Mapping[str, BlockSpec], speed_margin: float) -> LinearLimit:
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
    weight: dict[Phase, float] = {
        "prefill": float(limit.quantity in ("prefill_speed", "latency_ms")),
        "decode": {"decode_speed": 1.0, "latency_ms": float(scenario.generation_tokens)}.get(limit.quantity, 0.0),
    }
    entries = {phase: costs.calibration.get(scenario.name, phase) for phase in PHASES}
    factor = {phase: weight[phase] * entries[phase].factor for phase in PHASES}
    fixed = sum(factor[phase] * costs.sum_ms((), scenario.name, phase) for phase in PHASES)
    cost = {
        key: sum(factor[phase] * costs.block_ms(block, scenario.name, phase) for phase in PHASES)
        for key, block in blocks.items()
    }
    reference = sum(weight[phase] * entries[phase].parent_ms for phase in PHASES)
    tokens = 1 if limit.quantity == "decode_speed" else scenario.prompt_tokens
    return fixed, cost, reference, scenario.batch_size * tokens


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
    cached = scenario.batch_size * (scenario.prompt_tokens + scenario.generation_tokens)

    def block_mib(block: BlockSpec) -> float:
        return per_value_mib * (block_parameters(model, block) + cached * kv_values_per_token(model, block.attention))

    fixed = per_value_mib * embedding_parameters(model)
    reference = fixed + sum(block_mib(block) for block in model.blocks)
    return fixed, {key: block_mib(block) for key, block in blocks.items()}, reference
