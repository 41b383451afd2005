"""A swept batch against enumeration of every batch and every child, and what of it reaches later stages."""

import itertools
import math
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from pipeline.architecture import NO_ATTENTION, NO_FFN, BlockSpec, gqa, swiglu
from pipeline.costs import served_memory
from pipeline.errors import InfeasibleError
from pipeline.puzzle.batches import compared_scenarios, settle, settled_limits, settled_profile, solve_batches
from pipeline.puzzle.predictions import CostModel
from pipeline.puzzle.programme import OutOfTimeError
from pipeline.puzzle.search import BatchSearch, search_batches
from pipeline.puzzle.tables import SCHEMAS, SCORES
from pipeline.recipe import (
    BatchChoice,
    Limit,
    PoolConfig,
    ProfileConfig,
    RefinementConfig,
    Requirements,
    Scenario,
    SearchConfig,
)
from tests.pipeline.puzzle.builders import limit, make_architecture, make_costs, make_profile

NUM_LAYERS = 4
BATCHES = (1, 2, 8, 32)
PROMPT, GENERATION = 8, 4
OPTIONS = [
    BlockSpec(attention=attention, ffn=ffn, parent_layers=(0,))
    for attention, ffn in ((gqa(2), swiglu(64)), (gqa(1), swiglu(16)), (NO_ATTENTION, NO_FFN))
]
PARENT = make_architecture(num_layers=NUM_LAYERS)


def profile(batch_size: Any = None) -> ProfileConfig:
    scenarios = [
        {
            "name": "many",
            "batch_size": batch_size or [*BATCHES],
            "prompt_tokens": PROMPT,
            "generation_tokens": GENERATION,
        },
        {"name": "one", "batch_size": 1, "prompt_tokens": PROMPT, "generation_tokens": GENERATION},
    ]
    return ProfileConfig.model_validate(make_profile().model_dump() | {"scenarios": scenarios})


def costs_of_batches() -> CostModel:
    """Times that grow with the batch, more slowly than it: the larger, the more tokens per second."""
    costs = make_costs(PARENT, OPTIONS, seed=3, profile=profile())
    base = {key[1:]: value for key, value in costs.time_ms.items() if key[0] == "one"}
    times = {
        (scenario.name, *key): value * scenario.batch_size**0.5
        for scenario in costs.profile.scenarios
        for key, value in base.items()
    }
    calibration = costs.calibration.model_copy(
        update={
            "entries": tuple(
                entry.model_copy(
                    update={
                        "parent_ms": 1.1
                        * CostModel(
                            parent=PARENT, profile=costs.profile, time_ms=times, calibration=costs.calibration
                        ).sum_ms(PARENT.blocks, entry.scenario, entry.phase),
                        "factor": 1.1,
                    }
                )
                for entry in costs.calibration.entries
            )
        }
    )
    return CostModel(parent=PARENT, profile=costs.profile, time_ms=times, calibration=calibration)


def score(layer: int, index: int) -> float:
    return index * (1 + 0.1 * layer) * (1 + 0.3 * math.sin(layer + 2 * index))


def scores() -> pl.DataFrame:
    rows = [
        (layer, block.attention.key, block.ffn.key, index == 0, score(layer, index), 0.0, 0.0, 0.0, None, 1)
        for layer in range(NUM_LAYERS)
        for index, block in enumerate(OPTIONS)
    ]
    return pl.DataFrame(rows, schema=SCHEMAS[SCORES], orient="row")


def run(*limits: Limit, choice: BatchChoice = "lowest_loss", num_solutions: int = 1) -> BatchSearch:
    settings = SearchConfig(
        objective="kl",
        layers="heterogeneous",
        pool=PoolConfig(num_solutions=num_solutions, max_overlap=0.8),
        refinement=RefinementConfig(
            tokens=1, tokens_per_round=1, path_steps=1, rounds=0, answers_per_step=1, max_changed_layers=1
        ),
        batch_choice=choice,
        time_limit_s=10,
        relative_gap=0.0,
        max_recalibrations=0,
        speed_margin=0.0,
        speed_tolerance=0.0,
    )
    return search_batches(
        scores(),
        costs=costs_of_batches(),
        target_name="t",
        requirements=Requirements(limits=limits, pins=()),
        settings=settings,
    )


def throughput(blocks: tuple[BlockSpec, ...], batch: int) -> float:
    costs, name = costs_of_batches(), f"many-batch-{batch}"
    total_ms = sum(
        1.1
        * times
        * (
            costs.time_ms[name, phase, "fixed", "fixed"]
            + sum(
                costs.time_ms[name, phase, "attention", block.attention.key]
                + costs.time_ms[name, phase, "ffn", block.ffn.key]
                for block in blocks
            )
        )
        for phase, times in (("prefill", 1), ("decode", GENERATION))
    )
    return 1000 * batch * (PROMPT + GENERATION) / total_ms


def memory_mib(blocks: tuple[BlockSpec, ...], batch: int) -> float:
    return served_memory(
        PARENT.with_blocks(blocks),
        batch_size=batch,
        prompt_tokens=PROMPT,
        generation_tokens=GENERATION,
        bytes_per_value=4.0,
        num_devices=1,
    ).total_mib


CHOICES = list(itertools.product(range(len(OPTIONS)), repeat=NUM_LAYERS))
FLOOR, ROOM_MIB = 900.0, 0.22


def feasible(batch: int) -> list[tuple[float, float]]:
    """Summed scores and tokens per second of every child within both limits at a batch."""
    found = []
    for choice in CHOICES:
        blocks = tuple(OPTIONS[index] for index in choice)
        if throughput(blocks, batch) >= FLOOR and memory_mib(blocks, batch) <= ROOM_MIB:
            total = sum(score(layer, index) for layer, index in enumerate(choice))
            found.append((total, throughput(blocks, batch)))
    return found


LIMITS = (
    limit("throughput", FLOOR, relative=False, scenario="many"),
    limit("memory_mib", ROOM_MIB, relative=False, scenario="many"),
)


def test_every_batch_is_solved_as_enumeration_does():
    by_batch = {batch: feasible(batch) for batch in BATCHES}
    # Otherwise the test would show nothing: small batches are too slow, the large one does not fit, two are possible.
    assert [bool(by_batch[batch]) for batch in BATCHES].count(False) >= 1
    assert [bool(by_batch[batch]) for batch in BATCHES].count(True) >= 2
    found = run(*LIMITS)
    for one in found.batches:
        inside = by_batch[one.scenario.batch_size]
        assert (one.answer is None) == (not inside)
        if one.answer is None:
            assert "no choice of blocks meets" in one.reason or "not together" in one.reason
        else:
            assert one.objective == pytest.approx(min(total for total, _ in inside), abs=1e-9)
            assert one.tokens_per_s == pytest.approx(throughput(one.answer.blocks, one.scenario.batch_size))


@pytest.mark.parametrize("choice", ["lowest_loss", "highest_throughput"])
def test_the_batch_that_is_kept_is_the_best_of_all_by_its_rule(choice: BatchChoice):
    found = run(*LIMITS, choice=choice, num_solutions=2)
    assert found.chosen is not None
    answers = [one for one in found.batches if one.answer is not None]
    best = (
        min(answers, key=lambda one: one.objective)
        if choice == "lowest_loss"
        else max(answers, key=lambda one: one.tokens_per_s)
    )
    assert found.chosen == best.scenario
    assert found.records[0] == best.answer
    # The pool is the chosen batch's: all its answers meet the limits there.
    assert len(found.records) == min(2, len(feasible(found.chosen.batch_size)))
    for record in found.records:
        assert {one.limit.scenario for one in record.limits} == {found.chosen.name}
        assert throughput(record.blocks, found.chosen.batch_size) >= FLOOR * (1 - 1e-6)
        assert memory_mib(record.blocks, found.chosen.batch_size) <= ROOM_MIB * (1 + 1e-6)


def test_the_two_rules_differ_here():
    assert run(*LIMITS).chosen != run(*LIMITS, choice="highest_throughput").chosen


def test_room_for_cached_tokens_grows_with_the_batch():
    cached = limit("cached_tokens", 30, relative=False, device_memory_gb=200e-6)
    found = run(limit("throughput", 1.0, relative=False, scenario="many"), cached)
    bounds = {
        one.scenario.batch_size: next(x.bound for x in one.requirements.limits if x.quantity == "cached_tokens")
        for one in found.batches
    }
    assert bounds == {1: 30, 2: 30, 8: 96, 32: 384}
    for one in found.batches:
        assert one.answer is not None
        (reached,) = [x.predicted for x in one.answer.limits if x.limit.quantity == "cached_tokens"]
        assert reached >= bounds[one.scenario.batch_size]


def test_a_batch_whose_time_ends_without_an_answer_leaves_the_others_theirs():
    sizes = [
        Scenario(name=f"many-{size}", batch_size=size, prompt_tokens=8, generation_tokens=4, sweep="many")
        for size in BATCHES
    ]
    requirements = Requirements(limits=LIMITS, pins=())

    def solve(wanted: Requirements) -> str:
        if wanted.limits[0].scenario == "many-8":
            raise OutOfTimeError("the solver ended without an answer")
        return str(wanted.limits[0].scenario)

    found = solve_batches(requirements, sizes, solve=solve, objective=lambda _: 1.0, tokens_per_s=lambda *_: 1.0)
    assert [one.answer for one in found] == ["many-1", "many-2", None, "many-32"]
    assert found[2].reason == "the solver ended without an answer"


def test_without_an_answer_at_any_batch_each_says_why():
    with pytest.raises(InfeasibleError, match=r"no batch size of many has a child\. At batch 1: .* At batch 32: "):
        run(limit("throughput", 1e9, relative=False, scenario="many"))


def test_a_target_that_sweeps_nothing_is_solved_once_and_predicted_where_it_is_used():
    found = run(limit("num_parameters", 0.9))
    assert (found.batches, found.chosen) == ((), None)
    assert {name.split("_")[0] for name in found.records[0].predicted if name.endswith("throughput")} == {"one"}


def test_later_stages_see_the_chosen_batch_alone():
    found, costs = run(*LIMITS), costs_of_batches()
    assert found.chosen is not None
    chosen = [one.limit for one in found.records[0].limits]
    requirements, settled = settle(Requirements(limits=LIMITS, pins=()), costs, chosen)
    assert requirements.limits == tuple(chosen)
    assert [one.name for one in settled.profile.scenarios] == [found.chosen.name, "one"]
    assert settled_limits(LIMITS[:0], costs.profile, chosen) == ()
    assert settled_profile(profile(batch_size=3), chosen) == profile(batch_size=3)
    names, phase = compared_scenarios(LIMITS, costs.profile)
    assert (names, phase) == (tuple(f"many-batch-{batch}" for batch in BATCHES), "decode")
    assert compared_scenarios((), costs.profile) == (("one",), "decode")


def test_a_list_of_batch_sizes_is_written_out_and_survives_json():
    one = profile()
    assert [(x.name, x.batch_size, x.sweep) for x in one.scenarios] == [
        *((f"many-batch-{batch}", batch, "many") for batch in BATCHES),
        ("one", 1, None),
    ]
    assert ProfileConfig.model_validate_json(one.model_dump_json()) == one


@pytest.mark.parametrize("sizes", [[4], [4, 4], [0, 4], [4, "many"]])
def test_batch_sizes_that_are_no_sweep_are_refused(sizes: list[Any]):
    with pytest.raises(ValidationError, match="batch_size"):
        profile(batch_size=sizes)
