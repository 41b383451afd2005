"""Refinement on a made-up quality whose layers depend on each other, against brute force over all children."""

import itertools
from collections.abc import Mapping, Sequence

import polars as pl
import pytest

from pipeline.architecture import NO_ATTENTION, NO_FFN, BlockSpec, gqa, swiglu
from pipeline.progress import Reporter, SilentReporter
from pipeline.puzzle.divergence import Divergence
from pipeline.puzzle.predictions import linear_limits
from pipeline.puzzle.refinement import IN_STEPS, Refinement, refine, search_again
from pipeline.puzzle.search import search
from pipeline.puzzle.tables import SCHEMAS, SCORES
from pipeline.recipe import LayerPattern, Pin, PoolConfig, RefinementConfig, Requirements, SearchConfig
from tests.pipeline.puzzle.builders import give_solver_no_time, limit, make_architecture, make_costs
from tests.pipeline.reporters import NotingReporter

NUM_LAYERS = 5
OPTIONS = [
    BlockSpec(attention=attention, ffn=ffn, parent_layers=(0,))
    for attention, ffn in ((gqa(2), swiglu(64)), (NO_ATTENTION, swiglu(64)), (NO_ATTENTION, NO_FFN))
]
REQUIREMENTS = Requirements(limits=(limit("num_parameters", 0.75),), pins=())


def quality(blocks: Sequence[BlockSpec]) -> float:
    """Cheap alone at the front, but a layer whose neighbour is gone as well costs ten times as much."""
    worth = [0.0 if block.key == OPTIONS[0].key else 0.1 if block.ffn != NO_FFN else 0.3 for block in blocks]
    alone = sum(one * (1 + 0.1 * layer) for layer, one in enumerate(worth))
    return alone + 10 * sum(left * right for left, right in itertools.pairwise(worth))


def divergence(blocks: Sequence[BlockSpec]) -> Divergence:
    return Divergence(kl=quality(blocks), lm_loss=0.0, hidden_cosine=0.0, top1_error=0.0, num_tokens=1)


def score_whole_models(children: Mapping[str, Sequence[BlockSpec]]) -> dict[str, Divergence]:
    return {name: divergence(blocks) for name, blocks in children.items()}


def score_around(base: Sequence[BlockSpec], _: int = 0) -> pl.DataFrame:
    rows = []
    for layer, block in itertools.product(range(NUM_LAYERS), OPTIONS):
        blocks = [*base[:layer], block, *base[layer + 1 :]]
        is_base = block.key == base[layer].key
        rows.append((layer, block.attention.key, block.ffn.key, is_base, quality(blocks), 0.0, 0.0, 0.0, None, 1))
    return pl.DataFrame(rows, schema=SCHEMAS[SCORES], orient="row")


def settings(
    *,
    rounds: int,
    max_changed_layers: int,
    layers: LayerPattern = "heterogeneous",
    answers_per_step: int = 1,
    path_steps: int = 1,
) -> SearchConfig:
    return SearchConfig(
        objective="kl",
        layers=layers,
        pool=PoolConfig(num_solutions=1, max_overlap=0.5),
        refinement=RefinementConfig(
            tokens=1,
            tokens_per_round=1,
            path_steps=path_steps,
            rounds=rounds,
            answers_per_step=answers_per_step,
            max_changed_layers=max_changed_layers,
        ),
        batch_choice="lowest_loss",
        time_limit_s=10,
        relative_gap=0.0,
        max_recalibrations=0,
        speed_margin=0.0,
        speed_tolerance=0.0,
    )


def run(
    *,
    rounds: int,
    max_changed_layers: int = 4,
    layers: LayerPattern = "heterogeneous",
    others: Mapping[str, Sequence[BlockSpec] | None] | None = None,
    pins: tuple[Pin, ...] = (),
    answers_per_step: int = 1,
    path_steps: int = 1,
    around: list[tuple[str, ...]] | None = None,
    numbers: list[int] | None = None,
    is_misled: bool = False,
    num_parts: int = 1,
    reporter: Reporter | None = None,
) -> tuple[Refinement, float]:
    """Search and refine; return the outcome and the best value of all children within the limit.

    `around` gets the blocks that each step and round measures around, `numbers` their numbers, `reporter` hears of
    them; a misled one is told in every odd one that what is worse is better.
    """
    architecture = make_architecture(num_layers=NUM_LAYERS)
    costs = make_costs(architecture, OPTIONS)
    requirements = Requirements(limits=REQUIREMENTS.limits, pins=pins)
    chosen = settings(
        rounds=rounds,
        max_changed_layers=max_changed_layers,
        layers=layers,
        answers_per_step=answers_per_step,
        path_steps=path_steps,
    )
    scores = score_around([OPTIONS[0]] * NUM_LAYERS)

    def score_around_noting(base: Sequence[BlockSpec], number: int) -> pl.DataFrame:
        if numbers is not None:
            numbers.append(number)
        if around is not None:
            around.append(tuple(block.key for block in base))
        table = score_around(base, number)
        # Every second time as wrong the other way: the mean of two is right.
        return table.with_columns(kl=pl.col("kl") * (-1 if number % 2 else 3)) if is_misled else table

    pool = search(scores, costs=costs, target_name="t", requirements=requirements, settings=chosen)
    outcome = refine(
        pool,
        scores,
        others=lambda _: others or {},
        score_whole_models=score_whole_models,
        score_around=score_around_noting,
        num_parts=num_parts,
        costs=costs,
        requirements=requirements,
        settings=chosen,
        reporter=reporter or SilentReporter(),
    )
    (size,) = linear_limits(REQUIREMENTS.limits, costs=costs, blocks=OPTIONS, speed_margin=0.0)
    children = itertools.product(OPTIONS, repeat=NUM_LAYERS)
    return outcome, min(quality(blocks) for blocks in children if size.total(blocks) <= size.upper)


def test_refine_without_rounds_takes_the_best_of_the_pool_by_whole_models():
    outcome, best = run(rounds=0)
    assert outcome.best == outcome.scored[0]
    assert outcome.best.value("kl") == pytest.approx(quality(outcome.best.record.blocks))
    # The made-up quality is one where sums mislead; otherwise the next test would show nothing.
    assert outcome.best.value("kl") > 1.5 * best


def test_refine_comes_near_the_best_child_where_sums_of_single_scores_mislead():
    outcome, best = run(rounds=8)
    # A search among neighbours: it may end beside the best, as it does here.
    assert best <= outcome.best.value("kl") < 1.05 * best
    assert all(limit.is_met for limit in outcome.best.record.limits)
    values = [one.value("kl") for one in outcome.scored]
    assert min(values) == outcome.best.value("kl")


# A quarter of the parameters is two of five layers, and these two are no neighbours.
LEFT_OUT = {"drop": [OPTIONS[2], OPTIONS[0], OPTIONS[2], OPTIONS[0], OPTIONS[0]]}


def test_refine_starts_from_what_another_method_chose_where_that_is_the_better_child():
    centres: list[tuple[str, ...]] = []
    outcome, _ = run(rounds=1, others=LEFT_OUT, around=centres)
    start = next(one for one in outcome.scored if one.origin == "drop")
    assert [block.key for block in start.record.blocks] == [block.key for block in LEFT_OUT["drop"]]
    assert start.value("kl") < outcome.scored[0].value("kl")
    assert start.record.objective == pytest.approx(0.3 * (1 + 1.2))
    assert (start.record.status, outcome.scored[0].record.status) == ("feasible", "optimal")
    assert start.record.gap == pytest.approx(1 - outcome.scored[0].record.objective / start.record.objective)
    assert centres == [tuple(block.key for block in start.record.blocks)]
    assert outcome.best.value("kl") <= start.value("kl")


def test_search_again_keeps_near_the_model_that_was_scored_where_the_limits_allow():
    centre = [OPTIONS[0], OPTIONS[2], OPTIONS[0], OPTIONS[2], OPTIONS[0]]
    # Around the centre it looks as if keeping what is gone and dropping what is kept were a bargain, all five at once.
    scores = score_around(centre).with_columns(
        kl=pl.when("is_base").then(1.0).when(pl.col("layer").is_in([1, 3])).then(0.9).otherwise(0.8)
    )
    architecture = make_architecture(num_layers=NUM_LAYERS)
    costs = make_costs(architecture, OPTIONS)

    def changed(bound: float, max_changed_layers: int) -> int:
        record = search_again(
            scores,
            costs=costs,
            target_name="t",
            requirements=Requirements(limits=(limit("num_parameters", bound),), pins=()),
            settings=settings(rounds=1, max_changed_layers=max_changed_layers),
        )
        assert all(limit.is_met for limit in record.limits)
        return sum(one.key != other.key for one, other in zip(record.blocks, centre, strict=True))

    assert changed(0.75, 5) == 5
    assert changed(0.75, 1) == 1
    # Nothing within one layer of the centre is small enough: then everything may change.
    assert changed(0.3, 1) > 1


def test_search_again_without_time_for_what_is_near_searches_all_and_tells(monkeypatch: pytest.MonkeyPatch):
    centre = [OPTIONS[0]] * NUM_LAYERS
    notes: list[str] = []
    give_solver_no_time(monkeypatch, [0])
    record = search_again(
        score_around(centre),
        costs=make_costs(make_architecture(num_layers=NUM_LAYERS), OPTIONS),
        target_name="t",
        requirements=REQUIREMENTS,
        settings=settings(rounds=1, max_changed_layers=1),
        note=notes.append,
    )
    assert record.status == "optimal"
    assert sum(one.key != other.key for one, other in zip(record.blocks, centre, strict=True)) > 1
    (told,) = notes
    assert told.startswith("no answer with at most 1 layers changed: the solver found none within search.time_limit_s")


def test_refine_goes_on_without_the_answers_that_the_solver_has_no_time_for(monkeypatch: pytest.MonkeyPatch):
    whole, _ = run(rounds=1)
    reporter = NotingReporter()
    give_solver_no_time(monkeypatch, [1])  # the pool's answer is there, the first near it is not
    outcome, _ = run(rounds=1, reporter=reporter)
    (told,) = (note for note in reporter.notes if "no answer" in note)
    assert told.startswith("no answer with at most 4 layers changed")
    assert [one.origin for one in outcome.scored] == [
        one.origin for one in whole.scored if "at most 4 layers" not in one.origin
    ]


def test_no_other_method_is_heard_against_a_pin_a_pattern_or_a_limit():
    pin = Pin(layers=(0,), attention="no_op", ffn="parent")
    for outcome, _ in (
        run(rounds=0, others=LEFT_OUT, pins=(pin,)),
        run(rounds=0, others=LEFT_OUT, layers="homogeneous_ffn"),
        run(rounds=0, others={"drop": [OPTIONS[2], *[OPTIONS[0]] * 4], "uniform": None}),
        run(rounds=0, others={"uniform": [OPTIONS[1]] * NUM_LAYERS}, layers="depth_only"),
        run(
            rounds=0, others={"uniform": [BlockSpec(attention=gqa(1), ffn=swiglu(8), parent_layers=(0,))] * NUM_LAYERS}
        ),
    ):
        assert [one.origin for one in outcome.scored] == ["pool 0"]


def test_refine_ends_where_no_single_layer_may_change_for_the_better():
    outcome, _ = run(rounds=4, max_changed_layers=1)
    assert [one.origin for one in outcome.scored] == ["pool 0", "round 1, at most 1 layers changed, answer 1"]
    assert outcome.best == outcome.scored[0]
    assert outcome.scores.filter("is_base")["kl"].unique().to_list() == [outcome.best.value("kl")]


def test_refine_ends_with_the_first_round_that_brings_nothing():
    centres: list[tuple[str, ...]] = []
    outcome, _ = run(rounds=60, around=centres)
    # Every round but the last gave the next one another centre; the last one's is what stays.
    assert 1 < len(centres) < 60
    assert len(set(centres)) == len(centres)
    assert centres[-1] == tuple(block.key for block in outcome.best.record.blocks)


def test_refine_ends_when_what_a_round_promises_is_worse_as_a_whole_model():
    centres: list[tuple[str, ...]] = []
    outcome, _ = run(rounds=60, around=centres, is_misled=True)
    assert len(centres) == 1
    assert len(outcome.scored) > 1
    assert outcome.best == outcome.scored[0]


def test_refine_scores_several_answers_of_a_step_none_of_them_twice():
    one, _ = run(rounds=3)
    several, _ = run(rounds=3, answers_per_step=3)
    children = [tuple(block.key for block in scored.record.blocks) for scored in several.scored]
    assert len(set(children)) == len(children)
    of_a_step = [scored for scored in several.scored if scored.origin.startswith("round 1, at most 2 layers changed")]
    assert [scored.origin.rpartition(" ")[2] for scored in of_a_step] == ["1", "2", "3"]
    promised = [scored.record.objective for scored in of_a_step]
    assert promised == sorted(promised)
    for scored in of_a_step:
        pairs = zip(scored.record.blocks, several.scored[0].record.blocks, strict=True)
        assert sum(new.key != old.key for new, old in pairs) <= 2
    assert several.best.value("kl") <= one.best.value("kl")


def test_a_child_reached_in_steps_is_chosen_by_scores_around_those_before_it():
    centres: list[tuple[str, ...]] = []
    numbers: list[int] = []
    outcome, best = run(rounds=1, path_steps=3, around=centres, numbers=numbers)
    assert numbers == [1, 2, 3]  # a round reads other tokens than the steps before it
    walked = next(one for one in outcome.scored if one.origin == IN_STEPS)
    # A third of what has to go, then two thirds, then all, and what went stays gone.
    keys = [block.key for block in OPTIONS]
    path = [*centres[:2], [block.key for block in walked.record.blocks]]
    for before, after in itertools.pairwise(path):
        assert all(keys.index(one) <= keys.index(other) for one, other in zip(before, after, strict=True))
    assert any(key != keys[0] for key in path[0])
    assert all(limit.is_met for limit in walked.record.limits)
    assert best <= walked.value("kl") < outcome.scored[0].value("kl")
    assert centres[2] == tuple(
        block.key for block in min(outcome.scored[:2], key=lambda one: one.value("kl")).record.blocks
    )
    without, _ = run(rounds=0, path_steps=3)
    assert [one.origin for one in without.scored] == ["pool 0"]


def test_refine_averages_over_the_tokens_of_all_rounds_around_a_child_that_nothing_improved():
    centres: list[tuple[str, ...]] = []
    outcome, _ = run(rounds=2, around=centres, is_misled=True, num_parts=8)
    right, _ = run(rounds=1)
    assert centres[0] == centres[1]
    assert outcome.best.value("kl") == right.best.value("kl") < outcome.scored[0].value("kl")
    assert outcome.best.origin == right.best.origin.replace("round 1", "round 2")
    assert outcome.scores["num_tokens"].to_list() == [2] * len(outcome.scores)


def test_layers_of_a_depth_only_search_stay_whole_or_go():
    outcome, _ = run(rounds=8, layers="depth_only")
    for one in outcome.scored:
        assert {block.key for block in one.record.blocks} == {OPTIONS[0].key, OPTIONS[2].key}
        assert all(limit.is_met for limit in one.record.limits)
    # A quarter of the parameters is two of five layers, and the first two are the cheapest alone.
    assert outcome.scored[0].record.objective == pytest.approx(0.3 * (1 + 1.1))
    assert outcome.best.value("kl") < outcome.scored[0].value("kl")


def test_a_homogeneous_child_is_not_refined_where_not_all_its_layers_may_change():
    outcome, _ = run(rounds=8, layers="homogeneous", max_changed_layers=4)
    assert [one.origin for one in outcome.scored] == ["pool 0"]
    assert len({one.key for one in outcome.best.record.blocks}) == 1
