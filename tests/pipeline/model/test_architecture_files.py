"""Published architectures from their files, against published figures; the DeciLM schema there and back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.architecture import (
    LINEAR_ATTENTION,
    LINEAR_FFN,
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    BlockSpec,
    RopeScaling,
    gqa,
    swiglu,
)
from pipeline.costs import attention_parameters, ffn_parameters, kv_bytes_per_token, num_parameters
from pipeline.errors import CheckpointError, RecipeError
from pipeline.model.architecture_files import (
    ARCHITECTURES_DIR,
    load_architecture,
    parent_architecture,
    require_same_shape,
)
from pipeline.model.decilm_config import decilm_architecture, decilm_config, width_from_multiplier
from pipeline.model.exported_code.configuration_decilm import ffn_width
from pipeline.model.random_parent import make_random_parent
from pipeline.puzzle.search_space import resolve
from pipeline.recipe import RandomParent
from pipeline.recipe_file import load_recipe

SUPER, ULTRA = "llama-3.3-nemotron-super-49b", "llama-3.1-nemotron-ultra-253b"
FP8 = 1.0


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes", "num_layers"),
    [
        ("llama-3.1-8b-instruct", 8_030_261_248, 65_536, 32),
        ("llama-3.3-70b-instruct", 70_553_706_496, 163_840, 80),
        ("llama-3.1-405b-instruct", 405_853_388_800, 258_048, 126),
        (SUPER, 49_867_145_216, 100_352, 80),
        (ULTRA, 253_401_268_224, 131_072, 81),
        ("smollm2-135m-instruct", 134_515_008, 11_520, 30),
    ],
)
def test_published_sizes(name: str, parameters: int, kv_bytes: int, num_layers: int):
    architecture = load_architecture(name)
    assert num_parameters(architecture) == parameters
    assert kv_bytes_per_token(architecture, bytes_per_value=FP8) == kv_bytes
    assert architecture.num_hidden_layers == num_layers


def test_super_holds_300_thousand_tokens_in_80_gb_and_ultra_3_million_in_640_gib():
    for name, tokens, published_gb in ((SUPER, 300_000, 79.97), (ULTRA, 3_000_000, 646.6)):
        architecture = load_architecture(name)
        held = num_parameters(architecture) * FP8 + tokens * kv_bytes_per_token(architecture, bytes_per_value=FP8)
        assert round(held / 1e9, 2 if name == SUPER else 1) == published_gb


def test_super_keeps_49_attentions_and_every_ffn():
    architecture = load_architecture(SUPER)
    removed = [layer for layer, block in enumerate(architecture.blocks) if block.attention == NO_ATTENTION]
    assert removed == [6, 7, 11, *range(42, 52), *range(53, 71)]
    assert all(block.ffn.kind == "swiglu" for block in architecture.blocks)
    # Every layer that keeps its attention keeps its whole FFN, the first one excepted.
    kept = [block for block in architecture.blocks[1:] if block.attention != NO_ATTENTION]
    assert [block.ffn for block in kept] == [swiglu(28_672)] * 48


def test_ultra_keeps_64_attentions_and_has_four_fused_ffns():
    architecture = load_architecture(ULTRA)
    assert sum(block.attention == gqa(8) for block in architecture.blocks) == 64
    wide = [
        block.ffn.intermediate_size
        for block in architecture.blocks
        if block.ffn.intermediate_size and block.ffn.intermediate_size > 53_248
    ]
    assert wide == [399_360, 425_984, 343_040, 301_056]
    assert round(2 * architecture.hidden_size * wide[0] / 1e9, 2) == 13.09  # gate and up of the first, 26 GB in bf16


def test_parent_block_of_the_published_library_of_70b():
    architecture = load_architecture("llama-3.3-70b-instruct")
    block = architecture.homogeneous_block()
    assert attention_parameters(architecture, block.attention) == 151_003_136
    assert ffn_parameters(architecture, block.ffn) == 704_651_264


@pytest.mark.parametrize("path", sorted(ARCHITECTURES_DIR.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_architecture_comes_back_from_the_checkpoint_schema(path: Path):
    architecture = load_architecture(path.stem)
    written = decilm_config(architecture, torch_dtype="bfloat16")
    assert decilm_architecture(json.loads(json.dumps(written)), token_ids={}, path=path) == architecture
    shipped = json.loads(path.read_text())
    if "block_configs" in shipped:
        assert written == shipped


def test_every_kind_of_block_comes_back():
    kinds = [(gqa(2), swiglu(512)), (LINEAR_ATTENTION, NO_FFN), (NO_ATTENTION, LINEAR_FFN), (NO_ATTENTION, NO_FFN)]
    architecture = load_architecture("llama-3.1-8b-instruct").with_blocks(
        [BlockSpec(attention=one, ffn=other, parent_layers=(layer,)) for layer, (one, other) in enumerate(kinds)]
    )
    config = decilm_config(architecture, torch_dtype="bfloat16")
    assert decilm_architecture(config, token_ids={}, path=Path("config.json")) == architecture


def test_widths_are_those_of_the_exported_code():
    for hidden_size in (576, 4096, 8192, 16384):
        for thousandths in range(100, 6000, 37):
            multiplier = thousandths / 1000
            assert width_from_multiplier(multiplier, hidden_size=hidden_size) == ffn_width(
                multiplier, hidden_size=hidden_size
            )


def change(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config, **changes}


def change_block(config: dict[str, Any], part: str, **changes: Any) -> dict[str, Any]:
    first, *rest = config["block_configs"]
    return {**config, "block_configs": [{**first, part: {**first[part], **changes}}, *rest]}


def drop_block_key(config: dict[str, Any], part: str, key: str) -> dict[str, Any]:
    first, *rest = config["block_configs"]
    kept = {name: value for name, value in first[part].items() if name != key}
    return {**config, "block_configs": [{**first, part: kept}, *rest]}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: change(c, model_type="llama"), "model_type 'llama'"),
        (lambda c: change(c, num_experts=8), "not known .*num_experts"),
        (lambda c: change(c, hidden_act="gelu"), "hidden_act 'gelu'"),
        (lambda c: change(c, block_configs=[]), "block_configs is 0"),
        (lambda c: change(c, num_hidden_layers=3), "num_hidden_layers = 3"),
        (lambda c: change(c, num_attention_heads=None), "num_attention_heads is None"),
        (lambda c: change(c, vocab_size=0), "does not describe a model"),
        (lambda c: change_block(c, "attention", window_length=512), "window_length = 512"),
        (lambda c: change_block(c, "attention", sparsify=["x"]), "sparsify"),
        (lambda c: change_block(c, "attention", extra=1), r"\[0\].attention has keys that are not known: extra"),
        (lambda c: change_block(c, "ffn", extra=1), r"\[0\].ffn has keys that are not known: extra"),
        (lambda c: drop_block_key(c, "attention", "no_op"), r"\[0\].attention lacks no_op; wanted all 8 keys"),
        (lambda c: drop_block_key(c, "ffn", "sparsify"), r"\[0\].ffn lacks sparsify; wanted all 4 keys"),
        (lambda c: change_block(c, "attention", no_op="false"), "no_op is 'false'; wanted true or false"),
        (lambda c: change_block(c, "ffn", replace_with_linear=None), "replace_with_linear is None"),
        (lambda c: change_block(c, "attention", num_sink_tokens=4), "num_sink_tokens = 4"),
        (lambda c: change_block(c, "attention", unshifted_sink=True), "unshifted_sink = True"),
        (lambda c: change_block(c, "attention", n_heads_in_group=7), "n_heads_in_group is 7"),
        (lambda c: change_block(c, "attention", n_heads_in_group=True), "n_heads_in_group is True"),
        (lambda c: change_block(c, "attention", no_op=True, replace_with_linear=True), "both no_op"),
        (lambda c: change_block(c, "ffn", ffn_mult=-1), "ffn_mult is -1"),
        (lambda c: change_block(c, "ffn", ffn_mult=None), "ffn_mult is None"),
    ],
)
def test_what_the_schema_does_not_say_is_refused(edit: Any, message: str):
    config = json.loads((ARCHITECTURES_DIR / f"{SUPER}.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        decilm_architecture(edit(config), token_ids={}, path=Path("config.json"))


def edited(architecture: Architecture, **changes: Any) -> Architecture:
    return architecture.model_copy(update=changes)


def edited_layer(architecture: Architecture, layer: int, **changes: Any) -> Architecture:
    blocks = list(architecture.blocks)
    blocks[layer] = blocks[layer].model_copy(update=changes)
    return architecture.with_blocks(blocks)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: edited(a, vocab_size=128_320), "vocab_size is 128320, .* vocab_size is 128256"),
        (lambda a: edited(a, rms_norm_eps=1e-6), "rms_norm_eps is 1e-06, .* rms_norm_eps is 1e-05"),
        (lambda a: edited(a, rope_theta=10_000.0), r"rope_theta is 10000\.0, .* rope_theta is 500000\.0"),
        (lambda a: edited(a, rope_scaling=None), "rope_scaling is None, .* factor=8.0"),
        (lambda a: edited(a, rms_norm_eps=1e-6, head_dim=64), "head_dim is 64"),  # the first that differs
        (lambda a: edited_layer(a, 3, ffn=swiglu(7168)), "layer 3 is kv8.ffn7168, .* layer 3 is kv8.ffn14336"),
        (lambda a: edited_layer(a, 31, attention=gqa(4)), "layer 31 is kv4.ffn14336"),
    ],
)
def test_a_checkpoint_that_is_not_the_named_architecture_is_refused(edit: Any, message: str):
    with pytest.raises(CheckpointError, match=message):
        require_same_shape(edit(load_architecture("llama-3.1-8b-instruct")), named="llama-3.1-8b-instruct")


def test_token_ids_and_context_of_a_checkpoint_may_differ_from_the_named_architecture():
    architecture = load_architecture("llama-3.1-8b-instruct")
    other = edited(architecture, bos_token_id=None, eos_token_ids=(7,), pad_token_id=9, max_position_embeddings=8192)
    require_same_shape(other, named="llama-3.1-8b-instruct")


def test_rotary_scaling_is_8_for_parents_and_super_and_16_for_ultra():
    for name in ("llama-3.1-8b-instruct", "llama-3.3-70b-instruct", "llama-3.1-405b-instruct", SUPER, ULTRA):
        architecture = load_architecture(name)
        assert architecture.rope_scaling == RopeScaling(
            rope_type="llama3",
            factor=16.0 if name == ULTRA else 8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(RecipeError, match=rf"no architecture 'llama-9b'.*{ULTRA}"):
        load_architecture("llama-9b")


def test_a_random_parent_is_what_its_configuration_says(tmp_path: Path):
    parent = load_recipe("tiny").parent
    assert isinstance(parent, RandomParent)
    assert make_random_parent(parent, out_dir=tmp_path) == parent_architecture(parent)


@pytest.mark.parametrize(
    ("recipe_name", "blocks_per_layer", "num_blocks"),
    [("llama-8b", 72, 2304), ("super-49b", 16, 1280), ("ultra-253b", 18, 2268)],
)
def test_search_spaces_of_the_large_recipes(recipe_name: str, blocks_per_layer: int, num_blocks: int):
    recipe = load_recipe(recipe_name)
    space = resolve(recipe.search_space, parent_architecture(recipe.parent))
    assert {len(options.blocks) for options in space.layers} == {blocks_per_layer}
    assert sum(len(options.blocks) for options in space.layers) == num_blocks


def test_published_children_lie_in_the_spaces_of_their_recipes():
    for recipe_name, child in (("super-49b", SUPER), ("ultra-253b", ULTRA)):
        recipe = load_recipe(recipe_name)
        space = resolve(recipe.search_space, parent_architecture(recipe.parent))
        unfused = [
            block
            for block in load_architecture(child).blocks
            if (block.ffn.intermediate_size or 0) <= (space.parent.ffn.intermediate_size or 0)
        ]
        assert all(block.attention in space.distinct_attention for block in unfused)
        assert all(block.ffn in space.distinct_ffn for block in unfused)


def test_published_budgets():
    large, ultra = load_recipe("super-49b"), load_recipe("ultra-253b")
    assert (large.block_library.tokens, large.kd.tokens) == (1_000_000_000, 40_000_000_000)
    assert large.sft.stages[0].optimizer.schedule == "constant"
    assert large.sft.stages[0].optimizer.learning_rate == 5e-6
    assert ultra.kd.tokens + sum(phase.tokens for phase in ultra.kd.long_context) == 64_800_000_000
    assert ultra.cpt.tokens + sum(phase.tokens for phase in ultra.cpt.long_context) == 88_000_000_000
    rl = ultra.rl
    assert rl.prompts_per_step * rl.samples_per_prompt == 1152 == 2 * 576
    assert rl.updates_per_rollout == 2


def test_reading_an_architecture_imports_no_torch():
    code = (
        "import sys; from pipeline.model.architecture_files import load_architecture; "
        f"load_architecture({ULTRA!r}); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]
