"""Fused FFNs against the sum of the FFNs they join, and arranged models against layers applied one by one."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, gqa, swiglu
from pipeline.model.checkpoint import model_from_tensors
from pipeline.model.fusion import NormRule, arrange, fuse, fuse_ffns
from pipeline.model.fusion_runs import FusionRun
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, attention_inputs, empty_model
from pipeline.model.shards import checkpoint_shapes
from tests.pipeline.model.builders import make_architecture, make_blocks, make_model, random_ids

A, F = gqa(2), swiglu(48)


class Tensors:
    """The tensors of a model, as a checkpoint would give them."""

    def __init__(self, model: HeterogeneousLlamaForCausalLM) -> None:
        self._tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        return tuple(sorted(self._tensors))

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._tensors[name]


def make_ffns(*, dtype: torch.dtype, biased: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ffns = []
    for width in (24, 48, 8):
        shapes = {
            "post_attention_layernorm.weight": (32,),
            "mlp.gate_proj.weight": (width, 32),
            "mlp.up_proj.weight": (width, 32),
            "mlp.down_proj.weight": (32, width),
        }
        if biased:
            shapes |= {"mlp.gate_proj.bias": (width,), "mlp.up_proj.bias": (width,), "mlp.down_proj.bias": (32,)}
        ffns.append({name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()})
    return ffns


def apply_ffn(ffn: dict[str, Tensor], unit_BD: Tensor, *, scale_D: Tensor) -> Tensor:
    """FFN(scale * unit), written out from the formula."""
    normed_BD = unit_BD * scale_D
    zero = torch.zeros(1, dtype=unit_BD.dtype)
    gate_BF = normed_BD @ ffn["mlp.gate_proj.weight"].T + ffn.get("mlp.gate_proj.bias", zero)
    up_BF = normed_BD @ ffn["mlp.up_proj.weight"].T + ffn.get("mlp.up_proj.bias", zero)
    return (silu(gate_BF) * up_BF) @ ffn["mlp.down_proj.weight"].T + ffn.get("mlp.down_proj.bias", zero)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("norm_rule", ["fold_each", "last"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_wide_ffn_equals_the_sum_at_the_shared_input(
    dtype: torch.dtype, tolerance: float, norm_rule: NormRule, biased: bool
):
    ffns = make_ffns(dtype=dtype, biased=biased)
    unit_BD = torch.randn(6, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
    norm = "post_attention_layernorm.weight"
    scales = [ffn[norm] if norm_rule == "fold_each" else ffns[-1][norm] for ffn in ffns]
    expected_BD = sum(apply_ffn(ffn, unit_BD, scale_D=scale_D) for ffn, scale_D in zip(ffns, scales, strict=True))
    wide = fuse_ffns(ffns, norm_rule=norm_rule)
    got_BD = apply_ffn(wide, unit_BD, scale_D=wide[norm])
    assert isinstance(expected_BD, Tensor)
    assert float((got_BD - expected_BD).norm() / expected_BD.norm()) <= tolerance


SHORT, LONG = FusionRun(layers=(1, 2, 3), ffn_layers=(1, 3)), FusionRun(layers=(1, 2, 3, 4), ffn_layers=(1, 3, 4))


def fused_model(
    architecture: Architecture, *, norm_rule: NormRule, run: FusionRun
) -> tuple[HeterogeneousLlamaForCausalLM, Architecture]:
    fused = fuse(architecture, source=Tensors(make_model(architecture)), runs=[run], norm_rule=norm_rule)
    tensors = dict(fused.tensors)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == checkpoint_shapes(fused.architecture)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = empty_model(fused.architecture)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    return model, fused.architecture


MIXED = make_architecture(
    mlp_bias=True,
    blocks=make_blocks(
        (A, F), (NO_ATTENTION, F), (NO_ATTENTION, NO_FFN), (NO_ATTENTION, swiglu(24)), (NO_ATTENTION, F), (A, F)
    ),
)


def test_fused_architecture_names_every_parent_layer():
    _, architecture = fused_model(MIXED, norm_rule="last", run=SHORT)
    assert [block.key for block in architecture.blocks] == ["kv2+ffn48", "no_op+ffn72", "no_op+ffn48", "kv2+ffn48"]
    assert [block.parent_layers for block in architecture.blocks] == [(0,), (1, 2, 3), (4,), (5,)]


@pytest.mark.parametrize("norm_rule", ["fold_each", "last"])
@torch.no_grad()
def test_fused_layer_equals_equation_5_inside_the_model(norm_rule: NormRule):
    original = make_model(MIXED)
    fused, _ = fused_model(MIXED, norm_rule=norm_rule, run=LONG)
    hidden_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    layers = [original.model.layers[layer] for layer in (1, 3, 4)]
    expected_BTD = hidden_BTD.clone()
    for layer in layers:
        norm = layer.post_attention_layernorm if norm_rule == "fold_each" else layers[-1].post_attention_layernorm
        expected_BTD += layer.mlp(norm(hidden_BTD))
    torch.testing.assert_close(fused.model.layers[1](hidden_BTD), expected_BTD, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_outside_the_runs_are_untouched():
    original = make_model(MIXED)
    fused, _ = fused_model(MIXED, norm_rule="last", run=SHORT)
    for new, old in ((0, 0), (2, 4), (3, 5)):
        for name, tensor in original.model.layers[old].state_dict().items():
            assert torch.equal(fused.model.layers[new].state_dict()[name], tensor)
    assert torch.equal(fused.model.embed_tokens.weight, original.model.embed_tokens.weight)


@torch.no_grad()
def test_fusing_ffns_that_add_nothing_changes_nothing():
    model = make_model(MIXED)
    for layer in (1, 3):
        model.model.layers[layer].mlp.down_proj.weight.zero_()
        model.model.layers[layer].mlp.down_proj.bias.zero_()
    fused = fuse(MIXED, source=Tensors(model), runs=[LONG], norm_rule="last")
    tensors = dict(fused.tensors)
    other = empty_model(fused.architecture)
    other.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, assign=True)
    ids_BT = random_ids(9)
    torch.testing.assert_close(other(ids_BT).logits, model(ids_BT).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_can_be_dropped_and_put_in_another_order():
    model = make_model(MIXED)
    order = [0, 4, 3, 5]
    arranged = arrange(MIXED, source=Tensors(model), order=order, norm_rule="last")
    other = model_from_tensors(arranged.architecture, arranged.tensors, dtype=torch.float32)
    ids_BT = random_ids(9)
    hidden_BTD = model.model.embed_tokens(ids_BT)
    kwargs = attention_inputs(model, batch_size=2, num_tokens=9, device="cpu", dtype=torch.float32)
    for layer in order:
        hidden_BTD = model.model.layers[layer](hidden_BTD, **kwargs)
    torch.testing.assert_close(other(ids_BT).logits, model.lm_head(model.model.norm(hidden_BTD)))
    assert [block.parent_layers for block in arranged.architecture.blocks] == [(0,), (4,), (3,), (5,)]
