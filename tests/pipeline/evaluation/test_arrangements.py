"""Arrangements against layers applied one by one, and fusion's exact part against the sum it stands for."""

import pytest
import torch
from torch import Tensor

from pipeline.architecture import NO_ATTENTION, NO_FFN, gqa, swiglu
from pipeline.data.packed import PackedTokens
from pipeline.evaluation.arrangements import (
    NORM_RULES,
    Arrangement,
    arranged,
    deletion_order,
    fused,
    identity_error,
    measure_arrangements,
    num_deleted_at_equal_latency,
    reverse,
    unchanged,
    without,
)
from pipeline.evaluation.closeness import Reference
from pipeline.model.fusion import NormRule
from pipeline.model.fusion_runs import FusionRun
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, attention_inputs
from tests.pipeline.model.builders import make_architecture, make_blocks, make_model, random_ids

A, F = gqa(2), swiglu(48)
ARCHITECTURE = make_architecture(
    blocks=make_blocks(
        (A, F), (NO_ATTENTION, F), (NO_ATTENTION, NO_FFN), (NO_ATTENTION, swiglu(24)), (NO_ATTENTION, F), (A, F)
    )
)
RUN = FusionRun(layers=(1, 2, 3, 4), ffn_layers=(1, 3, 4))
TOKENS_NT = random_ids(10, batch_size=3)
PACKED = PackedTokens(tokens_NT=TOKENS_NT, labels_NT=TOKENS_NT, position_ids_NT=torch.arange(10).expand(3, 10))


def logits_through(model: HeterogeneousLlamaForCausalLM, order: tuple[int, ...]) -> Tensor:
    """Logits of the model's own layers applied in that order."""
    kwargs = attention_inputs(model, batch_size=3, num_tokens=10, device="cpu", dtype=torch.float32)
    hidden_BTD = model.model.embed_tokens(TOKENS_NT)
    for layer in order:
        hidden_BTD = model.model.layers[layer](hidden_BTD, **kwargs)
    return model.lm_head(model.model.norm(hidden_BTD))


@pytest.mark.parametrize(
    ("arrangement", "order"),
    [
        (unchanged(6), (0, 1, 2, 3, 4, 5)),
        (reverse(6, [RUN]), (0, 4, 3, 1, 5)),
        (without(6, [3]), (0, 1, 2, 4, 5)),
        (without(6, [1, 4]), (0, 2, 3, 5)),
    ],
)
@torch.no_grad()
def test_arrangements_are_the_layers_in_that_order(arrangement: Arrangement, order: tuple[int, ...]):
    child = make_model(ARCHITECTURE)
    torch.testing.assert_close(arranged(child, arrangement)(TOKENS_NT).logits, logits_through(child, order))


@torch.no_grad()
def test_fusion_of_layers_that_add_nothing_is_their_deletion():
    child = make_model(ARCHITECTURE)
    for layer in RUN.ffn_layers:
        child.model.layers[layer].mlp.down_proj.weight.zero_()
    whole = child(TOKENS_NT).logits
    for arrangement in (fused(6, [RUN], norm_rule="last"), reverse(6, [RUN]), without(6, [1, 3, 4])):
        torch.testing.assert_close(arranged(child, arrangement)(TOKENS_NT).logits, whole)


@torch.no_grad()
def test_ffns_are_ordered_by_what_their_deletion_alone_costs():
    child = make_model(ARCHITECTURE)
    reference = Reference.of(child, PACKED)
    found = dict(deletion_order(child, [RUN], PACKED, reference))
    assert set(found) == {1, 3, 4}
    log_p = child(TOKENS_NT).logits.double().log_softmax(-1)
    for layer, kl in found.items():
        log_q = logits_through(child, tuple(one for one in range(6) if one != layer)).double().log_softmax(-1)
        assert kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)
    (same,) = measure_arrangements(child, [unchanged(6)], PACKED, [reference])
    assert same.to_references[0].kl_nats.value == 0.0


@pytest.mark.parametrize("norm_rule", NORM_RULES)
def test_wide_ffn_equals_the_sum_of_its_ffns_up_to_rounding(norm_rule: NormRule):
    # Not 0: two computations that round differently, not one compared with itself.
    assert 0 < identity_error(make_model(ARCHITECTURE), RUN, PACKED, norm_rule=norm_rule) <= 1e-5


@pytest.mark.parametrize(
    ("fused_ms", "without_ms", "expected"),
    [(9.0, 6.0, 1), (7.0, 6.0, 3), (9.6, 6.0, 0), (10.5, 6.0, 0), (5.0, 6.0, 4), (9.0, 10.5, 0)],
)
def test_deletion_at_equal_latency_is_the_nearest_number_of_ffns(fused_ms: float, without_ms: float, expected: int):
    # Four FFNs take 4 ms of 10: one each.
    found = num_deleted_at_equal_latency(child_ms=10.0, fused_ms=fused_ms, without_ms=without_ms, num_ffns=4)
    assert found == expected
