"""Fused FFNs against the sum of the FFNs they join, and runs against hand-drawn ones."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from pipeline.architecture import LINEAR_FFN, NO_ATTENTION, NO_FFN, Architecture, gqa, swiglu
from pipeline.model.checkpoint import tensor_shapes
from pipeline.model.fusion import NormRule, find_runs, fuse, fuse_ffns
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, empty_model
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


def runs_of(
    letters: str, *, min_run_layers: int, keep_last_ffn: bool, max_run_layers: int = 99
) -> list[tuple[int, ...]]:
    """Runs of layers written as P parent, F FFN alone, I identity, L linear FFN alone, A attention alone."""
    kinds = {
        "P": (A, F),
        "F": (NO_ATTENTION, F),
        "I": (NO_ATTENTION, NO_FFN),
        "L": (NO_ATTENTION, LINEAR_FFN),
        "A": (A, NO_FFN),
    }
    architecture = make_architecture(blocks=make_blocks(*(kinds[letter] for letter in letters)))
    runs = find_runs(
        architecture, min_run_layers=min_run_layers, max_run_layers=max_run_layers, keep_last_ffn=keep_last_ffn
    )
    return [run.layers for run in runs]


def test_find_runs_splits_a_long_stretch_and_leaves_a_rest_that_is_too_short():
    assert runs_of("PFFFFFP", min_run_layers=2, max_run_layers=2, keep_last_ffn=False) == [(1, 2), (3, 4)]
    assert runs_of("PFFFFFP", min_run_layers=2, max_run_layers=3, keep_last_ffn=True) == [(1, 2, 3)]
    assert runs_of("PFIFFFFP", min_run_layers=2, max_run_layers=2, keep_last_ffn=True) == [(1, 2, 3), (4, 5)]


@pytest.mark.parametrize(
    ("letters", "min_run_layers", "keep_last_ffn", "expected"),
    [
        ("PFFFP", 2, False, [(1, 2, 3)]),
        ("PFFFP", 2, True, [(1, 2)]),
        ("PFFFP", 3, True, []),
        ("FFPFF", 2, False, [(0, 1), (3, 4)]),
        ("FFAFF", 2, True, []),
        ("FFLFF", 2, False, [(0, 1), (3, 4)]),
        ("PIFIFFI", 2, False, [(2, 3, 4, 5)]),
        ("PIFIFFI", 2, True, [(2, 3, 4)]),
        ("PPP", 2, False, []),
        ("III", 2, False, []),
    ],
)
def test_runs_are_the_hand_drawn_ones(
    letters: str, min_run_layers: int, keep_last_ffn: bool, expected: list[tuple[int, ...]]
):
    assert runs_of(letters, min_run_layers=min_run_layers, max_run_layers=99, keep_last_ffn=keep_last_ffn) == expected


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


def fused_model(
    architecture: Architecture, *, norm_rule: NormRule, keep_last_ffn: bool
) -> tuple[HeterogeneousLlamaForCausalLM, Architecture]:
    runs = find_runs(architecture, min_run_layers=2, max_run_layers=99, keep_last_ffn=keep_last_ffn)
    fused = fuse(architecture, source=Tensors(make_model(architecture)), runs=runs, norm_rule=norm_rule)
    tensors = dict(fused.tensors)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tensor_shapes(fused.architecture)
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
    _, architecture = fused_model(MIXED, norm_rule="last", keep_last_ffn=True)
    assert [block.key for block in architecture.blocks] == ["kv2+ffn48", "no_op+ffn72", "no_op+ffn48", "kv2+ffn48"]
    assert [block.parent_layers for block in architecture.blocks] == [(0,), (1, 2, 3), (4,), (5,)]


@pytest.mark.parametrize("norm_rule", ["fold_each", "last"])
@torch.no_grad()
def test_fused_layer_equals_equation_5_inside_the_model(norm_rule: NormRule):
    original = make_model(MIXED)
    fused, _ = fused_model(MIXED, norm_rule=norm_rule, keep_last_ffn=False)
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
    fused, _ = fused_model(MIXED, norm_rule="last", keep_last_ffn=True)
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
    runs = find_runs(MIXED, min_run_layers=2, max_run_layers=99, keep_last_ffn=False)
    fused = fuse(MIXED, source=Tensors(model), runs=runs, norm_rule="last")
    tensors = dict(fused.tensors)
    other = empty_model(fused.architecture)
    other.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, assign=True)
    ids_BT = random_ids(9)
    torch.testing.assert_close(other(ids_BT).logits, model(ids_BT).logits, rtol=1e-5, atol=1e-5)
