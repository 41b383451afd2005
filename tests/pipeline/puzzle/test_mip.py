"""The integer programme against enumeration of every architecture."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from pipeline.architecture import NO_ATTENTION, NO_FFN, BlockSpec, gqa, swiglu
from pipeline.errors import InfeasibleError
from pipeline.puzzle import mip
from pipeline.puzzle.baselines import greedy
from pipeline.puzzle.limits import LinearLimit
from pipeline.puzzle.mip import Candidate, Problem, solve, solve_pool, violated_limits
from pipeline.puzzle.predictions import linear_limits, predict
from pipeline.puzzle.programme import OutOfTimeError
from pipeline.recipe import LayerPattern, Limit, PoolConfig
from tests.pipeline.puzzle.builders import limit, make_architecture, make_costs

VARIANTS = ((gqa(2), swiglu(64)), (gqa(1), swiglu(16)), (NO_ATTENTION, NO_FFN))

# A made-up second resource that the small blocks are expensive in.
OPPOSED = LinearLimit(
    limit=limit("kv_bytes_per_token", 0.5),
    name="opposed",
    fixed=0.0,
    upper=1.0,
    reference=1.0,
    work=0.0,
    cost={"kv2+ffn64": 0.1, "kv1+ffn16": 2.0, "no_op+no_op": 2.0},
)


def make_problem(limits: list[Limit], *, seed: int, num_layers: int = 3) -> Problem:
    rng = random.Random(seed)
    layers = tuple(
        tuple(
            Candidate(
                block=BlockSpec(attention=attention, ffn=ffn, parent_layers=(layer,)),
                score=0.0 if index == 0 else rng.uniform(0.01, 1.0) * index,
            )
            for index, (attention, ffn) in enumerate(VARIANTS)
        )
        for layer in range(num_layers)
    )
    blocks = [candidate.block for candidates in layers for candidate in candidates]
    costs = make_costs(make_architecture(num_layers=num_layers), blocks, seed=seed)
    return Problem(layers=layers, limits=linear_limits(limits, costs=costs, blocks=blocks, speed_margin=0.0))


def brute_force(problem: Problem) -> float | None:
    """The lowest summed score over every architecture that meets the limits, or None."""
    feasible = [
        math.fsum(candidate.score for candidate in choice)
        for choice in itertools.product(*problem.layers)
        if not violated_limits([candidate.block for candidate in choice], problem.limits)
    ]
    return min(feasible, default=None)


@pytest.mark.parametrize("seed", range(12))
def test_solve_random_instance_equals_brute_force(seed: int):
    limits = [limit("decode_speed", 1.3 + 0.1 * seed), limit("memory_mib", 0.95), limit("latency_ms", 0.8)]
    problem = make_problem(limits, seed=seed)
    expected = brute_force(problem)
    assert expected is not None
    solution = solve(problem, time_limit_s=10, relative_gap=0.0)
    assert solution.status == "optimal"
    assert solution.objective == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_solve_scores_far_below_the_solvers_own_gap_equals_brute_force(seed: int):
    problem = make_problem([limit("decode_speed", 1.6), limit("memory_mib", 0.9)], seed=seed, num_layers=6)
    tiny = replace(
        problem,
        layers=tuple(
            tuple(replace(candidate, score=candidate.score * 1e-8) for candidate in candidates)
            for candidates in problem.layers
        ),
    )
    expected = brute_force(tiny)
    assert expected is not None
    assert solve(tiny, time_limit_s=10, relative_gap=0.0).objective == pytest.approx(expected, rel=1e-9, abs=0)


def test_solve_loose_limits_keeps_the_parent():
    solution = solve(make_problem([limit("decode_speed", 0.5)], seed=1), time_limit_s=10, relative_gap=0.0)
    assert solution.objective == 0.0
    assert all(block.key == "kv2+ffn64" for block in solution.blocks)


def test_solve_without_limits_keeps_the_parent():
    assert solve(make_problem([], seed=1), time_limit_s=10, relative_gap=0.0).objective == 0.0


@pytest.mark.parametrize(
    ("quantity", "bound", "relative"),
    [
        ("prefill_speed", 2.0, True),
        ("prefill_speed", 1500.0, False),
        ("decode_speed", 250.0, False),
        ("latency_ms", 40.0, False),
        ("num_parameters", 0.6, True),
        ("kv_bytes_per_token", 200.0, False),
    ],
)
def test_solve_binding_limit_of_each_quantity_equals_brute_force(quantity: str, bound: float, relative: bool):
    problem = make_problem([limit(quantity, bound, relative=relative)], seed=5)
    solution = solve(problem, time_limit_s=10, relative_gap=0.0)
    assert solution.objective > 0
    assert solution.objective == pytest.approx(brute_force(problem), abs=1e-12)


def test_solve_impossible_limit_names_it_and_the_best_reachable():
    problem = make_problem([limit("decode_speed", 1000.0), limit("num_parameters", 0.9)], seed=2)
    with pytest.raises(InfeasibleError, match=r"decode_speed \(chat\) >= 1,000 x parent: the best of all") as caught:
        solve(problem, time_limit_s=10, relative_gap=0.0)
    least = problem.limits[0].fixed + sum(
        min(problem.limits[0].cost[candidate.block.key] for candidate in layer) for layer in problem.layers
    )
    assert f"{problem.limits[0].reference / least:,.4g}" in str(caught.value)


@pytest.mark.parametrize("seed", range(4))
def test_limits_that_exclude_each_other_name_the_best_of_each_beside_the_others(seed: int):
    tight = make_problem([limit("num_parameters", 0.99)], seed=seed, num_layers=3)
    problem = Problem(layers=tight.layers, limits=(*tight.limits, OPPOSED))
    with pytest.raises(InfeasibleError, match="can each be met but not together") as caught:
        solve(problem, time_limit_s=10, relative_gap=0.0)
    choices = [[candidate.block for candidate in choice] for choice in itertools.product(*problem.layers)]
    best = {
        one.name: min(one.reached(blocks) for blocks in choices if not violated_limits(blocks, [other]))
        for one, other in itertools.permutations(problem.limits)
    }
    expected = ", ".join(f"{name}: {value:,.4g}" for name, value in best.items())
    assert f"Best reachable for each limit while all others are met: {expected}." in str(caught.value)


def test_limits_that_exclude_each_other_are_told_though_the_time_for_more_ends(monkeypatch: pytest.MonkeyPatch):
    def out_of_time(*_: object, **__: object) -> None:
        raise OutOfTimeError("no answer")

    monkeypatch.setattr(mip, "least_of_row", out_of_time)
    tight = make_problem([limit("num_parameters", 0.99)], seed=3, num_layers=2)
    with pytest.raises(InfeasibleError, match=r"opposed: not known within 10 s\. In the nearest choice"):
        solve(Problem(layers=tight.layers, limits=(*tight.limits, OPPOSED)), time_limit_s=10, relative_gap=0.0)


def test_limits_that_are_impossible_without_a_third_say_so_of_the_third():
    tight = make_problem([limit("num_parameters", 0.99), limit("kv_bytes_per_token", 1.0)], seed=3, num_layers=2)
    with pytest.raises(InfeasibleError, match=r"kv_bytes_per_token .*: nothing, for the others exclude each other"):
        solve(Problem(layers=tight.layers, limits=(*tight.limits, OPPOSED)), time_limit_s=10, relative_gap=0.0)


def test_solve_equal_candidates_takes_the_first():
    problem = make_problem([], seed=0)
    tied = tuple(tuple(Candidate(block=one.block, score=0.0) for one in layer) for layer in problem.layers)
    solution = solve(Problem(layers=tied, limits=()), time_limit_s=10, relative_gap=0.0)
    assert solution.blocks == tuple(layer[0].block for layer in tied)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_never_better_than_the_programme(seed: int):
    problem = make_problem([limit("decode_speed", 1.4), limit("memory_mib", 0.97)], seed=seed, num_layers=5)
    choice = greedy(problem)
    best = solve(problem, time_limit_s=10, relative_gap=0.0).objective
    if choice is not None:
        assert not violated_limits([one.block for one in choice], problem.limits)
        assert math.fsum(one.score for one in choice) >= best - 1e-12


def test_predict_parent_has_speedup_one_and_the_limit_rows_agree_with_it():
    architecture = make_architecture()
    small = BlockSpec(attention=NO_ATTENTION, ffn=swiglu(16), parent_layers=(1,))
    costs = make_costs(architecture, [small])
    parent = predict(architecture.blocks, costs=costs)
    assert parent["chat_decode_speedup"] == pytest.approx(1.0)
    assert parent["num_parameters"] == 3 * (3 * 32 * 64 + 2 * 32 + 32 * (32 + 32) + 32 * 32) + 48 * 32 + 32
    child = [architecture.blocks[0], small, architecture.blocks[2]]
    predicted = predict(child, costs=costs)
    quantities = (
        "decode_speed",
        "prefill_speed",
        "throughput",
        "latency_ms",
        "time_to_first_token_ms",
        "memory_mib",
        "weights_and_cache_mib",
        "num_parameters",
        "kv_bytes_per_token",
    )
    rows = linear_limits(
        [limit(name, 1.0) for name in quantities], costs=costs, blocks=[*architecture.blocks, small], speed_margin=0.0
    )
    got = {row.limit.quantity: row.reached(child) for row in rows}
    assert got["decode_speed"] == pytest.approx(predicted["chat_decode_speedup"])
    assert got["prefill_speed"] == pytest.approx(predicted["chat_prefill_speedup"])
    assert got["latency_ms"] == pytest.approx(predicted["chat_latency_ms"] / parent["chat_latency_ms"])
    assert got["throughput"] == pytest.approx(predicted["chat_throughput"] / parent["chat_throughput"])
    assert got["time_to_first_token_ms"] == pytest.approx(predicted["chat_prefill_ms"] / parent["chat_prefill_ms"])
    assert got["memory_mib"] == pytest.approx(predicted["chat_memory_mib"] / parent["chat_memory_mib"])
    assert got["weights_and_cache_mib"] == pytest.approx(
        predicted["chat_weights_and_cache_mib"] / parent["chat_weights_and_cache_mib"]
    )
    assert got["num_parameters"] == pytest.approx(predicted["num_parameters"] / parent["num_parameters"])
    # Two of three layers keep 2 heads of 8 values for keys and values, 4 bytes each.
    assert predicted["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4


def test_linear_limits_with_a_speed_margin_tighten_times_and_leave_counts_alone():
    architecture = make_architecture()
    costs = make_costs(architecture, [])
    limits = [limit(name, 1.2) for name in ("decode_speed", "latency_ms", "memory_mib", "num_parameters")]
    plain, tight = (
        linear_limits(limits, costs=costs, blocks=architecture.blocks, speed_margin=margin) for margin in (0.0, 0.04)
    )
    assert [row.upper / other.upper for row, other in zip(tight, plain, strict=True)] == pytest.approx(
        [0.96, 0.96, 1.0, 1.0]
    )


def structured_problem(
    limits: list[Limit], *, seed: int, pattern: LayerPattern, num_layers: int = 4
) -> tuple[Problem, list[tuple[Candidate, ...]]]:
    """A problem over attention x FFN under a pattern, and every choice that the pattern allows."""
    rng = random.Random(seed)
    options = list(itertools.product((gqa(2), gqa(1), NO_ATTENTION), (swiglu(64), swiglu(16), NO_FFN)))
    layers = tuple(
        tuple(
            Candidate(
                block=BlockSpec(attention=attention, ffn=ffn, parent_layers=(layer,)),
                score=0.0 if index == 0 else rng.uniform(0.01, 1.0) * index,
            )
            for index, (attention, ffn) in enumerate(options)
            # The first layer keeps its attention, as portable spaces have it.
            if layer or attention != NO_ATTENTION
        )
        for layer in range(num_layers)
    )
    shared = {
        "homogeneous": lambda block: (block.attention, block.ffn),
        "homogeneous_attention": lambda block: block.attention,
        "homogeneous_ffn": lambda block: block.ffn,
        "heterogeneous": lambda _: None,
    }[pattern]
    allowed = [
        choice for choice in itertools.product(*layers) if len({shared(candidate.block) for candidate in choice}) == 1
    ]
    blocks = [candidate.block for candidates in layers for candidate in candidates]
    costs = make_costs(make_architecture(num_layers=num_layers), blocks, seed=seed)
    rows = linear_limits(limits, costs=costs, blocks=blocks, speed_margin=0.0)
    return Problem(layers=layers, limits=rows, pattern=pattern), allowed


PATTERNS: tuple[LayerPattern, ...] = ("homogeneous", "homogeneous_attention", "homogeneous_ffn")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_layers_that_share_something_are_chosen_as_enumeration_does(pattern: LayerPattern, seed: int):
    limits = [limit("decode_speed", 1.2 + 0.1 * seed), limit("memory_mib", 0.9)]
    problem, allowed = structured_problem(limits, seed=seed, pattern=pattern)
    feasible = [
        choice for choice in allowed if not violated_limits([candidate.block for candidate in choice], problem.limits)
    ]
    sums = sorted(math.fsum(candidate.score for candidate in choice) for choice in feasible)
    assert 0 < len(feasible) < len(allowed)
    pool = solve_pool(problem, PoolConfig(num_solutions=3, max_overlap=0.99), time_limit_s=10, relative_gap=0.0)
    assert [one.objective for one in pool] == pytest.approx(sums[:3], abs=1e-9)
    free, _ = structured_problem(limits, seed=seed, pattern="heterogeneous")
    # Otherwise the pattern would have asked for nothing.
    assert solve(free, time_limit_s=10, relative_gap=0.0).objective < pool[0].objective


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_impossible_limit_names_the_best_that_the_pattern_reaches(pattern: LayerPattern):
    limits = [limit("decode_speed", 1000.0), limit("kv_bytes_per_token", 0.5)]
    problem, allowed = structured_problem(limits, seed=1, pattern=pattern)
    best = max(problem.limits[0].reached([candidate.block for candidate in choice]) for choice in allowed)
    with pytest.raises(InfeasibleError, match=f"set search.layers: heterogeneous \\({pattern} now\\)") as caught:
        solve(problem, time_limit_s=10, relative_gap=0.0)
    assert f"the best of all candidates is {best:,.4g}. Best" in str(caught.value)


def test_limits_that_one_block_for_all_layers_cannot_meet_together_name_the_nearest():
    # Without attention nothing is cached; the first layer keeps its own, so all do.
    problem, _ = structured_problem(
        [limit("kv_bytes_per_token", 0.6), limit("num_parameters", 0.2)], seed=1, pattern="homogeneous", num_layers=3
    )
    small = [limit for limit in problem.limits if limit.limit.quantity == "num_parameters"]
    reach = problem.best(small[0])
    assert reach == pytest.approx(
        min(small[0].reached([candidate.block for candidate in choice]) for choice in _equal_choices(problem))
    )
    with pytest.raises(InfeasibleError, match=f"num_parameters <= 0.2 x parent: {reach:,.4g}"):
        solve(problem, time_limit_s=10, relative_gap=0.0)


def _equal_choices(problem: Problem) -> list[tuple[Candidate, ...]]:
    return [choice for choice in itertools.product(*problem.layers) if len({one.block.key for one in choice}) == 1]
