"""Can the published hardware targets be met, and how fast is that known: python bench/bench_targets.py.

Takes parent and search space of the recipes `super-49b` and `ultra-253b`, block times from the roofline of H100s at
FP8, and synthetic scores, and solves for

    Super   5 times the throughput of the parent at the largest batch that the parent itself fits, on one GPU of 80 GB;
            256 x 1,200 tokens within 51.2 s; 300,000 cached tokens beside the weights
    Ultra   1.5 times lower latency than the parent for one user, on eight GPUs; 3,000,000 cached tokens

The batch of Super's child is swept outside the programme, which knows one batch at a time (Puzzle, appendix B). Scores
are made up, so the objective says nothing of quality: what counts is whether a target can be met, by what kind of
child, and in how many seconds. The published children are put through the same roofline beside it.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

from pipeline.architecture import Architecture, AttentionSpec, BlockSpec, FFNSpec
from pipeline.costs import kv_bytes_per_token, num_parameters
from pipeline.errors import InfeasibleError
from pipeline.model.architecture_files import load_architecture, parent_architecture
from pipeline.puzzle.batches import best_batch, solve_batches, swept_scenarios
from pipeline.puzzle.calibration import calibrate
from pipeline.puzzle.limits import GB, cached_tokens
from pipeline.puzzle.mip import Candidate, Problem, Solution, solve
from pipeline.puzzle.predictions import CostModel, linear_limits, predict
from pipeline.puzzle.roofline import (
    Pass,
    Setting,
    attention_work,
    ffn_work,
    fixed_work,
    parent_times_ms,
    roofline_times,
    time_ms,
)
from pipeline.puzzle.search_space import SearchSpace, resolve
from pipeline.recipe import Limit, ProfileConfig, Recipe, Requirements, Scenario
from pipeline.recipe_file import load_recipe

DEVICE = "h100-80gb"
FP8_BYTES = 1.0
SUPER_GB, SUPER_TOKENS, SUPER_SPEEDUP, SUPER_LATENCY_MS, SUPER_BATCH = 80.0, 300_000, 5.0, 51_200.0, 256
SUPER_PUBLISHED_PARENT, SUPER_PUBLISHED_CHILD = 1274.0, 6472.0  # tokens/s, 128 prompt and 1,024 generated tokens
SUPER_BATCHES = (48, 96, 144, 192, 224, 250, 256, 288, 320, 384, 448, 512)  # 250 x 1,200 tokens are 300,000
# The made-up scores of neighbouring layers are nearly equal; a proof of the last digits takes up to half a minute.
RELATIVE_GAP = 1e-3
ULTRA_GPUS, ULTRA_TOKENS, ULTRA_SPEEDUP = 8, 3_000_000, 1.5
# The recipe's eight times 80 GiB, and eight times 80 * 10^9 bytes, which 3 M tokens beside the published Ultra exceed.
ULTRA_GB = (8 * 80 * 2**30 / GB, 640.0)


def synthetic_score(attention: AttentionSpec, ffn: FFNSpec, *, layer: int, num_layers: int, parent: BlockSpec) -> float:
    """Return what a block costs in quality, by a formula with the shape of the released scores of Llama-3.3-70B.

    Layer 0 is dear to touch and the next three are dear; then sensitivity falls until two thirds of the depth and rises
    again. Cost grows as an FFN narrows, slowly first. A layer that loses both costs the dearer and half the cheaper.
    """
    depth = layer / (num_layers - 1)
    sensitivity = {0: 60.0, 1: 3.0, 2: 2.5, 3: 2.0}.get(layer, 0.4 + 2.2 * (depth - 0.66) ** 2)
    kept = (ffn.intermediate_size or 0) / (parent.ffn.intermediate_size or 1)
    cut = 1 - kept
    narrowed = 0.0 if ffn == parent.ffn else sensitivity * (0.08 + 0.15 * cut + 0.22 * cut**4)
    removed = 0.0 if attention == parent.attention else 0.5 * sensitivity
    return max(narrowed, removed) + 0.5 * min(narrowed, removed)


def roofline_profile(recipe: Recipe, scenarios: Sequence[Scenario | dict[str, Any]], *, num_gpus: int) -> ProfileConfig:
    """Return the recipe's profile as a roofline of H100s."""
    return ProfileConfig.model_validate(
        recipe.block_profile.model_dump()
        | {"backend": "roofline", "device": DEVICE, "tensor_parallel_size": num_gpus, "scenarios": list(scenarios)}
    )


def roofline_costs(parent: Architecture, space: SearchSpace, *, profile: ProfileConfig) -> CostModel:
    """Return the cost model that block_profile and mip_solution would make of that profile."""
    times_ms = roofline_times(parent, space, profile=profile)
    sum_ms = parent_times_ms(parent, times_ms)
    calibration = calibrate(sum_ms=sum_ms, measured_ms=sum_ms, parent_ms=sum_ms)
    by_name: dict[tuple[str, str, str, str], float] = {
        (scenario, phase, part, variant): value for (scenario, phase, part, variant), value in times_ms.items()
    }
    return CostModel(parent=parent, profile=profile, time_ms=by_name, calibration=calibration)


def solve_for(limits: Sequence[Limit], *, space: SearchSpace, costs: CostModel) -> Solution:
    """Return the best child of the space under the limits."""
    layers = tuple(
        tuple(
            Candidate(
                block=block,
                score=synthetic_score(
                    block.attention, block.ffn, layer=layer, num_layers=len(space.layers), parent=space.parent
                ),
            )
            for block in options.blocks
        )
        for layer, options in enumerate(space.layers)
    )
    blocks = [candidate.block for candidates in layers for candidate in candidates]
    rows = linear_limits(limits, costs=costs, blocks=blocks, speed_margin=0.0)
    return solve(Problem(layers=layers, limits=rows), time_limit_s=60, relative_gap=RELATIVE_GAP)


def whole_model_ms(model: Architecture, scenario: Scenario, *, setting: Setting) -> float:
    """Return the latency of any model on the roofline, block by block: fused and published ones too."""

    def one_pass_ms(one: Pass) -> float:
        works = [fixed_work(model, one=one, setting=setting)]
        for block in model.blocks:
            works.append(attention_work(model, block.attention, one=one, setting=setting))
            works.append(ffn_work(model, block.ffn, one=one, setting=setting))
        return sum(time_ms(work, setting=setting) for work in works)

    decode_ms = one_pass_ms(Pass.of(scenario, "decode"))
    return one_pass_ms(Pass.of(scenario, "prefill")) + scenario.generation_tokens * decode_ms


def tokens_that_fit(model: Architecture, *, memory_gb: float, num_gpus: int) -> int:
    """Return how many tokens' cache fits beside the weights."""
    weights_bytes = FP8_BYTES * num_parameters(model, num_devices=num_gpus)
    kv_bytes = kv_bytes_per_token(model, bytes_per_value=FP8_BYTES, num_devices=num_gpus)
    return int(cached_tokens(memory_gb * GB, weights_bytes=weights_bytes, kv_bytes_per_token=kv_bytes))


def described(model: Architecture, *, memory_gb: float, num_gpus: int) -> dict[str, float]:
    """Return the size of a model, in the terms of the published ones."""
    return {
        "parameters_b": round(num_parameters(model) / 1e9, 2),
        "attention_layers": sum(block.attention.kind == "gqa" for block in model.blocks),
        "cached_tokens_that_fit": tokens_that_fit(model, memory_gb=memory_gb, num_gpus=num_gpus),
    }


def with_batch(scenario: Scenario, batch: int) -> Scenario:
    """Return a scenario at another batch, named after it."""
    return scenario.model_copy(update={"name": f"batch-{batch}", "batch_size": batch})


def at_largest_batch(model: Architecture, scenario: Scenario) -> dict[str, float]:
    """Return a model's throughput at the largest batch whose cache fits beside its weights on one GPU."""
    batch = tokens_that_fit(model, memory_gb=SUPER_GB, num_gpus=1) // (
        scenario.prompt_tokens + scenario.generation_tokens
    )
    largest = with_batch(scenario, batch)
    setting = Setting.of(roofline_profile(load_recipe("super-49b"), [largest], num_gpus=1))
    seconds = whole_model_ms(model, largest, setting=setting) / 1000
    return {"largest_batch": batch, "tokens_per_s": round(largest.num_tokens / seconds, 1)}


def bench_super() -> dict[str, object]:
    """Sweep the child's batch under the three limits, and keep the child that scores best."""
    began = time.perf_counter()
    recipe = load_recipe("super-49b")
    parent = parent_architecture(recipe.parent)
    space = resolve(recipe.search_space, parent)
    base = next(scenario for scenario in recipe.block_profile.scenarios if scenario.name == "throughput")
    reference = at_largest_batch(parent, base)
    wanted = SUPER_SPEEDUP * reference["tokens_per_s"]
    # The roofline of every batch at once; the reference batch stands beside the sweep for the limit on latency.
    written = {**base.model_dump(), "batch_size": list(SUPER_BATCHES), "name": "throughput"}
    del written["sweep"]
    profile = roofline_profile(recipe, [written, with_batch(base, SUPER_BATCH).model_dump()], num_gpus=1)
    costs = roofline_costs(parent, space, profile=profile)
    latency = Limit(
        quantity="latency_ms", scenario=f"batch-{SUPER_BATCH}", bound=SUPER_LATENCY_MS, relative_to="absolute"
    )
    cached = Limit(
        quantity="cached_tokens",
        scenario=None,
        bound=SUPER_TOKENS,
        relative_to="absolute",
        device_memory_gb=SUPER_GB,
    )
    throughput = Limit(quantity="throughput", scenario="throughput", bound=wanted, relative_to="absolute")
    batches = swept_scenarios([throughput], profile)

    def tokens_per_s(solution: Solution, scenario: Scenario) -> float:
        return predict(solution.blocks, costs=costs)[f"{scenario.name}_throughput"]

    try:
        found = solve_batches(
            Requirements(limits=(throughput, latency, cached), pins=()),
            batches,
            solve=lambda wanted: solve_for(wanted.limits, space=space, costs=costs),
            objective=lambda solution: solution.objective,
            tokens_per_s=tokens_per_s,
        )
    except InfeasibleError as err:
        found, infeasible = (), str(err)
    else:
        infeasible = ""
    published = load_architecture("llama-3.3-nemotron-super-49b")
    setting = Setting.of(roofline_profile(recipe, [base], num_gpus=1))
    report: dict[str, object] = {
        "target": f"{SUPER_SPEEDUP:g} x the parent's throughput, {SUPER_TOKENS:,} cached tokens in {SUPER_GB:g} GB",
        "parent": described(parent, memory_gb=SUPER_GB, num_gpus=1) | reference,
        "published_parent_tokens_per_s": SUPER_PUBLISHED_PARENT,
        "wanted_tokens_per_s": round(wanted, 1),
        "objective_by_batch": {
            one.scenario.batch_size: round(one.objective, 3) for one in found if one.answer is not None
        },
        "published_child": described(published, memory_gb=SUPER_GB, num_gpus=1)
        | at_largest_batch(published, base)
        | {"latency_256_ms": round(whole_model_ms(published, with_batch(base, SUPER_BATCH), setting=setting))},
        "published_child_tokens_per_s": SUPER_PUBLISHED_CHILD,
    }
    if found:
        best = best_batch(found, "lowest_loss")
        assert best.answer is not None
        child = parent.with_blocks(best.answer.blocks)
        predicted = predict(best.answer.blocks, costs=costs)
        report["child"] = described(child, memory_gb=SUPER_GB, num_gpus=1) | {
            "objective": round(best.objective, 4),
            "relative_gap": round(best.answer.gap, 5),
            "batch": best.scenario.batch_size,
            "tokens_per_s": round(best.tokens_per_s, 1),
            "speedup": round(best.tokens_per_s / reference["tokens_per_s"], 3),
            "latency_256_ms": round(predicted[f"batch-{SUPER_BATCH}_latency_ms"]),
            "at_its_largest_batch": at_largest_batch(child, base),
        }
    else:
        report["infeasible"] = infeasible  # by how much at each batch, and what each limit alone allows
    return report | {"seconds": round(time.perf_counter() - began, 2), "programmes": len(SUPER_BATCHES)}


def bench_ultra() -> dict[str, object]:
    """Solve once: one user, the parent on the same eight GPUs."""
    began = time.perf_counter()
    recipe = load_recipe("ultra-253b")
    parent = parent_architecture(recipe.parent)
    space = resolve(recipe.search_space, parent)
    scenario = next(one for one in recipe.block_profile.scenarios if one.name == "single-user")
    profile = roofline_profile(recipe, [scenario], num_gpus=ULTRA_GPUS)
    costs = roofline_costs(parent, space, profile=profile)
    setting = Setting.of(profile)
    parent_ms = whole_model_ms(parent, scenario, setting=setting)
    published = load_architecture("llama-3.1-nemotron-ultra-253b")
    memory_gb = ULTRA_GB[0]
    fits = tokens_that_fit(parent, memory_gb=memory_gb, num_gpus=ULTRA_GPUS)
    report: dict[str, object] = {
        "target": f"1 / {ULTRA_SPEEDUP:g} of the parent's latency, {ULTRA_TOKENS:,} cached tokens",
        "parent": described(parent, memory_gb=memory_gb, num_gpus=ULTRA_GPUS)
        | {
            "largest_batch": fits // (scenario.prompt_tokens + scenario.generation_tokens),
            "reference_batch": scenario.batch_size,
            "latency_ms": round(parent_ms),
        },
        "published_child": described(published, memory_gb=memory_gb, num_gpus=ULTRA_GPUS)
        | {"speedup_after_fusion": round(parent_ms / whole_model_ms(published, scenario, setting=setting), 3)},
        "published_speedup_after_fusion": 1.71,
    }
    faster = Limit(quantity="latency_ms", scenario=scenario.name, bound=1 / ULTRA_SPEEDUP, relative_to="parent")
    for memory_gb in ULTRA_GB:
        cached = Limit(
            quantity="cached_tokens",
            scenario=None,
            bound=ULTRA_TOKENS,
            relative_to="absolute",
            device_memory_gb=memory_gb,
        )
        try:
            solution = solve_for([faster, cached], space=space, costs=costs)
        except InfeasibleError as err:
            report[f"infeasible_in_{memory_gb:.1f}_gb"] = str(err)
            continue
        latency_ms = predict(solution.blocks, costs=costs)[f"{scenario.name}_latency_ms"]
        report[f"child_in_{memory_gb:.1f}_gb"] = described(
            parent.with_blocks(solution.blocks), memory_gb=memory_gb, num_gpus=ULTRA_GPUS
        ) | {
            "objective": round(solution.objective, 4),
            "relative_gap": round(solution.gap, 5),
            "latency_ms": round(latency_ms),
            "speedup": round(parent_ms / latency_ms, 3),
        }
    return report | {"seconds": round(time.perf_counter() - began, 2), "programmes": len(ULTRA_GB)}


def main() -> None:
    """Print both reports as one JSON object."""
    print(json.dumps({"super": bench_super(), "ultra": bench_ultra()}, indent=1))


if __name__ == "__main__":
    main()
