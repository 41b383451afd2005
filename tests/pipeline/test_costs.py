"""Closed forms against the tensors of models that were built."""

import itertools

import pytest

from pipeline import costs
from pipeline.architecture import LINEAR_ATTENTION, LINEAR_FFN, NO_ATTENTION, NO_FFN, gqa, swiglu
from tests.pipeline.model.builders import layer_tensors, make_architecture, make_blocks, make_model, num_elements

MIXED = make_blocks(
    (gqa(2), swiglu(48)),
    (gqa(4), NO_FFN),
    (gqa(1), swiglu(20)),
    (NO_ATTENTION, swiglu(48)),
    (LINEAR_ATTENTION, LINEAR_FFN),
    (NO_ATTENTION, NO_FFN),
)


@pytest.mark.parametrize(
    ("tied", "attention_bias", "mlp_bias", "head_dim"),
    list(itertools.product([True, False], [True, False], [True, False], [8, 12])),
)
def test_parameters_equal_the_tensors_of_a_built_model(tied: bool, attention_bias: bool, mlp_bias: bool, head_dim: int):
    architecture = make_architecture(
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        head_dim=head_dim,
        blocks=MIXED,
    )
    model = make_model(architecture)
    assert costs.num_parameters(architecture) == num_elements(list(model.parameters()))
    for layer, block in enumerate(architecture.blocks):
        tensors = layer_tensors(model, layer)
        attention = [tensor for name, tensor in tensors.items() if name.startswith(("self_attn.", "input_layernorm"))]
        ffn = [tensor for name, tensor in tensors.items() if name.startswith(("mlp.", "post_attention_layernorm"))]
        assert costs.attention_parameters(architecture, block.attention) == num_elements(attention)
        assert costs.ffn_parameters(architecture, block.ffn) == num_elements(ffn)
        assert costs.block_parameters(architecture, block) == num_elements(list(tensors.values()))


def test_parameters_of_the_published_smollm2_shape_are_its_published_count():
    architecture = make_architecture(
        vocab_size=49152,
        hidden_size=576,
        num_attention_heads=9,
        head_dim=64,
        blocks=make_blocks(*[(gqa(3), swiglu(1536))] * 30),
    )
    assert costs.num_parameters(architecture) == 134_515_008


def test_memory_of_a_llama_70b_block_is_the_one_published_with_its_block_library():
    # NVlabs/puzzle, parent_block_stats.json: FP8, batch 256, 1,200 tokens each.
    architecture = make_architecture(
        hidden_size=8192, num_attention_heads=64, head_dim=128, blocks=make_blocks((gqa(8), swiglu(28672)))
    )
    block = architecture.blocks[0]
    attention = costs.attention_parameters(architecture, block.attention)
    ffn = costs.ffn_parameters(architecture, block.ffn)
    assert (attention, ffn) == (151_003_136, 704_651_264)
    assert costs.weight_mib(ffn, bytes_per_parameter=1.0) == 672.0078125
    # 765.1015625 MiB is the weights and 318,000 tokens: the 307,200 of the batch and 10,800 more.
    kv_mib = 318_000 * costs.kv_bytes_per_token(architecture, bytes_per_value=1.0) / costs.MIB
    assert costs.weight_mib(attention, bytes_per_parameter=1.0) + kv_mib == 765.1015625


def test_devices_hold_a_key_value_head_each_at_least():
    architecture = make_architecture(
        hidden_size=8192, num_attention_heads=64, head_dim=128, blocks=make_blocks((gqa(8), swiglu(28672)))
    )
    specs = [gqa(8), gqa(4), gqa(2), gqa(1)]
    values, parameters = (
        {devices: [count(architecture, spec, num_devices=devices) for spec in specs] for devices in (1, 2, 8, 16)}
        for count in (costs.kv_values_per_token, costs.attention_parameters)
    )
    assert values[1] == [2048, 1024, 512, 256]
    assert values[2] == [2048, 1024, 512, 512]
    assert values[8] == [2048] * 4
    assert values[16] == [4096] * 4
    # Queries, output and norm are held once.
    assert parameters == {
        devices: [2 * 8192 * 8192 + 8192 + 8192 * one for one in held] for devices, held in values.items()
    }
    block = architecture.blocks[0].model_copy(update={"attention": gqa(1)})
    model = architecture.with_blocks([block, block.model_copy(update={"attention": NO_ATTENTION})])
    assert costs.kv_bytes_per_token(model, bytes_per_value=2.0, num_devices=8) == 2 * 2048
    assert costs.num_parameters(model, num_devices=8) == costs.num_parameters(model) + 7 * 8192 * 256
    served = costs.served_memory(
        model, batch_size=3, prompt_tokens=5, generation_tokens=2, bytes_per_value=2.0, num_devices=8
    )
    assert served.cache_bytes == 3 * (5 + 2) * 2 * 2048
    assert served.weights_bytes == 2 * costs.num_parameters(model, num_devices=8)


def test_kv_bytes_equal_the_cache_of_a_built_model():
    architecture = make_architecture(head_dim=12, blocks=MIXED)
    model = make_model(architecture)
    num_tokens = 5
    cache = model(input_ids=model.dummy_inputs["input_ids"][:1, :num_tokens], use_cache=True).cache
    values = sum(
        layer.keys.numel() + layer.values.numel() for layer in cache.layers if getattr(layer, "is_initialized", False)
    )
    assert costs.kv_bytes_per_token(architecture, bytes_per_value=2.0) == 2.0 * values / num_tokens


def test_forward_flops_count_two_per_weight_and_the_attention_scores():
    architecture = make_architecture(blocks=make_blocks((gqa(2), swiglu(48)), (NO_ATTENTION, LINEAR_FFN)))
    matrices = 32 * 320 + 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 32 * 32
    scores = 4 * 32 * 10
    assert costs.forward_flops_per_token(architecture, context_tokens=10) == 2 * matrices + scores


def test_weight_mib_is_binary():
    assert costs.weight_mib(2**20, bytes_per_parameter=2.0) == 2.0
