"""What scoring and refinement are planned to cost, against counts by hand."""

import pytest

from pipeline.planning import case as plan_case
from pipeline.planning.case import Estimate
from pipeline.planning.estimates import estimate
from pipeline.planning.ranges import Range
from pipeline.puzzle import composition, divergence
from pipeline.puzzle.search_space import dropped
from pipeline.recipe_file import load_recipe
from tests.pipeline.planning.builders import case


def test_refinement_is_planned_with_what_other_methods_choose_and_the_pass_that_orders_layers():
    recipe = load_recipe("tiny")
    search = recipe.search.model_copy(update={"refinement": recipe.search.refinement.model_copy(update={"rounds": 0})})
    settings = case(recipe.model_copy(update={"search": search}))
    length, tokens = recipe.distillation_mix.sequence_length, search.refinement.tokens
    num_models = search.pool.num_solutions + 6
    planned = estimate("refined_solution", settings)
    assert planned.tokens == Range.of((num_models + 1) * tokens)
    layers = settings.sizes.parent_flops(context_tokens=length, with_head=False)
    assert planned.flops == Range.of(tokens * (num_models * (layers + settings.sizes.head_flops) + layers))


def test_layers_left_out_one_by_one_are_planned_as_scores_of_what_remains():
    recipe = load_recipe("tiny")

    def planned(depth_steps: int) -> Estimate:
        scores = recipe.block_scores.model_copy(update={"depth_steps": depth_steps})
        return estimate("block_scores", case(recipe.model_copy(update={"block_scores": scores})))

    settings, tokens = case(recipe), recipe.block_scores.tokens
    layers = settings.sizes.parent_flops(context_tokens=recipe.distillation_mix.sequence_length, with_head=False)
    layer, head = layers / 6, settings.sizes.head_flops
    # Of six layers one is gone, and five candidates have 4, 3, 2, 1 and no layer behind them; then four, and 3, 2, 1.
    # Around them: the parent, the model without those that are gone, once for its end and once for what it reaches.
    second = 10 * layer + 5 * head + (6 + 2 * 5) * layer + 2 * head
    third = 6 * layer + 4 * head + (6 + 2 * 4) * layer + 2 * head
    # Layer 0 keeps its attention: that it goes is no candidate, and five are behind it. Of the parent two passes.
    space = settings.sizes.space
    first = 5 * layer + head + 2 * 6 * layer + 2 * head
    assert planned(1).tokens == Range.of(tokens * (space.num_candidates + 1))
    assert planned(1).work[-1][0] == Range.of(tokens * first)
    assert planned(3).tokens.expected - planned(1).tokens.expected == tokens * (5 + 4)
    assert planned(3).flops.expected - planned(1).flops.expected == pytest.approx(tokens * (second + third))
    assert planned(99) == planned(6)


def test_steps_of_a_refinement_are_planned_as_rounds_with_one_child_at_their_end():
    recipe = load_recipe("tiny")

    def planned(path_steps: int) -> Estimate:
        refinement = recipe.search.refinement.model_copy(update={"path_steps": path_steps})
        search = recipe.search.model_copy(update={"refinement": refinement})
        return estimate("refined_solution", case(recipe.model_copy(update={"search": search})))

    refinement, space = recipe.search.refinement, case(recipe).sizes.space
    # Around the parent: what is new in one half, and the layer gone whole, which is new in both.
    around = sum(
        sum(
            (block.attention == space.parent.attention) != (block.ffn == space.parent.ffn)
            or block.key == dropped(0).key
            for block in options.blocks
        )
        for options in space.layers
    )
    tokens = {steps: planned(steps).tokens.expected for steps in (1, 2, 3)}
    assert tokens[2] - tokens[1] == around * refinement.tokens_per_round + refinement.tokens
    assert tokens[3] - tokens[2] == around * refinement.tokens_per_round


def test_scores_batch_and_keep_as_planned():
    """The plan loads no torch and so has these figures of its own."""
    assert plan_case.CANDIDATE_TOKENS == composition.MAX_BATCH_TOKENS
    assert plan_case.KEPT_PARENT_BYTES == divergence.MAX_KEPT_BYTES
