"""Scores put together from halves: exact where halves add up, measured where a half is no candidate."""

from dataclasses import replace

import polars as pl
import pytest

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, BlockSpec, gqa, swiglu
from pipeline.puzzle.half_scores import measured_around, with_sums
from pipeline.puzzle.search_space import SearchSpace, resolve
from pipeline.puzzle.tables import SCHEMAS, SCORES
from pipeline.recipe import SearchSpaceConfig
from tests.pipeline.puzzle.builders import make_architecture

ARCHITECTURE: Architecture = make_architecture(num_layers=3)
OWN = ARCHITECTURE.homogeneous_block()
WORTH = {"kv2": 0.0, "kv1": 0.25, "no_op": 1.0, "ffn64": 0.0, "ffn32": 0.5, "ffn16": 2.0}


def whole_space() -> SearchSpace:
    """Every attention beside every FFN."""
    options = SearchSpaceConfig(
        attention=("parent", 1, "no_op"), ffn=("parent", 32, 16, "no_op"), overrides=(), portable=False
    )
    return resolve(options, ARCHITECTURE)


def portable_space() -> SearchSpace:
    """The same without attention that has no FFN behind it."""
    whole = whole_space()
    layers = tuple(
        replace(
            layer,
            blocks=tuple(
                block for block in layer.blocks if block.ffn.kind != "no_op" or block.attention.kind == "no_op"
            ),
        )
        for layer in whole.layers
    )
    return replace(whole, layers=layers)


def measures(space: SearchSpace, base: list[BlockSpec]) -> pl.DataFrame:
    """A model whose loss is what its halves are worth, and ten times as much where a layer has neither."""

    def worth(block: BlockSpec) -> float:
        if (block.attention, block.ffn) == (NO_ATTENTION, NO_FFN):
            return 30.0
        return WORTH[block.attention.key] + (3.0 if block.ffn == NO_FFN else WORTH[block.ffn.key])

    total = sum(map(worth, base))
    rows = [
        (
            layer,
            block.attention.key,
            block.ffn.key,
            block.key == base[layer].key,
            *[scale * (total - worth(base[layer]) + worth(block)) for scale in (1.0, 2.0, 3.0, 4.0)],
            None,
            8,
        )
        for layer, options in enumerate(space.layers)
        for block in options.blocks
    ]
    return pl.DataFrame(rows, schema=SCHEMAS[SCORES], orient="row")


def test_sums_of_halves_are_the_joint_scores_where_halves_add_up():
    space = portable_space()
    base = [OWN, BlockSpec(attention=NO_ATTENTION, ffn=swiglu(32), parent_layers=(1,)), OWN]
    measured = measured_around(space, base)
    found, wanted = with_sums(measures(measured, base), space, base), measures(space, base)
    assert found.drop("kl", "lm_loss", "hidden_cosine", "top1_error").equals(
        wanted.drop("kl", "lm_loss", "hidden_cosine", "top1_error")
    )
    for measure in ("kl", "lm_loss", "hidden_cosine", "top1_error"):
        assert found[measure].to_list() == pytest.approx(wanted[measure].to_list())
    # Of ten blocks around the parent's own: two attentions, two FFNs, the layer gone whole, and the block itself.
    assert [len(options.blocks) for options in measured.layers] == [6, 7, 6]


def test_the_parents_block_is_measured_around_a_layer_without_a_half_in_common():
    narrow = BlockSpec(attention=gqa(1), ffn=swiglu(16), parent_layers=(1,))
    measured = measured_around(portable_space(), [OWN, narrow, OWN]).layers[1].blocks
    assert OWN.key in {block.key for block in measured}
    assert len(measured) < len(portable_space().layers[1].blocks)


def test_a_layer_gone_whole_is_measured_and_so_is_everything_where_it_is_gone():
    space, gone = whole_space(), BlockSpec(attention=NO_ATTENTION, ffn=NO_FFN, parent_layers=(1,))
    measured = measured_around(space, [OWN, gone, OWN]).layers
    assert {block.key for block in measured[0].blocks} == {
        OWN.key,
        gone.key,
        *(OWN.model_copy(update={"attention": one}).key for one in (gqa(1), NO_ATTENTION)),
        *(OWN.model_copy(update={"ffn": one}).key for one in (swiglu(32), swiglu(16), NO_FFN)),
    }
    assert measured[1].blocks == space.layers[1].blocks
