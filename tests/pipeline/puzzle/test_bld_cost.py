"""FLOPs of block distillation against what torch counts while a tiny block is trained."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.architecture import Architecture
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, attention_inputs, build_layer, build_model
from pipeline.puzzle.bld_cost import (
    flops_of_separate_runs,
    flops_per_token,
    parent_flops_per_token,
    training_flops_per_token,
)
from pipeline.puzzle.block_keys import BlockKey
from pipeline.recipe import Subblock
from tests.pipeline.puzzle.builders import make_architecture

# Heads of 8 that are not the hidden size's: 4 x 8 = 32 of 24, so that no product can stand for another.
ARCHITECTURE = make_architecture(num_layers=3, hidden_size=24, intermediate_size=40, num_attention_heads=4).model_copy(
    update={"head_dim": 8}
)
TOKENS = 6
BATCH = 2


def eager_model(architecture: Architecture) -> HeterogeneousLlamaForCausalLM:
    """Attention as products of matrices, whose backward pass is twice the forward one, with nothing made again."""
    model = build_model(architecture, dtype=torch.float32, seed=0)
    model.config._attn_implementation = "eager"
    return model.requires_grad_(False)


def counted_flops_per_token(architecture: Architecture, key: BlockKey) -> float:
    """One lesson of a block: forward, through the frozen FFN where it is attention's, and backward."""
    model = eager_model(architecture)
    frozen, block = model.model.layers[0], build_layer(architecture, key.block, dtype=torch.float32)
    if key.block.attention.kind == "gqa":
        block.self_attn.config = model.config
    kwargs = attention_inputs(model, batch_size=BATCH, num_tokens=TOKENS, device="cpu", dtype=torch.float32)
    hidden_BTD = torch.randn(BATCH, TOKENS, architecture.hidden_size)
    with FlopCounterMode(display=False) as counter:
        attended_BTD = block.attend(hidden_BTD, **kwargs)
        behind = frozen if key.subblock == "attention" else block
        behind.feed_forward(attended_BTD).square().sum().backward()
    return counter.get_total_flops() / (BATCH * TOKENS)


@pytest.mark.parametrize(
    ("subblock", "variant", "num_norms"),
    [
        ("attention", "kv2", 1),
        ("attention", "kv1", 1),
        ("attention", "linear", 1),
        ("ffn", "ffn16", 1),
        ("ffn", "linear", 1),
        ("pair", "kv1+ffn16", 2),
        ("pair", "no_op+ffn40", 1),
    ],
)
def test_training_flops_per_token_are_those_that_torch_counts(subblock: Subblock, variant: str, num_norms: int):
    key = BlockKey(layer=1, subblock=subblock, variant=variant)
    # torch counts every token against all others: a causal pass over twice as many has that many pairs. It leaves out
    # norms, which are counted here like other weights: six for a block's own, four for that of the frozen FFN.
    norms = ARCHITECTURE.hidden_size * (6 * num_norms + 4 * (subblock == "attention"))
    wanted = counted_flops_per_token(ARCHITECTURE, key) + norms
    assert training_flops_per_token(ARCHITECTURE, [key], context_tokens=2 * TOKENS) == wanted


def test_training_flops_per_token_by_hand():
    keys = [BlockKey(layer=0, subblock="attention", variant="kv1"), BlockKey(layer=2, subblock="ffn", variant="ffn16")]
    attention = 24 * (32 + 8 + 8) + 32 * 24 + 24  # queries, a key and a value head, the output, the norm
    frozen, narrow = 3 * 24 * 40 + 24, 3 * 24 * 16 + 24
    scores = 4 * 4 * 8 * (10 / 2)  # half of ten tokens, forward
    wanted = 6 * attention + 3 * scores + 4 * frozen + 6 * narrow
    assert training_flops_per_token(ARCHITECTURE, keys, context_tokens=10) == wanted


def test_parent_flops_per_token_are_those_that_torch_counts():
    model = eager_model(ARCHITECTURE)
    kwargs = attention_inputs(model, batch_size=BATCH, num_tokens=TOKENS, device="cpu", dtype=torch.float32)
    hidden_BTD = torch.randn(BATCH, TOKENS, ARCHITECTURE.hidden_size)
    with FlopCounterMode(display=False) as counter:
        for layer in model.model.layers:
            hidden_BTD = layer(hidden_BTD, **kwargs)
    wanted = counter.get_total_flops() / (BATCH * TOKENS) + 3 * 2 * (2 * ARCHITECTURE.hidden_size)
    assert parent_flops_per_token(ARCHITECTURE, num_layers=3, context_tokens=2 * TOKENS) == wanted


def test_runs_of_their_own_take_the_parents_pass_as_often_and_as_far_as_their_last_layer():
    places = ((0, "ffn16"), (2, "ffn16"), (1, "ffn8"))
    keys = [BlockKey(layer=layer, subblock="ffn", variant=variant) for layer, variant in places]
    one_layer = parent_flops_per_token(ARCHITECTURE, num_layers=1, context_tokens=TOKENS)
    blocks = training_flops_per_token(ARCHITECTURE, keys, context_tokens=TOKENS)
    assert flops_per_token(ARCHITECTURE, keys, context_tokens=TOKENS) == pytest.approx(3 * one_layer + blocks)
    assert flops_of_separate_runs(ARCHITECTURE, keys, context_tokens=TOKENS) == pytest.approx(
        ((3 + 2) * one_layer + blocks, (1 + 3 + 2) * one_layer + blocks)
    )
