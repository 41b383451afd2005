"""Baselines on small problems, against brute force and by hand."""

import itertools
from collections.abc import Mapping

import pytest

from pipeline.architecture import NO_ATTENTION, NO_FFN, BlockSpec, gqa, swiglu
from pipeline.costs import block_parameters
from pipeline.errors import RecipeError
from pipeline.puzzle.baselines import (
    drop_layers,
    greedy,
    influence_order,
    last_order,
    max_parameters,
    random_choice,
    uniform,
)
from pipeline.puzzle.limits import LinearLimit
from pipeline.puzzle.mip import Candidate, Problem
from pipeline.puzzle.predictions import linear_limits
from pipeline.puzzle.search_space import dropped
from pipeline.recipe import LayerPattern, PoolConfig, RefinementConfig, SearchConfig
from tests.pipeline.puzzle.builders import limit, make_architecture, make_costs

SETTINGS = SearchConfig(
    objective="kl",
    layers="heterogeneous",
    pool=PoolConfig(num_solutions=1, max_overlap=0.0),
    refinement=RefinementConfig(
        tokens=1, tokens_per_round=1, path_steps=1, rounds=0, answers_per_step=1, max_changed_layers=1
    ),
    batch_choice="lowest_loss",
    time_limit_s=10,
    relative_gap=0.0,
    max_recalibrations=0,
    speed_margin=0.0,
    speed_tolerance=0.0,
)
PARENT = make_architecture(num_layers=4)
BLOCKS = [
    BlockSpec(attention=attention, ffn=ffn, parent_layers=(0,))
    for attention, ffn in itertools.product((gqa(2), gqa(1), NO_ATTENTION), (swiglu(64), swiglu(32), NO_FFN))
]


def make_problem(bound: float, *, seed: int = 0) -> Problem:
    costs = make_costs(PARENT, BLOCKS, seed=seed)
    limits = linear_limits([limit("decode_speed", bound)], costs=costs, blocks=BLOCKS, speed_margin=0.0)
    layer = tuple(Candidate(block=block, score=float(index)) for index, block in enumerate(BLOCKS))
    return Problem(layers=(layer,) * 4, limits=limits)


# Whole, narrow and dropped: two costs a block, in milliseconds and in MiB.
BY_NAME = {"whole": BLOCKS[0], "narrow": BLOCKS[1], "dropped": BLOCKS[8]}
MILLISECONDS = {"whole": 6.0, "narrow": 4.0, "dropped": 1.0}
MIB = {"whole": 1.0, "narrow": 5.0, "dropped": 0.0}


def table_limit(
    cost: Mapping[str, float], *, upper: float, fixed: float = 0.0, peak: Mapping[str, float] | None = None
) -> LinearLimit:
    return LinearLimit(
        limit=limit("decode_speed", 1.0),
        name="table",
        fixed=fixed,
        upper=upper,
        reference=1.0,
        work=1.0,
        cost={BY_NAME[name].key: value for name, value in cost.items()},
        peak=None if peak is None else {BY_NAME[name].key: value for name, value in peak.items()},
    )


def greedy_names(
    *layers: Mapping[str, float], limits: tuple[LinearLimit, ...], pattern: LayerPattern = "heterogeneous"
) -> list[str] | None:
    problem = Problem(
        layers=tuple(
            tuple(Candidate(block=BY_NAME[name], score=score) for name, score in scores.items()) for scores in layers
        ),
        limits=limits,
        pattern=pattern,
    )
    found = greedy(problem)
    names = {block.key: name for name, block in BY_NAME.items()}
    return None if found is None else [names[candidate.block.key] for candidate in found]


# Mean scores 0.5, 2, 0.1 and 0.6: layers 2, 0, 3, 1. By their worst block 3 would come before 0.
SCORES = (
    {"whole": 0.0, "narrow": 0.1, "dropped": 1.4},
    {"whole": 0.0, "narrow": 2.0, "dropped": 4.0},
    {"whole": 0.0, "narrow": 0.2, "dropped": 0.1},
    {"whole": 0.0, "narrow": 0.9, "dropped": 0.9},
)


def test_greedy_goes_from_the_lowest_mean_score_up_and_hands_on_what_a_layer_leaves():
    # (21 - 3 - 2) / 4 = 4 ms a layer. Layer 2 drops and leaves 3; layer 0 has 7, stays whole and leaves 1; layers 3 and
    # 1 have 5 each.
    row = table_limit(MILLISECONDS, fixed=3.0, upper=21.0, peak={"whole": 2.0, "narrow": 1.0, "dropped": 0.0})
    assert greedy_names(*SCORES, limits=(row,)) == ["whole", "narrow", "dropped", "narrow"]


def test_greedy_keeps_to_the_share_of_every_budget():
    # 4 ms and 4 MiB a layer: narrow blocks are short of memory until layer 2 leaves 4 MiB, and layer 0 leaves 7 of 8.
    limits = (table_limit(MILLISECONDS, upper=16.0), table_limit(MIB, upper=16.0))
    assert greedy_names(*SCORES, limits=limits) == ["whole", "narrow", "dropped", "narrow"]
    # With 1 MiB a layer no narrow one ever fits. Layer 3 has 5 ms, too few to stay whole, and leaves 4: layer 1 has 8.
    limits = (table_limit(MILLISECONDS, upper=16.0), table_limit(MIB, upper=4.0))
    assert greedy_names(*SCORES, limits=limits) == ["whole", "whole", "dropped", "dropped"]


def test_greedy_pays_for_a_layer_without_choice_from_the_next_ones_share_or_gives_up():
    layers = (SCORES[0], {"whole": 0.0})
    # 4 ms each, and layer 1 comes first: its debt of 2 leaves layer 0 with 2.
    assert greedy_names(*layers, limits=(table_limit(MILLISECONDS, upper=8.0),)) == ["dropped", "whole"]
    assert greedy_names(*layers, limits=(table_limit(MILLISECONDS, upper=6.5),)) is None


def test_greedy_of_layers_alike_is_the_lowest_sum_of_those_that_fit():
    # All whole: 24 ms. All narrow: 16 ms at 3.2. All dropped: 4 ms at 6.4.
    def alike(upper: float) -> list[str] | None:
        return greedy_names(*SCORES, limits=(table_limit(MILLISECONDS, upper=upper),), pattern="homogeneous")

    assert [alike(upper) for upper in (24.0, 16.0, 15.9, 3.9)] == [["whole"] * 4, ["narrow"] * 4, ["dropped"] * 4, None]


@pytest.mark.parametrize("seed", range(3))
def test_max_parameters_is_the_largest_child_within_the_limits(seed: int):
    problem = make_problem(1.4, seed=seed)
    (row,) = problem.limits
    sizes = [
        sum(block_parameters(PARENT, block) for block in blocks)
        for blocks in itertools.product(BLOCKS, repeat=4)
        if row.total(blocks) <= row.upper
    ]
    found = max_parameters(problem, PARENT, settings=SETTINGS)
    assert sum(block_parameters(PARENT, block) for block in found) == max(sizes)


def test_random_choices_meet_the_limits_and_depend_on_the_seed_alone():
    problem = make_problem(1.4)
    (row,) = problem.limits
    found = [random_choice(problem, seed=seed, settings=SETTINGS) for seed in (0, 1, 2, 0)]
    assert found[0] == found[3]
    assert len({tuple(block.key for block in blocks) for blocks in found}) > 1
    assert all(row.total(blocks) <= row.upper for blocks in found)


def test_drop_layers_stops_at_the_first_child_that_fits_and_says_when_none_does():
    order = influence_order([0.5, 0.1, 0.9, 0.1])
    assert order == [3, 1, 0, 2]
    assert last_order(4) == [2, 1, 0, 3]
    two_left = drop_layers(PARENT, order, is_feasible=lambda blocks: sum(block.ffn != NO_FFN for block in blocks) <= 2)
    assert two_left is not None
    assert [layer for layer, block in enumerate(two_left) if block.ffn == NO_FFN] == [1, 3]
    assert drop_layers(PARENT, order, is_feasible=lambda _: False) is None


def test_uniform_takes_the_largest_common_block_and_leaves_layers_that_may_not_become_it():
    options = [BLOCKS, [BLOCKS[0]], BLOCKS, BLOCKS]
    bound = sum(block_parameters(PARENT, block) for block in PARENT.blocks) - 1
    found = uniform(
        PARENT,
        options,
        is_feasible=lambda blocks: sum(block_parameters(PARENT, block) for block in blocks) <= bound,
    )
    assert found is not None
    # One key/value head less is a smaller loss than half the FFN.
    assert [block.key for block in found] == ["kv1+ffn64", "kv2+ffn64", "kv1+ffn64", "kv1+ffn64"]
    assert [block.parent_layers for block in found] == [(0,), (1,), (2,), (3,)]
    assert uniform(PARENT, options, is_feasible=lambda _: False) is None


def test_a_dropped_layer_takes_no_time_where_the_space_has_no_no_op_and_an_unknown_width_is_refused():
    parent = make_architecture(num_layers=3)
    costs = make_costs(parent, parent.blocks, seed=0)
    fixed_ms = costs.time_ms["chat", "decode", "fixed", "fixed"]
    one_ms = costs.block_ms(parent.blocks[0], "chat", "decode")
    blocks = [dropped(0), parent.blocks[1], dropped(2)]
    assert costs.sum_ms(blocks, "chat", "decode") == pytest.approx(fixed_ms + one_ms)
    narrow = parent.blocks[0].model_copy(update={"ffn": swiglu(8)})
    with pytest.raises(RecipeError, match="no time for chat decode ffn ffn8: materialize block_profile again"):
        costs.sum_ms([narrow], "chat", "decode")
