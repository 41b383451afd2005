"""Subblock times as differences of whole models, on a machine where every subblock has a time of its own."""

import pytest

from pipeline.architecture import NO_ATTENTION, NO_FFN, gqa, swiglu
from pipeline.errors import RecipeError
from pipeline.puzzle.differences import difference_models, subblock_times
from pipeline.puzzle.search_space import SearchSpace, resolve
from pipeline.recipe import SearchSpaceConfig
from tests.pipeline.model.builders import make_architecture, make_blocks

PARENT = make_architecture(blocks=make_blocks(*[(gqa(2), swiglu(512))] * 6))


def space_of(*, attention: tuple = ("parent", 1, "no_op"), ffn: tuple = ("parent", 256, "no_op")) -> SearchSpace:
    return resolve(SearchSpaceConfig(attention=attention, ffn=ffn, overrides=(), portable=False), PARENT)


def test_times_of_subblocks_are_those_that_models_are_made_of():
    space = space_of()
    own = {gqa(2): 5.0, gqa(1): 3.0, NO_ATTENTION: 0.0, swiglu(512): 4.0, swiglu(256): 2.5, NO_FFN: 0.5}
    whole_ms = {
        name: 7.0 + sum(own[block.attention] + own[block.ffn] for block in model.blocks)
        for name, model in difference_models(PARENT, space).items()
    }
    found = subblock_times(PARENT, space, whole_ms)
    expected = {("attention" if spec in (gqa(2), gqa(1), NO_ATTENTION) else "ffn", spec.key): own[spec] for spec in own}
    assert found == pytest.approx(expected | {("fixed", "fixed"): 7.0})


def test_layer_0_keeps_its_attention_in_every_model():
    assert {model.blocks[0].attention for model in difference_models(PARENT, space_of()).values()} == {gqa(2)}


def test_parent_of_one_layer_has_no_differences():
    single = make_architecture(blocks=make_blocks((gqa(2), swiglu(512))))
    with pytest.raises(RecipeError, match="a parent of one layer has no differences to take"):
        difference_models(single, space_of())


def test_noise_never_makes_a_subblock_take_less_than_nothing():
    space = space_of(ffn=("parent", "no_op"))
    whole_ms = {
        "parent": 10.0,
        "shallow": 5.5,
        "attention no_op": 4.0,
        "attention kv1": 3.0,
        "ffn no_op": 1.0,
    }
    times = subblock_times(PARENT, space, whole_ms)
    assert times["attention", "kv2"] == pytest.approx(1.2)
    assert times["attention", "kv1"] == 0.0
    assert times["ffn", "no_op"] == 0.0
    assert times["fixed", "fixed"] == pytest.approx(1.0)
