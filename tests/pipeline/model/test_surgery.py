"""Initial weights of variants against the parent they are cut from."""

import pytest
import torch
from torch import Tensor

from pipeline.architecture import (
    LINEAR_ATTENTION,
    LINEAR_FFN,
    NO_ATTENTION,
    NO_FFN,
    AttentionSpec,
    FFNSpec,
    gqa,
    swiglu,
)
from pipeline.errors import RecipeError
from pipeline.model.heterogeneous import attention_inputs, build_subblock_attention, build_subblock_ffn
from pipeline.model.surgery import initial_attention, initial_ffn
from tests.pipeline.model.builders import layer_tensors, make_architecture, make_model

BIASED = make_architecture(attention_bias=True, mlp_bias=True)
MODEL = make_model(BIASED)
PARENT = layer_tensors(MODEL, 0)
PARENT_ATTENTION, PARENT_FFN = gqa(2), swiglu(48)


def cut_attention(
    spec: AttentionSpec, parent: dict[str, Tensor] = PARENT, order_K: Tensor | None = None
) -> dict[str, Tensor]:
    return initial_attention(parent, architecture=BIASED, parent_spec=PARENT_ATTENTION, spec=spec, head_order_K=order_K)


def cut_ffn(spec: FFNSpec, order_F: Tensor) -> dict[str, Tensor]:
    return initial_ffn(PARENT, architecture=BIASED, parent_spec=PARENT_FFN, spec=spec, channel_order_F=order_F)


@torch.no_grad()
def attend(spec: AttentionSpec, tensors: dict[str, Tensor], *, num_tokens: int) -> Tensor:
    subblock = build_subblock_attention(BIASED, spec, dtype=torch.float32)
    subblock.load_state_dict(tensors, strict=True)
    kwargs = attention_inputs(MODEL, batch_size=2, num_tokens=num_tokens, device="cpu", dtype=torch.float32)
    return subblock(torch.randn(2, num_tokens, 32, generator=torch.Generator().manual_seed(1)), **kwargs)


@torch.no_grad()
def feed_forward(spec: FFNSpec, tensors: dict[str, Tensor], hidden_BTD: Tensor) -> Tensor:
    subblock = build_subblock_ffn(BIASED, spec, dtype=torch.float32)
    subblock.load_state_dict(tensors, strict=True)
    return subblock(hidden_BTD)


@pytest.mark.parametrize("spec", [gqa(2), gqa(1), LINEAR_ATTENTION, NO_ATTENTION], ids=lambda spec: spec.key)
def test_attention_variant_has_exactly_the_tensors_of_its_subblock(spec: AttentionSpec):
    attend(spec, cut_attention(spec), num_tokens=3)


def test_parents_own_attention_is_copied():
    tensors = cut_attention(PARENT_ATTENTION)
    assert all(torch.equal(tensor, PARENT[name]) for name, tensor in tensors.items())
    tensors["self_attn.q_proj.weight"].zero_()
    assert PARENT["self_attn.q_proj.weight"].abs().sum() > 0


def test_pooling_identical_heads_reproduces_the_parent():
    twins = dict(PARENT)
    for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        head = PARENT[f"self_attn.{name}"].unflatten(0, (2, 8))[:1]
        twins[f"self_attn.{name}"] = torch.cat([head, head]).flatten(0, 1)
    parent = {name: tensor for name, tensor in twins.items() if name.startswith(("self_attn", "input_"))}
    pooled = attend(gqa(1), cut_attention(gqa(1), twins), num_tokens=7)
    torch.testing.assert_close(pooled, attend(gqa(2), parent, num_tokens=7), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [[2, 0, 1, 3], [3, 1, 0, 2]])
def test_keeping_heads_equals_the_parent_with_the_other_heads_output_zeroed(order: list[int]):
    architecture = make_architecture(
        num_attention_heads=8,
        attention_bias=True,
        blocks=tuple(block.model_copy(update={"attention": gqa(4)}) for block in make_architecture().blocks),
    )
    model = make_model(architecture)
    parent = {
        name: tensor.clone()
        for name, tensor in layer_tensors(model, 0).items()
        if name.startswith(("self_attn", "input_"))
    }
    tensors = initial_attention(
        parent, architecture=architecture, parent_spec=gqa(4), spec=gqa(2), head_order_K=torch.tensor(order)
    )
    head_dim = architecture.head_dim
    for head in order[2:]:  # two query heads read each key/value head
        parent["self_attn.o_proj.weight"][:, 2 * head * head_dim : 2 * (head + 1) * head_dim] = 0
    kwargs = attention_inputs(model, batch_size=2, num_tokens=7, device="cpu", dtype=torch.float32)
    hidden_BTD = torch.randn(2, 7, architecture.hidden_size, generator=torch.Generator().manual_seed(2))
    silenced, kept = (build_subblock_attention(architecture, gqa(heads), dtype=torch.float32) for heads in (4, 2))
    silenced.load_state_dict(parent)
    kept.load_state_dict(tensors)
    found_BTD = kept(hidden_BTD, **kwargs)
    torch.testing.assert_close(found_BTD, silenced(hidden_BTD, **kwargs), rtol=1e-5, atol=1e-5)
    # The silent queries may learn: their columns of W_O get a gradient.
    found_BTD.square().sum().backward()
    gradient = dict(kept.named_parameters())["self_attn.o_proj.weight"].grad
    assert gradient is not None
    assert bool((gradient.abs().sum(dim=0) > 0).all())


def test_pooled_head_is_the_mean_of_its_consecutive_group():
    architecture = make_architecture(num_attention_heads=4, blocks=make_architecture().blocks)
    parent = {
        "input_layernorm.weight": torch.ones(32),
        "self_attn.q_proj.weight": torch.zeros(32, 32),
        "self_attn.o_proj.weight": torch.zeros(32, 32),
        "self_attn.k_proj.weight": torch.arange(4.0).repeat_interleave(8)[:, None].expand(32, 32),
        "self_attn.v_proj.weight": torch.zeros(32, 32),
    }
    tensors = initial_attention(parent, architecture=architecture, parent_spec=gqa(4), spec=gqa(2), head_order_K=None)
    assert tensors["self_attn.k_proj.weight"][:, 0].tolist() == [0.5] * 8 + [2.5] * 8


def test_linear_attention_equals_the_parent_on_single_tokens():
    linear = attend(LINEAR_ATTENTION, cut_attention(LINEAR_ATTENTION), num_tokens=1)
    parent = attend(PARENT_ATTENTION, cut_attention(PARENT_ATTENTION), num_tokens=1)
    torch.testing.assert_close(linear, parent, rtol=1e-5, atol=1e-5)


def test_heads_that_cannot_be_grouped_are_refused():
    with pytest.raises(RecipeError, match="4 key/value heads cannot be pooled from the parent's 2"):
        cut_attention(gqa(4))


def test_narrowing_to_full_width_is_the_identity():
    order_F = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    wider = make_architecture(mlp_bias=True)
    tensors = initial_ffn(PARENT, architecture=wider, parent_spec=PARENT_FFN, spec=swiglu(48), channel_order_F=order_F)
    assert all(torch.equal(tensor, PARENT[name]) for name, tensor in tensors.items())


def test_narrowing_keeps_the_most_important_channels_in_their_order():
    order_F = torch.tensor([40, 3, 17, *(channel for channel in range(48) if channel not in (40, 3, 17))])
    tensors = cut_ffn(swiglu(3), order_F)
    kept = [3, 17, 40]
    for name in ("gate_proj.weight", "up_proj.weight", "gate_proj.bias", "up_proj.bias"):
        assert torch.equal(tensors[f"mlp.{name}"], PARENT[f"mlp.{name}"][kept])
    assert torch.equal(tensors["mlp.down_proj.weight"], PARENT["mlp.down_proj.weight"][:, kept])
    assert torch.equal(tensors["mlp.down_proj.bias"], PARENT["mlp.down_proj.bias"])


def test_dropping_channels_that_do_nothing_changes_nothing():
    hidden_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    idle = dict(PARENT)
    idle["mlp.down_proj.weight"] = PARENT["mlp.down_proj.weight"].clone()
    idle["mlp.down_proj.weight"][:, ::2] = 0
    order_F = torch.cat([torch.arange(1, 48, 2), torch.arange(0, 48, 2)])
    narrow = initial_ffn(idle, architecture=BIASED, parent_spec=PARENT_FFN, spec=swiglu(24), channel_order_F=order_F)
    full = {name: tensor for name, tensor in idle.items() if name.startswith(("mlp.", "post_"))}
    torch.testing.assert_close(
        feed_forward(swiglu(24), narrow, hidden_BTD),
        feed_forward(swiglu(48), full, hidden_BTD),
        rtol=1e-5,
        atol=1e-5,
    )


@torch.no_grad()
def test_linear_ffn_is_down_times_up_without_the_gate():
    hidden_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    mlp = MODEL.model.layers[0].mlp
    normed_BTD = MODEL.model.layers[0].post_attention_layernorm(hidden_BTD)
    expected_BTD = hidden_BTD + mlp.down_proj(mlp.up_proj(normed_BTD))
    got_BTD = feed_forward(LINEAR_FFN, cut_ffn(LINEAR_FFN, torch.arange(48)), hidden_BTD)
    torch.testing.assert_close(got_BTD, expected_BTD, rtol=1e-5, atol=1e-5)


def test_no_op_has_no_tensors():
    assert cut_attention(NO_ATTENTION) == {}
    assert cut_ffn(NO_FFN, torch.arange(48)) == {}


def test_ffn_wider_than_the_parent_is_refused():
    with pytest.raises(RecipeError, match="width 64 is above the parent's 48"):
        cut_ffn(swiglu(64), torch.arange(48))


def test_bf16_pooling_is_rounded_once():
    parent = {name: tensor.bfloat16() for name, tensor in PARENT.items()}
    got = cut_attention(gqa(1), parent)["self_attn.v_proj.weight"]
    exact = parent["self_attn.v_proj.weight"].double().unflatten(0, (2, 8)).mean(dim=0)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, exact.bfloat16())
