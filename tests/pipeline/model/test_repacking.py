"""Re-packing: the same sequence of subblocks in fewer layers, and the same logits."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.architecture import (
    LINEAR_ATTENTION,
    LINEAR_FFN,
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    BlockSpec,
    gqa,
    swiglu,
)
from pipeline.model.checkpoint import TensorReader, model_from_tensors, save_checkpoint
from pipeline.model.repacking import RepackedTensors, Repacking, Sources, padded, portable, repack, with_first_attention
from tests.pipeline.model.builders import LLAMA3_ROPE, make_architecture, make_blocks, make_model, random_ids

P, A, F, I = (gqa(2), swiglu(48)), (gqa(1), NO_FFN), (NO_ATTENTION, swiglu(300)), (NO_ATTENTION, NO_FFN)  # noqa: E741


def written(tmp_path: Path, architecture: Architecture) -> TensorReader:
    save_checkpoint(
        tmp_path, architecture=architecture, tensors=make_model(architecture).state_dict(), tokenizer_dir=None
    )
    return TensorReader(tmp_path)


@torch.no_grad()
def logits_of(architecture: Architecture, tensors: RepackedTensors) -> torch.Tensor:
    named = ((name, tensors.read(name)) for name in tensors.names)
    return model_from_tensors(architecture, named, dtype=torch.float32)(random_ids(20)).logits


def subblocks(blocks: tuple[BlockSpec, ...]) -> list[str]:
    """The sequence of what is computed, by hand from the layers."""
    keys = [key for block in blocks for key in (f"a:{block.attention.key}", f"f:{block.ffn.key}")]
    return [key for key in keys if not key.endswith("no_op")]


@pytest.mark.parametrize(
    ("layers", "packed", "parents"),
    [
        ((P, P), (P, P), [(0,), (1,)]),
        ((P, I, P), (P, P), [(0, 1), (2,)]),
        ((I, I, P), (P,), [(0, 1, 2)]),
        ((P, A, F), (P, (gqa(1), swiglu(300))), [(0,), (1, 2)]),
        ((A, I, F), ((gqa(1), swiglu(300)),), [(0, 1, 2)]),
        ((F, A, A, P, A), (F, A, A, P, A), [(0,), (1,), (2,), (3,), (4,)]),
        ((F, F, I), (F, F), [(0,), (1, 2)]),
        ((I, I), (I,), [(0, 1)]),
    ],
)
def test_subblocks_are_refilled_in_their_order(layers: Any, packed: Any, parents: list[tuple[int, ...]]):
    repacked = repack(make_architecture(blocks=make_blocks(*layers))).architecture
    assert [(block.attention, block.ffn) for block in repacked.blocks] == list(packed)
    assert [block.parent_layers for block in repacked.blocks] == parents


def test_sources_name_the_layer_of_each_subblock():
    assert repack(make_architecture(blocks=make_blocks(F, P, A, I, F))).sources == (
        Sources(None, 0),
        Sources(1, 1),
        Sources(2, 4),
    )


@pytest.mark.parametrize("seed", range(20))
def test_any_mixture_of_layers_keeps_its_sequence_and_its_parent_layers(seed: int):
    draw = random.Random(seed)
    attention, ffn = [gqa(1), gqa(2), LINEAR_ATTENTION, NO_ATTENTION], [swiglu(48), LINEAR_FFN, NO_FFN]
    blocks = make_blocks(*[(draw.choice(attention), draw.choice(ffn)) for _ in range(draw.randint(1, 12))])
    repacked = repack(make_architecture(blocks=blocks)).architecture
    assert subblocks(repacked.blocks) == subblocks(blocks)
    assert [layer for block in repacked.blocks for layer in block.parent_layers] == list(range(len(blocks)))
    assert repack(repacked).architecture == repacked


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False, "rope_scaling": LLAMA3_ROPE}, {"attention_bias": True, "mlp_bias": True}],
    ids=["tied", "untied_llama3", "biases"],
)
@torch.no_grad()
def test_repacked_model_with_a_first_attention_computes_the_same_bits(tmp_path: Path, changes: dict[str, Any]):
    layers = (F, P, A, A, F, I, (LINEAR_ATTENTION, LINEAR_FFN), A, F)
    architecture = make_architecture(blocks=make_blocks(*layers), **changes)
    reader = written(tmp_path, architecture)
    repacked = repack(architecture)
    extended = Repacking(architecture=with_first_attention(repacked.architecture), sources=repacked.sources)
    assert extended.architecture.blocks[0].attention == gqa(1)
    assert extended.architecture.num_hidden_layers == 6
    expected = make_model(architecture)(random_ids(20)).logits
    assert torch.equal(logits_of(extended.architecture, RepackedTensors(reader, extended)), expected)


@torch.no_grad()
def test_padding_changes_rounding_alone(tmp_path: Path):
    architecture = make_architecture(blocks=make_blocks(P, F, (gqa(1), swiglu(256))), mlp_bias=True)
    repacking = portable(architecture)
    assert [block.ffn.intermediate_size for block in repacking.architecture.blocks] == [256, 512, 256]
    tensors = RepackedTensors(written(tmp_path, architecture), repacking)
    original = make_model(architecture).state_dict()
    for name in tensors.names:
        values = tensors.read(name)
        kept = values[tuple(slice(size) for size in original[name].shape)]
        assert torch.equal(kept, original[name])
        assert values.count_nonzero() == kept.count_nonzero()
    expected = make_model(architecture)(random_ids(20)).logits
    torch.testing.assert_close(logits_of(repacking.architecture, tensors), expected, rtol=1e-5, atol=1e-5)


def test_widths_that_are_multiples_already_stay():
    architecture = make_architecture(blocks=make_blocks((gqa(2), swiglu(512)), (gqa(2), NO_FFN)))
    assert padded(architecture) == architecture
