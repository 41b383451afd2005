"""The heterogeneous Llama against transformers' Llama, and against itself without a cache."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.architecture import (
    LINEAR_ATTENTION,
    LINEAR_FFN,
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    AttentionSpec,
    gqa,
    swiglu,
)
from pipeline.model.heterogeneous import (
    HeterogeneousLlamaForCausalLM,
    attention_inputs,
    build_model,
    build_subblock_attention,
    build_subblock_ffn,
    unit_rms,
)
from tests.pipeline.model.builders import (
    LLAMA3_ROPE,
    layer_tensors,
    make_architecture,
    make_blocks,
    make_llama,
    make_model,
    random_ids,
)

PARENTS = [
    {},
    {"tie_word_embeddings": False},
    {"rope_scaling": LLAMA3_ROPE},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 12},
    {"blocks": make_blocks(*[(gqa(4), swiglu(48))] * 2)},
    {"blocks": make_blocks(*[(gqa(1), swiglu(40))] * 2), "head_dim": 16, "tie_word_embeddings": False},
]


@pytest.mark.parametrize("changes", PARENTS, ids=lambda changes: "-".join(changes) or "gqa")
@torch.no_grad()
def test_all_parent_architecture_equals_llama_bit_for_bit(changes: dict[str, Any]):
    architecture = make_architecture(**changes)
    ours, llama = make_model(architecture), make_llama(architecture)
    ids_BT = random_ids(40)
    assert torch.equal(ours(ids_BT, use_cache=False).logits, llama(ids_BT, use_cache=False).logits)
    outputs = [model(ids_BT[:, :30], use_cache=True) for model in (ours, llama)]
    for token in range(30, 40):
        outputs = [
            model(ids_BT[:, token : token + 1], cache=output.cache, use_cache=True)
            for model, output in zip((ours, llama), outputs, strict=True)
        ]
        assert torch.equal(outputs[0].logits, outputs[1].logits)


@torch.no_grad()
def test_padded_batch_equals_llama_bit_for_bit():
    architecture = make_architecture()
    ids_BT = random_ids(12)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :5] = 0
    ours, llama = (
        model(ids_BT, attention_mask=mask_BT).logits for model in (make_model(architecture), make_llama(architecture))
    )
    assert torch.equal(ours, llama)


def test_loss_and_gradients_equal_llama():
    architecture = make_architecture()
    ours, llama = make_model(architecture), make_llama(architecture)
    ids_BT = random_ids(16)
    for model in (ours, llama):
        model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    references = dict(llama.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, references.pop(name).grad), name
    assert not references


def without_attention(*layers: int) -> Architecture:
    return make_architecture(
        eos_token_ids=(),
        pad_token_id=None,
        blocks=make_blocks(*[(NO_ATTENTION if layer in layers else gqa(2), swiglu(48)) for layer in range(3)]),
    )


CHILDREN = {
    "first": without_attention(0),
    "middle": without_attention(1),
    "last": without_attention(2),
    "all": without_attention(0, 1, 2),
    "every_kind": make_architecture(
        eos_token_ids=(),
        pad_token_id=None,
        attention_bias=True,
        mlp_bias=True,
        blocks=make_blocks(
            (LINEAR_ATTENTION, swiglu(48)), (gqa(4), NO_FFN), (NO_ATTENTION, NO_FFN), (gqa(1), LINEAR_FFN)
        ),
    ),
}


@pytest.mark.parametrize("name", CHILDREN)
@torch.no_grad()
def test_cached_logits_equal_uncached(name: str):
    model = make_model(CHILDREN[name])
    ids_BT = random_ids(16)
    output = model(ids_BT[:, :9], use_cache=True)
    steps = [output.logits]
    for token in range(9, 16):
        output = model(ids_BT[:, token : token + 1], cache=output.cache, use_cache=True)
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids_BT, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CHILDREN)
@torch.no_grad()
def test_generate_equals_a_greedy_loop_without_cache(name: str):
    model = make_model(CHILDREN[name])
    prompt_BT = random_ids(7)
    expected_BT = greedy(model, prompt_BT, num_tokens=8)
    generated_BT = model.generate(
        prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=8, do_sample=False
    )
    assert torch.equal(generated_BT, expected_BT)


@torch.no_grad()
def test_generate_from_left_padded_prompts_equals_each_alone():
    model = make_model(CHILDREN["first"])
    prompts = [random_ids(9, batch_size=1, seed=1), random_ids(5, batch_size=1, seed=2)]
    padded_BT = torch.cat([prompts[0], torch.nn.functional.pad(prompts[1], (4, 0))])
    mask_BT = torch.ones_like(padded_BT)
    mask_BT[1, :4] = 0
    generated_BT = model.generate(padded_BT, attention_mask=mask_BT, max_new_tokens=6, do_sample=False)
    for row, prompt in enumerate(prompts):
        assert torch.equal(generated_BT[row, -6:], greedy(model, prompt, num_tokens=6)[0, -6:])


def greedy(model: HeterogeneousLlamaForCausalLM, ids_BT: Tensor, *, num_tokens: int) -> Tensor:
    for _ in range(num_tokens):
        next_B1 = model(ids_BT, use_cache=False).logits[:, -1:].argmax(dim=-1)
        ids_BT = torch.cat([ids_BT, next_B1], dim=1)
    return ids_BT


@torch.no_grad()
def test_cache_holds_one_slot_per_attention_layer():
    cache = make_model(CHILDREN["every_kind"])(random_ids(5), use_cache=True).cache
    filled = [layer.keys.shape[1] for layer in cache.layers if layer.is_initialized]
    assert filled == [4, 1]
    assert cache.get_seq_length() == 5


@torch.no_grad()
def test_layers_called_one_by_one_equal_the_model():
    model = make_model(CHILDREN["every_kind"])
    ids_BT = random_ids(10)
    kwargs = attention_inputs(model, batch_size=2, num_tokens=10, device="cpu", dtype=torch.float32)
    hidden_BTD = model.model.embed_tokens(ids_BT)
    for layer in model.model.layers:
        hidden_BTD = layer.feed_forward(layer.attend(hidden_BTD, **kwargs))
    assert torch.equal(model.lm_head(model.model.norm(hidden_BTD)), model(ids_BT, use_cache=False).logits)


@torch.no_grad()
def test_packed_samples_do_not_see_each_other():
    model = make_model(CHILDREN["middle"])
    ids_BT = random_ids(14, batch_size=1)
    positions_BT = torch.tensor([[*range(6), *range(8)]])
    apart = torch.cat([model(part, use_cache=False).logits for part in (ids_BT[:, :6], ids_BT[:, 6:])], dim=1)
    together = model(ids_BT, position_ids=positions_BT, use_cache=False).logits
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    kwargs = attention_inputs(
        model, batch_size=1, num_tokens=14, device="cpu", dtype=torch.float32, position_ids_BT=positions_BT
    )
    hidden_BTD = model.model.embed_tokens(ids_BT)
    for layer in model.model.layers:
        hidden_BTD = layer(hidden_BTD, **kwargs)
    assert torch.equal(model.lm_head(model.model.norm(hidden_BTD)), together)


@pytest.mark.parametrize("spec", [gqa(2), LINEAR_ATTENTION, NO_ATTENTION], ids=lambda spec: spec.key)
@torch.no_grad()
def test_attention_subblock_alone_equals_the_layers_attend(spec: AttentionSpec):
    architecture = make_architecture(attention_bias=True, blocks=make_blocks((spec, swiglu(48))))
    model = make_model(architecture)
    kwargs = attention_inputs(model, batch_size=2, num_tokens=6, device="cpu", dtype=torch.float32)
    hidden_BTD = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    subblock = build_subblock_attention(architecture, spec, dtype=torch.float32)
    mine = {name: layer_tensors(model, 0)[name] for name in subblock.state_dict()}
    subblock.load_state_dict(mine, strict=True)
    assert torch.equal(subblock(hidden_BTD, **kwargs), model.model.layers[0].attend(hidden_BTD, **kwargs))


@torch.no_grad()
def test_ffn_subblock_alone_equals_the_layers_feed_forward():
    architecture = make_architecture(mlp_bias=True)
    model = make_model(architecture)
    hidden_BTD = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    subblock = build_subblock_ffn(architecture, swiglu(48), dtype=torch.float32)
    subblock.load_state_dict({name: layer_tensors(model, 0)[name] for name in subblock.state_dict()}, strict=True)
    assert torch.equal(subblock(hidden_BTD), model.model.layers[0].feed_forward(hidden_BTD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_subblocks_given_what_their_norms_begin_with_compute_the_same_bits(dtype: torch.dtype):
    architecture = make_architecture()
    model = make_model(architecture).to(dtype)
    kwargs = attention_inputs(model, batch_size=2, num_tokens=6, device="cpu", dtype=dtype)
    hidden_BTD = 30 * torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    unit_BTD = unit_rms(hidden_BTD, eps=architecture.rms_norm_eps)
    layer = model.model.layers[0]
    assert torch.equal(layer.attend(hidden_BTD, unit_BTD=unit_BTD, **kwargs), layer.attend(hidden_BTD, **kwargs))
    assert torch.equal(layer.feed_forward(hidden_BTD, unit_BTD=unit_BTD), layer.feed_forward(hidden_BTD))


@pytest.mark.parametrize(("attention_bias", "mlp_bias"), list(itertools.product([True, False], repeat=2)))
def test_linear_subblocks_have_a_bias_where_the_parent_has(attention_bias: bool, mlp_bias: bool):
    architecture = make_architecture(
        attention_bias=attention_bias, mlp_bias=mlp_bias, blocks=make_blocks((LINEAR_ATTENTION, LINEAR_FFN))
    )
    names = set(layer_tensors(make_model(architecture), 0))
    assert ("self_attn.linear_attn.bias" in names) == attention_bias
    assert ("mlp.linear_mlp.bias" in names) == mlp_bias


def test_build_model_with_the_same_seed_is_the_same():
    architecture = make_architecture()
    models = [build_model(architecture, dtype=torch.bfloat16, seed=seed) for seed in (3, 3, 4)]
    first, same, other = (model.state_dict()["model.layers.0.mlp.up_proj.weight"] for model in models)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert models[0].lm_head.weight is models[0].model.embed_tokens.weight


def test_gradient_checkpointing_changes_no_gradient():
    architecture = make_architecture(blocks=CHILDREN["first"].blocks)
    plain, checkpointed = make_model(architecture).train(), make_model(architecture).train()
    checkpointed.activation_checkpointing_enable()
    ids_BT = random_ids(8)
    for model in (plain, checkpointed):
        model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    for mine, reference in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, reference.grad)


def test_embedding_of_the_padding_token_is_trained():
    architecture = make_architecture(tie_word_embeddings=False)
    model = make_model(architecture)
    ids_BT = torch.tensor([[5, 2, 7]])  # 2 is padding and the end token at once
    model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    assert model.model.embed_tokens.weight.grad[2].abs().sum() > 0


def test_rotary_frequencies_stay_exact_when_the_model_is_converted():
    model = make_model(make_architecture(rope_scaling=LLAMA3_ROPE))
    exact = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16).to(torch.float64)
    assert model.model.norm.weight.dtype == torch.float64
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
