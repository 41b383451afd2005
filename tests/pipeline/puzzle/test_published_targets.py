"""The targets of the recipes `super-49b` and `ultra-253b`: their own spaces and limits, on a roofline of H100s at FP8.

Scores are made up: they say nothing of quality, only that the programme of 80 and of 126 layers is solved.
"""

import polars as pl
import pytest

from pipeline import costs
from pipeline.architecture import Architecture
from pipeline.model.architecture_files import parent_architecture
from pipeline.puzzle.calibration import calibrate
from pipeline.puzzle.predictions import CostModel
from pipeline.puzzle.roofline import parent_times_ms, roofline_times
from pipeline.puzzle.search import search
from pipeline.puzzle.search_space import SearchSpace, resolve
from pipeline.puzzle.tables import SCHEMAS, SCORES
from pipeline.recipe import PoolConfig, ProfileConfig, Recipe
from pipeline.recipe_file import load_recipe


def made_up_scores(space: SearchSpace) -> pl.DataFrame:
    """Each layer's candidates from the parent's own to nothing, dearer the later they come; deep layers are cheap."""
    rows = []
    for layer, options in enumerate(space.layers):
        sensitivity = 0.4 + 2.0 * (1 - layer / len(space.layers)) ** 2
        for index, block in enumerate(options.blocks):
            kl = sensitivity * (index / len(options.blocks)) ** 1.5
            rows.append((layer, block.attention.key, block.ffn.key, index == 0, kl, 0.0, 0.0, 0.0, None, 1))
    return pl.DataFrame(rows, schema=SCHEMAS[SCORES], orient="row")


def roofline_costs(recipe: Recipe, parent: Architecture, space: SearchSpace, *, num_gpus: int) -> CostModel:
    profile = ProfileConfig.model_validate(
        recipe.block_profile.model_dump()
        | {"backend": "roofline", "device": "h100-80gb", "tensor_parallel_size": num_gpus}
    )
    times_ms = roofline_times(parent, space, profile=profile)
    sum_ms = parent_times_ms(parent, times_ms)
    return CostModel(
        parent=parent,
        profile=profile,
        time_ms={(scenario, phase, part, variant): ms for (scenario, phase, part, variant), ms in times_ms.items()},
        calibration=calibrate(sum_ms=sum_ms, measured_ms=sum_ms, parent_ms=sum_ms),
    )


@pytest.mark.parametrize(
    ("name", "num_gpus", "num_layers", "num_options", "cached_tokens", "memory_bytes"),
    [
        ("super-49b", 1, 80, 16, 300_000, 80 * 10**9),
        ("ultra-253b", 8, 126, 18, 3_000_000, 8 * 80 * 2**30),
    ],
)
def test_target_is_met_by_a_child_of_the_recipes_own_space(
    name: str, num_gpus: int, num_layers: int, num_options: int, cached_tokens: int, memory_bytes: int
):
    recipe = load_recipe(name)
    parent = parent_architecture(recipe.parent)
    space = resolve(recipe.search_space, parent)
    assert [len(options.blocks) for options in space.layers] == [num_options] * num_layers
    prices = roofline_costs(recipe, parent, space, num_gpus=num_gpus)
    target = recipe.targets[recipe.default_target]
    # One answer, to a thousandth: made-up scores of neighbouring layers are nearly equal, which makes the proof long.
    settings = recipe.search.model_copy(
        update={"pool": PoolConfig(num_solutions=1, max_overlap=0.0), "relative_gap": 1e-3, "time_limit_s": 250}
    )
    (record,) = search(
        made_up_scores(space),
        costs=prices,
        target_name=recipe.default_target,
        requirements=target.requirements,
        settings=settings,
    )
    assert record.gap <= 1e-3
    assert all(limit.is_met for limit in record.limits)
    child = parent.with_blocks(record.blocks)

    def held_bytes(model: Architecture) -> float:
        kv_bytes = costs.kv_bytes_per_token(model, bytes_per_value=1.0, num_devices=num_gpus)
        return costs.num_parameters(model, num_devices=num_gpus) + cached_tokens * kv_bytes

    assert held_bytes(child) <= memory_bytes < held_bytes(parent)
    latency = next(limit.limit for limit in record.limits if limit.limit.quantity == "latency_ms")
    scenario = next(one for one in recipe.block_profile.scenarios if one.name == latency.scenario)

    def latency_ms(model: Architecture) -> float:
        prefill_ms, decode_ms = (
            prices.predicted_ms(model.blocks, scenario.name, phase) for phase in ("prefill", "decode")
        )
        return prefill_ms + scenario.generation_tokens * decode_ms

    if latency.relative_to == "parent":
        assert latency_ms(parent) / latency_ms(child) >= 1.5 * (1 - 1e-6)
    else:
        assert (
            scenario.num_tokens / (latency_ms(child) / 1000) >= 6000 > scenario.num_tokens / (latency_ms(parent) / 1000)
        )
