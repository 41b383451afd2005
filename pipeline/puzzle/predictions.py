"""Predicted and counted quantities of any choice of blocks, and the linear rows of limits on time. Pure.

A timed quantity is a fixed part plus a cost per block, so a limit is `fixed + sum of costs <= upper`:

    decode_speed    batch_size / decode_s >= bound          becomes  decode_ms <= 1000 * batch_size / bound
    prefill_speed   batch_size * prompt_tokens / prefill_s  becomes  prefill_ms <= 1000 * batch_size * prompt / bound
    throughput      batch_size * (prompt_tokens + generation_tokens) / latency_s, a bound on latency_ms likewise
    latency_ms      prefill_ms + generation_tokens * decode_ms
    time_to_first_token_ms                                  prefill_ms

pipeline.puzzle.limits has what is counted. A bound relative to the parent multiplies (divides, for a speed) what the
parent was measured or counted to need.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.architecture import Architecture, BlockSpec
from pipeline.costs import BYTES_PER_PARAMETER, kv_bytes_per_token, num_parameters
from pipeline.errors import RecipeError
from pipeline.puzzle.calibration import PHASES, Calibration, Phase
from pipeline.puzzle.limits import SPEEDS, TIMED, LinearLimit, counted_limit, describe_limit, memory_of
from pipeline.recipe import Limit, ProfileConfig, Scenario

FIXED = "fixed"


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
        return self.profile.scenario(name)

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


def linear_limits(
    limits: Sequence[Limit], *, costs: CostModel, blocks: Sequence[BlockSpec], speed_margin: float
) -> tuple[LinearLimit, ...]:
    """Return the rows of a target's limits, with the cost of every block that may be chosen.

    A predicted time must stay below its bound by the share `speed_margin`, because what is measured later scatters
    around the prediction; counted quantities need none.
    """
    distinct = {block.key: block for block in blocks}
    return tuple(_linear(limit, costs=costs, blocks=distinct, speed_margin=speed_margin) for limit in limits)


def predict(blocks: Sequence[BlockSpec], *, costs: CostModel) -> dict[str, float]:
    """Return every predicted and counted quantity of a choice of blocks, by name."""
    model, profile = costs.parent.with_blocks(blocks), costs.profile
    size = BYTES_PER_PARAMETER[profile.served_precision]
    found: dict[str, float] = {
        "num_parameters": num_parameters(model),
        "kv_bytes_per_token": kv_bytes_per_token(model, bytes_per_value=size, num_devices=profile.num_devices),
        "num_attention_free_layers": sum(block.attention.kind != "gqa" for block in blocks),
    }
    for scenario in profile.scenarios:
        time_ms = {phase: costs.predicted_ms(blocks, scenario.name, phase) for phase in PHASES}
        parent_ms = {phase: costs.calibration.get(scenario.name, phase).parent_ms for phase in PHASES}
        tokens = scenario.num_tokens
        latency_ms = time_ms["prefill"] + scenario.generation_tokens * time_ms["decode"]
        memory = memory_of(model, scenario=scenario, profile=profile)
        found |= {
            f"{scenario.name}_prefill_ms": time_ms["prefill"],
            f"{scenario.name}_decode_ms": time_ms["decode"],
            f"{scenario.name}_prefill_speedup": parent_ms["prefill"] / time_ms["prefill"],
            f"{scenario.name}_decode_speedup": parent_ms["decode"] / time_ms["decode"],
            f"{scenario.name}_latency_ms": latency_ms,
            f"{scenario.name}_throughput": 1000.0 * tokens / latency_ms,
            f"{scenario.name}_weights_and_cache_mib": memory.weights_and_cache_mib,
            f"{scenario.name}_memory_mib": memory.total_mib,
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
    if limit.quantity not in TIMED:
        return counted_limit(limit, model=costs.parent, profile=costs.profile, blocks=blocks)
    fixed, cost, reference, work = _parts(limit, costs=costs, blocks=blocks)
    is_speed = limit.quantity in SPEEDS
    if limit.relative_to == "parent":
        upper = reference / limit.bound if is_speed else reference * limit.bound
    else:
        upper = 1000.0 * work / limit.bound if is_speed else limit.bound
    return LinearLimit(
        limit=limit,
        name=describe_limit(limit),
        fixed=fixed,
        upper=upper * (1 - speed_margin),
        reference=reference,
        work=work,
        cost=cost,
    )


def _parts(
    limit: Limit, *, costs: CostModel, blocks: Mapping[str, BlockSpec]
) -> tuple[float, dict[str, float], float, float]:
    """Return the fixed part, the cost of each block, the parent's total, and the tokens of work that a speed counts."""
    assert limit.scenario is not None  # as every timed limit has one
    scenario = costs.scenario(limit.scenario)
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
