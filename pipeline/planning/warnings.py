"""What stands against a plan, each in one sentence: the figure, its bound, and what to do. Pure."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from pipeline.architecture import BlockSpec
from pipeline.costs import (
    BYTES_PER_PARAMETER,
    block_parameters,
    embedding_parameters,
    kv_values_per_token,
)
from pipeline.planning.case import Case, Estimate
from pipeline.planning.devices import Device
from pipeline.planning.estimates import estimate
from pipeline.prerequisites import refused_settings, training_batches
from pipeline.puzzle.batches import at_batch, swept_scenarios
from pipeline.puzzle.limits import LOWER_BOUNDS, SPEEDS, TIMED, counted_limit, describe_limit
from pipeline.puzzle.patterns import free_choices
from pipeline.puzzle.search_space import pinned_blocks
from pipeline.recipe import Limit, RandomParent, Target
from pipeline.stages.registry import STAGES

GIB = 2**30
MAX_RANKS = 1024


def disk_warnings(estimates: dict[str, Estimate], *, finished: set[str], free_bytes: float, root: str) -> list[str]:
    """Return whether the artifacts that are still to be made, and the largest working set, fit the disk."""
    waiting = [one for name, one in estimates.items() if name not in finished]
    kept = sum(one.disk.expected for one in waiting)
    working = max((one.working_disk.expected for one in waiting), default=0.0)
    if kept + working <= free_bytes:
        return []
    return [
        f"disk: artifacts of {kept / GIB:,.1f} GiB and checkpoints to resume from of {working / GIB:,.1f} GiB are "
        f"expected, {root} has {free_bytes / GIB:,.1f} GiB free: move the store with REFIT_HOME, or lower the budgets"
    ]


def memory_warnings(estimates: dict[str, Estimate], *, device: Device, case: Case) -> list[str]:
    """Return the stages whose expected peak exceeds the device's memory, with the largest part and what would fit."""
    if device.memory_bytes is None:
        return []
    found = []
    for name, one in estimates.items():
        if one.memory.expected <= device.memory_bytes or not one.memory_parts:
            continue
        part = max(one.memory_parts, key=lambda key, of=one.memory_parts: of[key])
        found.append(
            f"memory: {name} is expected to need {one.memory.expected / GIB:,.0f} GiB on a rank, {device.name} has "
            f"{device.memory_bytes / GIB:,.0f} GiB; the largest part is {part} with "
            f"{one.memory_parts[part] / GIB:,.0f} GiB: "
            + (
                fitting_settings(name, memory_bytes=device.memory_bytes, case=case)
                or "no setting spreads this stage over ranks; use a device with more memory"
            )
        )
    return found


def fitting_settings(stage_name: str, *, memory_bytes: float, case: Case) -> str:
    """Return the fewest ranks, by powers of two, on which a training is expected to fit, as a sentence's end.

    Among those without activations made again where possible, with the largest micro-batch and the lowest ZeRO stage.
    Where nothing fits, what stands in the way; an empty string for a stage that runs on one rank.
    """
    if not estimate(stage_name, case).on_all_ranks:
        return ""
    batches = [rows for stage, _, rows, _, _ in training_batches(case.recipe) if stage == stage_name]
    most = min(MAX_RANKS, math.gcd(*batches)) if batches else MAX_RANKS
    num_nodes = case.execution.num_nodes
    powers = [2**power for power in range(most.bit_length()) if 2**power % num_nodes == 0] or [num_nodes]
    settings = [
        {"num_ranks": num_ranks, "zero_stage": zero_stage, "micro_batch_size": micro_batch_size, **recompute}
        for num_ranks in powers
        for recompute in ({}, {"recompute_activations": True})
        for micro_batch_size in sorted({case.execution.micro_batch_size, 1}, reverse=True)
        for zero_stage in ((1, 2) if stage_name == "rl_checkpoint" else (1, 2, 3))
    ]
    if stage_name == "block_library":  # its ranks split the layers; it knows neither ZeRO nor micro-batches
        settings = [{"num_ranks": num_ranks} for num_ranks in powers]
    one = estimate(stage_name, case)
    for chosen in settings:
        tried = dataclasses.replace(case, execution=case.execution.model_copy(update=chosen))
        one = estimate(stage_name, tried)
        if one.memory.expected <= memory_bytes:
            return f"it fits with {_spelled(chosen)}"
    part = max(one.memory_parts, key=lambda key: one.memory_parts[key])
    share = f"{part} with {one.memory_parts[part] / GIB:,.0f} of {one.memory.expected / GIB:,.0f} GiB"
    shorter = "shorten the windows (they are not split over ranks), or " if part in ("activations", "logits") else ""
    return (
        f"it does not even fit with {_spelled(settings[-1])}, where the largest part is {share}: {shorter}use devices "
        "with more memory"
    )


def _spelled(settings: Mapping[str, int | bool]) -> str:
    return ", ".join(f"{name} {str(value).lower()}" for name, value in settings.items())


def execution_warnings(case: Case) -> list[str]:
    """Return settings under which a training would refuse to start."""
    return [told for stage in STAGES for told in refused_settings(stage, recipe=case.recipe, execution=case.execution)]


def data_warnings(case: Case) -> list[str]:
    """Return trainings whose tokens their data can hardly hold, and rows that a filter would drop by their licence."""
    recipe = case.recipe
    found = []
    traces = recipe.reasoning_traces
    num_items = len(recipe.reasoning_tasks) * traces.items_per_task
    most_tokens = 2 * num_items * 1000 + traces.chat.num_samples * 1000
    has_more = bool(traces.endpoints or traces.imports)  # whose size is not known before they are read
    for index, part in enumerate(recipe.sft.stages):
        if part.tokens > 5 * most_tokens and not has_more:
            found.append(
                f"data: sft.stages[{index}].tokens is {part.tokens:,}, the toggle dataset of {num_items:,} pairs holds "
                f"about {most_tokens:,} at most, which makes {part.tokens / most_tokens:.0f} epochs: raise "
                "reasoning_traces.items_per_task, import a set, or lower the tokens"
            )
    allowed = recipe.reasoning_toggle_dataset.filters.licences
    licences = {f"reasoning_traces.endpoints {one.name}": one.licence for one in traces.endpoints}
    if traces.chat.num_samples and not isinstance(recipe.parent, RandomParent):
        licences["parent, whose chat is trained on,"] = recipe.parent.licence
    for whose, licence in licences.items():
        if licence.strip().casefold() not in {one.strip().casefold() for one in allowed}:
            found.append(
                f"data: {whose} has the licence {licence}, which reasoning_toggle_dataset.filters.licences does not "
                "list, so all of its rows would be dropped: add it there if you may train on them"
            )
    for name in ("distillation_mix", "pretraining_mix"):
        mixture = getattr(recipe, name)
        num_documents = {source.name: source.max_documents for source in recipe.corpora.sources}
        total = mixture.tokens + sum(more.tokens for more in mixture.long_context)
        weights = sum(entry.weight for entry in mixture.entries)
        for entry in mixture.entries:
            wanted = total * entry.weight / weights
            per_document = wanted / num_documents[entry.source]
            if per_document > 4000:
                found.append(
                    f"data: {name} wants {wanted:,.0f} tokens of {entry.source}, whose max_documents of "
                    f"{num_documents[entry.source]:,} would have to hold {per_document:,.0f} tokens each: raise "
                    "max_documents, or lower the weight"
                )
    return found


def target_warnings(case: Case, target: Target) -> list[str]:
    """Return the limits that no choice of blocks can meet.

    Counted quantities are exact: the sum of each layer's least. Speeds relative to the parent are judged by the bytes
    that a decode step reads, which is an estimate and says so.
    """
    layers = pinned_blocks(case.sizes.space, target.pins)
    pattern = case.recipe.search.layers
    choices = [
        one
        for one in free_choices(layers, pattern, parent=case.sizes.parent.homogeneous_block())
        if all(blocks for blocks in one)
    ]
    if not choices:
        return [
            f"target: search.layers is {pattern}, and no child is of that kind: search_space, its overrides and the "
            "pins leave the layers nothing in common; set search.layers: heterogeneous"
        ]
    batches = swept_scenarios(target.limits, case.recipe.block_profile)
    wanted = [at_batch(target.requirements, scenario).limits for scenario in batches] or [target.limits]
    # One batch size that can be served is enough; where none can, the one with the fewest limits out of reach is told.
    return min((_out_of_reach(case, limits, choices) for limits in wanted), key=len)


def _out_of_reach(case: Case, limits: Sequence[Limit], choices: Sequence[Sequence[Sequence[BlockSpec]]]) -> list[str]:
    found = []
    for limit in limits:
        is_lower_bound = limit.quantity in LOWER_BOUNDS
        reached = [_best(case, limit, layers=one) for one in choices]
        best, is_exact = max(reached) if is_lower_bound else min(reached)
        if best < limit.bound * (1 - 1e-9) if is_lower_bound else best > limit.bound * (1 + 1e-9):
            kind = "" if is_exact else " by the bytes a decode step reads (an estimate)"
            reach = f"{best:,.6g}" + (" times the parent's" if limit.relative_to == "parent" else "")
            found.append(
                f"target: {describe_limit(limit)} cannot be met by any choice of blocks{kind}: the best is {reach}: "
                "loosen it, or add smaller variants to search_space"
            )
    return found


def _best(case: Case, limit: Limit, *, layers: Sequence[Sequence[BlockSpec]]) -> tuple[float, bool]:
    """Return the best that any choice reaches, in the limit's unit, and whether that is exact."""
    parent, profile = case.sizes.parent, case.recipe.block_profile
    blocks = {block.key: block for layer in layers for block in layer}
    if limit.quantity not in TIMED:
        return counted_limit(limit, model=parent, profile=profile, blocks=blocks).best(layers), True
    if limit.relative_to == "absolute" or limit.quantity == "prefill_speed":
        return (math.inf if limit.quantity in LOWER_BOUNDS else 0.0), False  # only a clock can tell
    assert limit.scenario is not None  # as every timed limit has one
    scenario, size = profile.scenario(limit.scenario), BYTES_PER_PARAMETER[profile.served_precision]
    tokens = scenario.batch_size * (scenario.prompt_tokens + scenario.generation_tokens / 2)

    def read_bytes(block: BlockSpec) -> float:
        kv_values = kv_values_per_token(parent, block.attention, num_devices=profile.num_devices)
        return size * (block_parameters(parent, block, num_devices=profile.num_devices) + tokens * kv_values)

    fixed = size * embedding_parameters(parent)
    if not parent.tie_word_embeddings:
        fixed -= size * parent.vocab_size * parent.hidden_size  # of the input table one row is read
    least = fixed + sum(min(map(read_bytes, options)) for options in layers)
    of_parent = fixed + sum(map(read_bytes, parent.blocks))
    return (of_parent / least if limit.quantity in SPEEDS else least / of_parent), False
