"""Throughput, time to first token and cached tokens as limits, against sums and enumeration that share no code."""

import itertools
import math
from collections.abc import Sequence

import pytest

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, BlockSpec, gqa, swiglu
from pipeline.costs import served_memory
from pipeline.errors import InfeasibleError
from pipeline.puzzle.limits import ANY_NUMBER_OF_TOKENS, describe_limit
from pipeline.puzzle.mip import Candidate, Problem, solve
from pipeline.puzzle.predictions import CostModel, linear_limits, predict
from pipeline.recipe import Limit, Scenario
from tests.pipeline.puzzle.builders import limit, make_architecture, make_costs, make_profile

VARIANTS = ((gqa(2), swiglu(64)), (gqa(1), swiglu(64)), (NO_ATTENTION, swiglu(16)), (NO_ATTENTION, NO_FFN))
# Counted by hand for hidden 32, four query heads of 8, 4 bytes a value: norm 32, queries and output 32 x 32 each, keys
# and values 32 x 8 each per head; three FFN matrices and a norm of 32.
ATTENTION_PARAMETERS = {"kv2": 32 + 2 * 32 * 32 + 2 * 2 * 32 * 8, "kv1": 32 + 2 * 32 * 32 + 2 * 32 * 8, "no_op": 0}
FFN_PARAMETERS = {"ffn64": 32 + 3 * 32 * 64, "ffn16": 32 + 3 * 32 * 16, "no_op": 0}
KV_BYTES = {"kv2": 4 * 2 * 2 * 8, "kv1": 4 * 2 * 8, "no_op": 0}
OUTSIDE_PARAMETERS = 48 * 32 + 32
BATCH, PROMPT, GENERATION = 2, 8, 4  # of the builders' scenario
PARENT_OVER_SUM = 1.1  # the builders' calibration


def setting(seed: int, *, num_layers: int = 4) -> tuple[Architecture, tuple[tuple[Candidate, ...], ...], CostModel]:
    architecture = make_architecture(num_layers=num_layers)
    layers = tuple(
        tuple(
            Candidate(
                block=BlockSpec(attention=attention, ffn=ffn, parent_layers=(layer,)),
                score=index * (1 + math.sin(seed + 3 * layer + index) / 2),
            )
            for index, (attention, ffn) in enumerate(VARIANTS)
        )
        for layer in range(num_layers)
    )
    blocks = [candidate.block for candidates in layers for candidate in candidates]
    return architecture, layers, make_costs(architecture, blocks, seed=seed)


def latency_ms(blocks: tuple[BlockSpec, ...], costs: CostModel, *, generated: int) -> float:
    total = 0.0
    for phase, times in (("prefill", 1), ("decode", generated)):
        inside = sum(
            costs.time_ms["chat", phase, "attention", block.attention.key]
            + costs.time_ms["chat", phase, "ffn", block.ffn.key]
            for block in blocks
        )
        total += times * PARENT_OVER_SUM * (costs.time_ms["chat", phase, "fixed", "fixed"] + inside)
    return total


def tokens_beside_weights(blocks: tuple[BlockSpec, ...], *, memory_bytes: float) -> float:
    parameters = OUTSIDE_PARAMETERS + sum(
        ATTENTION_PARAMETERS[block.attention.key] + FFN_PARAMETERS[block.ffn.key] for block in blocks
    )
    free = memory_bytes - 4 * parameters
    per_token = sum(KV_BYTES[block.attention.key] for block in blocks)
    return (free / per_token if per_token else math.inf) if free > 0 else 0.0


def is_met(one: Limit, blocks: tuple[BlockSpec, ...], parent: tuple[BlockSpec, ...], costs: CostModel) -> bool:
    if one.device_memory_gb is not None:
        return tokens_beside_weights(blocks, memory_bytes=1e9 * one.device_memory_gb) >= one.bound * (1 - 1e-9)
    generated = GENERATION if one.quantity == "throughput" else 0
    time, parent_time = (latency_ms(which, costs, generated=generated) for which in (blocks, parent))
    if one.quantity == "time_to_first_token_ms":
        return (time / parent_time if one.relative_to == "parent" else time) <= one.bound
    speed = parent_time / time if one.relative_to == "parent" else 1000 * BATCH * (PROMPT + GENERATION) / time
    return speed >= one.bound


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "limits",
    [
        [limit("throughput", 1.6)],
        [limit("throughput", 220.0, relative=False)],
        [limit("time_to_first_token_ms", 0.6)],
        [limit("time_to_first_token_ms", 20.0, relative=False)],
        [limit("cached_tokens", 300, relative=False, device_memory_gb=200e-6)],
        [
            limit("throughput", 1.3),
            limit("time_to_first_token_ms", 0.8),
            limit("cached_tokens", 300, relative=False, device_memory_gb=220e-6),
        ],
    ],
    ids=lambda limits: "+".join(f"{one.quantity}-{one.relative_to}" for one in limits),
)
def test_solve_equals_enumeration_of_every_architecture(limits: list[Limit], seed: int):
    architecture, layers, costs = setting(seed)
    blocks = [candidate.block for candidates in layers for candidate in candidates]
    problem = Problem(layers=layers, limits=linear_limits(limits, costs=costs, blocks=blocks, speed_margin=0.0))
    feasible = [
        math.fsum(candidate.score for candidate in choice)
        for choice in itertools.product(*layers)
        if all(is_met(one, tuple(c.block for c in choice), architecture.blocks, costs) for one in limits)
    ]
    assert 0 < len(feasible) < len(VARIANTS) ** len(layers)
    assert min(feasible) > 0
    solution = solve(problem, time_limit_s=10, relative_gap=0.0)
    assert solution.objective == pytest.approx(min(feasible), abs=1e-9)


def held_over(blocks: Sequence[BlockSpec], *, num_devices: int) -> tuple[int, int]:
    """Parameters and KV bytes per token of all devices together: of each attention they hold a head each at least."""
    parameters, kv_bytes = OUTSIDE_PARAMETERS, 0
    for block in blocks:
        heads = {"kv2": 2, "kv1": 1, "no_op": 0}[block.attention.key]
        copies = (max(heads, num_devices) - heads) * (heads > 0)
        parameters += ATTENTION_PARAMETERS[block.attention.key] + 2 * 32 * 8 * copies + FFN_PARAMETERS[block.ffn.key]
        kv_bytes += 4 * 2 * 8 * (heads + copies)
    return parameters, kv_bytes


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_counted_limits_hold_what_devices_hold_together(num_devices: int):
    architecture, layers, _ = setting(0, num_layers=3)
    update = {"backend": "roofline", "device": "h100-80gb", "tensor_parallel_size": num_devices}
    choices = [tuple(candidate.block for candidate in choice) for choice in itertools.product(*layers)]
    blocks = [block for choice in choices for block in choice]
    costs = make_costs(architecture, blocks, profile=make_profile().model_copy(update=update))
    memory_bytes, tokens = 200_000, BATCH * (PROMPT + GENERATION)
    limits = [
        limit("cached_tokens", 77, relative=False, device_memory_gb=memory_bytes / 1e9),
        limit("kv_bytes_per_token", 1e9, relative=False),
        limit("weights_and_cache_mib", 1e9, relative=False),
        limit("num_parameters", 1e9, relative=False),
    ]
    rows = linear_limits(limits, costs=costs, blocks=blocks, speed_margin=0.0)
    for choice in choices:
        parameters, kv_bytes = held_over(choice, num_devices=num_devices)
        fit = max(0, memory_bytes - 4 * parameters) / kv_bytes if kv_bytes else ANY_NUMBER_OF_TOKENS
        held_mib = (4 * parameters + tokens * kv_bytes) / 2**20
        of_one, _ = held_over(choice, num_devices=1)
        assert [row.reached(choice) for row in rows] == pytest.approx([fit, kv_bytes, held_mib, of_one])
        predicted = predict(choice, costs=costs)
        assert predicted["chat_weights_and_cache_mib"] == pytest.approx(held_mib)
        assert (predicted["kv_bytes_per_token"], predicted["num_parameters"]) == (kv_bytes, of_one)


@pytest.mark.parametrize("memory_kb", [30, 60, 100, 150, 200, 300])
def test_cached_tokens_reached_and_best_reachable_equal_enumeration(memory_kb: int):
    _, layers, costs = setting(0, num_layers=3)
    layers = tuple(candidates[:3] if index else candidates[:2] for index, candidates in enumerate(layers))
    choices = [tuple(candidate.block for candidate in choice) for choice in itertools.product(*layers)]
    blocks = [block for choice in choices for block in choice]
    one = limit("cached_tokens", 77, relative=False, device_memory_gb=memory_kb / 1e6)
    (row,) = linear_limits([one], costs=costs, blocks=blocks, speed_margin=0.04)
    expected = [tokens_beside_weights(choice, memory_bytes=1000 * memory_kb) for choice in choices]
    assert [row.reached(choice) for choice in choices] == pytest.approx(expected)
    assert row.best([[candidate.block for candidate in candidates] for candidates in layers]) == pytest.approx(
        max(expected)
    )


def test_cached_tokens_out_of_reach_says_what_is_reachable():
    _, layers, costs = setting(0)
    layers = tuple(candidates[:2] for candidates in layers)
    one = limit("cached_tokens", 1e6, relative=False, device_memory_gb=200e-6)
    blocks = [candidate.block for candidates in layers for candidate in candidates]
    problem = Problem(layers=layers, limits=linear_limits([one], costs=costs, blocks=blocks, speed_margin=0.0))
    best = tokens_beside_weights(tuple(candidates[1].block for candidates in layers), memory_bytes=200_000)
    with pytest.raises(InfeasibleError) as caught:
        solve(problem, time_limit_s=10, relative_gap=0.0)
    assert f"cached_tokens >= 1e+06 in 0.0002 GB: the best of all candidates is {best:,.4g}" in str(caught.value)


def test_a_model_without_attention_caches_any_number_of_tokens_if_its_weights_fit():
    _, layers, costs = setting(0)
    empty = [candidates[3].block for candidates in layers]
    for memory_bytes, tokens in ((4 * OUTSIDE_PARAMETERS + 1, ANY_NUMBER_OF_TOKENS), (4 * OUTSIDE_PARAMETERS - 1, 0.0)):
        one = limit("cached_tokens", 10, relative=False, device_memory_gb=memory_bytes / 1e9)
        (row,) = linear_limits([one], costs=costs, blocks=empty, speed_margin=0.0)
        assert row.reached(empty) == row.best([[block] for block in empty]) == tokens


def test_speed_margin_tightens_the_timed_and_leaves_cached_tokens_alone():
    architecture, _, costs = setting(0)
    limits = [
        limit("throughput", 1.2),
        limit("time_to_first_token_ms", 0.9),
        limit("cached_tokens", 10, relative=False, device_memory_gb=1.0),
    ]
    plain, tight = (
        linear_limits(limits, costs=costs, blocks=architecture.blocks, speed_margin=margin) for margin in (0.0, 0.04)
    )
    ratios = [row.upper / other.upper for row, other in zip(tight, plain, strict=True)]
    assert ratios == pytest.approx([0.96, 0.96, 1.0])


def test_describe_limit_says_which_way_and_in_what():
    assert describe_limit(limit("throughput", 5)) == "throughput (chat) >= 5 x parent"
    assert describe_limit(limit("time_to_first_token_ms", 200, relative=False)) == (
        "time_to_first_token_ms (chat) <= 200"
    )
    cached = limit("cached_tokens", 300_000, relative=False, device_memory_gb=80)
    assert describe_limit(cached) == "cached_tokens >= 300,000 in 80 GB"


def memory_mib(blocks: Sequence[BlockSpec], *, batch_size: int, prompt_tokens: int) -> float:
    """All three parts, by the closed form that tests/pipeline/test_activation_memory.py holds against torch."""
    return served_memory(
        make_architecture(num_layers=len(blocks)).with_blocks(blocks),
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        generation_tokens=GENERATION,
        bytes_per_value=4.0,
        num_devices=1,
    ).total_mib


@pytest.mark.parametrize("prompt_tokens", [1, 8, 200])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_memory_limit_holds_the_widest_layer_of_the_child_itself(prompt_tokens: int, share: float):
    architecture, layers, _ = setting(0)
    scenario = Scenario(name="chat", batch_size=BATCH, prompt_tokens=prompt_tokens, generation_tokens=GENERATION)
    blocks = [candidate.block for candidates in layers for candidate in candidates]
    costs = make_costs(architecture, blocks, profile=make_profile(scenarios=(scenario,)))
    every = [tuple(candidate.block for candidate in choice) for choice in itertools.product(*layers)]
    used = {choice: memory_mib(choice, batch_size=BATCH, prompt_tokens=prompt_tokens) for choice in every}
    (row,) = linear_limits([limit("memory_mib", share)], costs=costs, blocks=blocks, speed_margin=0.04)
    of_parent = memory_mib(architecture.blocks, batch_size=BATCH, prompt_tokens=prompt_tokens)
    assert [row.reached(choice) for choice in every] == pytest.approx([used[choice] / of_parent for choice in every])
    best = row.best([[candidate.block for candidate in candidates] for candidates in layers])
    assert best == pytest.approx(min(used.values()) / of_parent)
    score = {
        choice: sum(candidate.score for candidate in candidates)
        for choice, candidates in zip(every, itertools.product(*layers), strict=True)
    }
    within = [choice for choice in every if used[choice] <= share * of_parent * (1 + 1e-9)]
    problem = Problem(layers=layers, limits=(row,))
    if not within:
        with pytest.raises(InfeasibleError, match=f"memory_mib .*the best of all candidates is {best:,.4g}"):
            solve(problem, time_limit_s=10, relative_gap=0.0)
        return
    solution = solve(problem, time_limit_s=10, relative_gap=0.0)
    assert solution.objective == pytest.approx(min(score[choice] for choice in within), abs=1e-9)


def test_a_long_prompt_narrows_all_layers_where_weights_and_cache_would_narrow_two():
    architecture, layers, _ = setting(0)
    layers = tuple((candidates[0], candidates[2]) for candidates in layers)
    blocks = [candidate.block for candidates in layers for candidate in candidates]
    scenario = Scenario(name="chat", batch_size=BATCH, prompt_tokens=2000, generation_tokens=GENERATION)
    costs = make_costs(architecture, blocks, profile=make_profile(scenarios=(scenario,)))
    for quantity, num_narrow in (("memory_mib", 4), ("weights_and_cache_mib", 2)):
        rows = linear_limits([limit(quantity, 0.7)], costs=costs, blocks=blocks, speed_margin=0.0)
        solution = solve(Problem(layers=layers, limits=rows), time_limit_s=10, relative_gap=0.0)
        assert sum(block.key == "no_op+ffn16" for block in solution.blocks) == num_narrow
