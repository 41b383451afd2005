"""Options, overrides and the portable profile of the search space."""

import pytest
from pydantic import ValidationError

from pipeline.architecture import swiglu
from pipeline.errors import RecipeError
from pipeline.model.architecture_files import load_architecture
from pipeline.puzzle.search_space import attention_from_key, ffn_from_key, resolve, resolve_ffn
from pipeline.recipe import LayerOverride, SearchSpaceConfig
from tests.pipeline.puzzle.builders import make_architecture

PARENT = make_architecture(num_layers=3, hidden_size=32, intermediate_size=512, num_key_value_heads=4)


def space(**changes: object) -> SearchSpaceConfig:
    return SearchSpaceConfig.model_validate(
        {"attention": ["parent", 2, "no_op"], "ffn": ["parent", 256, "no_op"], "overrides": [], "portable": False}
        | changes
    )


def test_resolve_product_has_parent_first_in_a_fixed_order():
    found = resolve(space(attention=["no_op", 1, "parent", 2, 4]), PARENT)
    assert [spec.key for spec in found.layers[1].attention] == ["kv4", "kv2", "kv1", "no_op"]
    assert [block.key for block in found.layers[1].blocks][:3] == ["kv4+ffn512", "kv4+ffn256", "kv4+no_op"]
    assert len(found.layers[1].blocks) == 12
    assert found.num_candidates == 3 * 11
    assert all(block.parent_layers == (2,) for block in found.layers[2].blocks)


@pytest.mark.parametrize(
    ("share", "width", "expected"), [(0.58, 12800, 7424), (0.7, 23040, 16128), (0.5, 1536, 768), (0.55, 1536, 768)]
)
def test_resolve_share_of_a_width_that_is_exact_in_decimals_loses_no_step(share: float, width: int, expected: int):
    assert resolve_ffn(share, parent=swiglu(width)).intermediate_size == expected


def test_resolve_override_replaces_one_list_of_some_layers():
    found = resolve(space(overrides=[LayerOverride(layers=(0, 1), attention=("parent",))]), PARENT)
    assert [spec.key for spec in found.layers[0].attention] == ["kv4"]
    assert len(found.layers[1].ffn) == 3
    assert len(found.layers[2].attention) == 3
    assert [spec.key for spec in found.distinct_attention] == ["kv4", "kv2", "no_op"]


def test_resolve_portable_keeps_to_what_stock_runtimes_load():
    found = resolve(space(portable=True), PARENT)
    keys = [[block.key for block in options.blocks] for options in found.layers]
    assert keys[0] == ["kv4+ffn512", "kv4+ffn256", "kv2+ffn512", "kv2+ffn256"]
    assert keys[1] == [
        "kv4+ffn512",
        "kv4+ffn256",
        "kv2+ffn512",
        "kv2+ffn256",
        "no_op+ffn512",
        "no_op+ffn256",
        "no_op+no_op",
    ]
    assert keys[2] == keys[1][:-1]
    assert [spec.key for spec in found.layers[2].ffn] == ["ffn512", "ffn256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": ["parent", 3]}, "3 key/value heads does not divide the parent's 4"),
        ({"ffn": ["parent", 1024]}, "wider than the parent's intermediate_size of 512"),
        ({"ffn": ["parent", 300], "portable": True}, "width 300, not a multiple of 256"),
        ({"attention": ["parent", "linear"], "portable": True}, "linear subblock"),
        ({"overrides": [LayerOverride(layers=(7,), ffn=("parent",))]}, "names layer 7; the parent has layers 0 to 2"),
        ({"overrides": [LayerOverride(layers=(2,), ffn=("no_op",))], "portable": True}, "layer 2 without a portable"),
    ],
)
def test_resolve_option_that_does_not_fit_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(RecipeError, match=message):
        resolve(space(**changes), PARENT)


def test_specs_are_read_back_from_their_keys():
    found = resolve(space(attention=["parent", "linear", 1, "no_op"], ffn=["parent", "linear", "no_op"]), PARENT)
    for options in found.layers:
        assert all(attention_from_key(spec.key) == spec for spec in options.attention)
        assert all(ffn_from_key(spec.key) == spec for spec in options.ffn)


def preset(name: str) -> SearchSpaceConfig:
    return SearchSpaceConfig.model_validate({"preset": name, "overrides": [], "portable": False})


def test_preset_super_is_the_published_library_of_llama_70b():
    options = resolve(preset("super"), load_architecture("llama-3.3-70b-instruct")).layers[0]
    assert [spec.key for spec in options.attention] == ["kv8", "no_op"]
    widths = [spec.intermediate_size for spec in options.ffn]
    assert widths == [28672, 21504, 17920, 14336, 7168, 5632, 2816, None]
    assert len(options.blocks) == 16


def test_preset_paper_has_54_blocks_per_layer_of_a_parent_with_8_heads():
    options = resolve(preset("paper"), load_architecture("llama-3.3-70b-instruct")).layers[79]
    assert [spec.key for spec in options.attention] == ["kv8", "kv4", "kv2", "kv1", "linear", "no_op"]
    assert [spec.intermediate_size for spec in options.ffn][:7] == [28672, 24832, 21504, 14336, 7168, 5632, 2816]
    assert len(options.blocks) == 54


def test_preset_of_a_small_parent_has_each_variant_once():
    architecture = make_architecture(num_attention_heads=6, hidden_size=48, num_key_value_heads=3, intermediate_size=20)
    options = resolve(preset("paper"), architecture).layers[0]
    assert [spec.key for spec in options.attention] == ["kv3", "kv1", "linear", "no_op"]
    assert [spec.key for spec in options.ffn] == ["ffn20", "ffn16", "ffn8", "linear", "no_op"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, "preset is 'huge'; it is one of super, paper"),
        ({"preset": "super", "ffn": ["parent"]}, "stands for ffn: give one or the other"),
    ],
)
def test_preset_that_is_unknown_or_beside_its_lists_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        SearchSpaceConfig.model_validate({"overrides": [], "portable": False} | changes)
