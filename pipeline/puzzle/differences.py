"""Subblock times as differences of whole models, for runtimes that time models and see no layers.

A subblock's time is what a model gains by it. With L layers of the parent's attention p and FFN q, T the time of a
model and T(x -> y) that of the parent with y in the place of x (attention from layer 1 on: neither llama.cpp nor vLLM
runs a model without it in layer 0):

    block   = (T - T of L/2 layers) / (L - L/2)
    fixed   = T - L block
    p       = (T - T(p -> none)) / (L - 1)                    q = block - p
    a       = p + (T(p -> a) - T) / (L - 1)                   f = q + (T(q -> f) - T) / L

so that the sum over the parent's subblocks is the parent by construction. What differences of whole models cannot see
is checked on one more model, whose layers take all variants in turn: the residual is its sum against its measurement.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping

from pipeline.architecture import NO_ATTENTION, Architecture, AttentionSpec, FFNSpec
from pipeline.errors import RecipeError
from pipeline.puzzle.calibration import PHASES, Phase
from pipeline.puzzle.measure import Measurements
from pipeline.puzzle.predictions import FIXED
from pipeline.puzzle.profiling import Profile, ProfileKey, Samples, mixed_blocks, sum_of_blocks_ms
from pipeline.puzzle.search_space import SearchSpace
from pipeline.recipe import ProfileConfig

PARENT, SHALLOW, MIXED = "parent", "shallow", "mixed"


def profile_by_differences(
    architecture: Architecture,
    space: SearchSpace,
    *,
    profile: ProfileConfig,
    measure: Callable[[Mapping[str, Architecture]], Measurements],
) -> Profile:
    """Return the times of every distinct variant of the space and of the whole parent in every scenario.

    `measure` times models in `profile.repeats` rounds; each round's differences are one sample.

    Raises:
        RecipeError: for a parent of one layer.
    """
    models = difference_models(architecture, space)
    times = measure(models).times_ms
    samples: defaultdict[ProfileKey, list[float]] = defaultdict(list)
    for scenario in profile.scenarios:
        for phase in PHASES:
            for round_index in range(profile.repeats):
                whole = {name: times[name, scenario.name, phase][round_index] for name in models}
                for (part, variant), value in subblock_times(architecture, space, whole).items():
                    samples[scenario.name, phase, part, variant].append(value)
    kept = {key: Samples(times_ms=tuple(values)) for key, values in samples.items()}
    whole_keys: list[tuple[str, Phase]] = [(scenario.name, phase) for scenario in profile.scenarios for phase in PHASES]
    mixed = models[MIXED]
    return Profile(
        samples=kept,
        parent={key: Samples(times_ms=tuple(times[PARENT, *key])) for key in whole_keys},
        sum_ms={key: sum_of_blocks_ms(architecture, kept, *key) for key in whole_keys},
        checked={
            key: (sum_of_blocks_ms(mixed, kept, *key), statistics.median(times[MIXED, *key])) for key in whole_keys
        },
    )


def subblock_times(
    architecture: Architecture, space: SearchSpace, whole_ms: Mapping[str, float]
) -> dict[tuple[str, str], float]:
    """Return the milliseconds of each part and variant, and of what is outside the layers, from those of whole models.

    Noise can make a small difference negative; no subblock takes less than nothing.
    """
    layers = architecture.num_hidden_layers
    parent_block = architecture.homogeneous_block()
    parent_ms = whole_ms[PARENT]
    block_ms = (parent_ms - whole_ms[SHALLOW]) / (layers - layers // 2)
    attention_ms = (parent_ms - whole_ms[_name(NO_ATTENTION)]) / (layers - 1)
    ffn_ms = block_ms - attention_ms
    found = {(FIXED, FIXED): parent_ms - layers * block_ms}
    for spec in space.distinct_attention:
        if spec == parent_block.attention:
            found["attention", spec.key] = attention_ms
        elif spec == NO_ATTENTION:
            found["attention", spec.key] = 0.0
        else:
            found["attention", spec.key] = attention_ms + (whole_ms[_name(spec)] - parent_ms) / (layers - 1)
    for spec in space.distinct_ffn:
        other_ms = parent_ms if spec == parent_block.ffn else whole_ms[_name(spec)]
        found["ffn", spec.key] = ffn_ms + (other_ms - parent_ms) / layers
    return {key: max(0.0, value) for key, value in found.items()}


def difference_models(architecture: Architecture, space: SearchSpace) -> dict[str, Architecture]:
    """Return the whole models whose differences are the subblocks.

    Raises:
        RecipeError: for a parent of one layer.
    """
    blocks = architecture.blocks
    parent_block = architecture.homogeneous_block()
    if len(blocks) < 2:
        raise RecipeError("a parent of one layer has no differences to take: set block_profile.backend: torch")
    models = {PARENT: architecture, SHALLOW: architecture.with_blocks(blocks[: len(blocks) // 2])}
    for spec in dict.fromkeys([NO_ATTENTION, *space.distinct_attention]):
        if spec != parent_block.attention:
            changed = [block.model_copy(update={"attention": spec}) for block in blocks[1:]]
            models[_name(spec)] = architecture.with_blocks([blocks[0], *changed])
    for spec in space.distinct_ffn:
        if spec != parent_block.ffn:
            models[_name(spec)] = architecture.with_blocks([block.model_copy(update={"ffn": spec}) for block in blocks])
    mixed = mixed_blocks(space.distinct_attention, space.distinct_ffn, num_layers=len(blocks))
    models[MIXED] = architecture.with_blocks([blocks[0], *mixed[1:]])
    return models


def _name(spec: AttentionSpec | FFNSpec) -> str:
    return f"{'attention' if isinstance(spec, AttentionSpec) else 'ffn'} {spec.key}"
