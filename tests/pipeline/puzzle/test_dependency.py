"""The dependency matrix against a plain loop with hooks on the whole model; groups against hand-made matrices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.architecture import LINEAR_ATTENTION, LINEAR_FFN, NO_ATTENTION, NO_FFN, gqa, swiglu
from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import SilentReporter
from pipeline.puzzle import composition
from pipeline.puzzle.dependency import Dependencies, cosine_distance, measure_dependencies, parallel_groups
from tests.pipeline.model.builders import make_architecture, make_blocks, make_model, random_ids

A, F = gqa(2), swiglu(48)
MIXED = make_architecture(
    blocks=make_blocks(
        (A, F),
        (NO_ATTENTION, swiglu(24)),
        (NO_ATTENTION, NO_FFN),
        (gqa(1), NO_FFN),
        (LINEAR_ATTENTION, LINEAR_FFN),
        (NO_ATTENTION, F),
        (A, F),
    )
)
ACTIVE = (0, 1, 3, 4, 5, 6)


def packed_samples() -> PackedTokens:
    """Five windows of 12 tokens; each holds two samples, which attention keeps apart."""
    tokens_NT = random_ids(12, batch_size=5)
    positions_NT = torch.cat([torch.arange(7), torch.arange(5)]).expand(5, 12)
    return PackedTokens(tokens_NT=tokens_NT, labels_NT=tokens_NT, position_ids_NT=positions_NT)


def updates(
    model: HeterogeneousLlamaForCausalLM, packed: PackedTokens, *, removed: int | None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Input and update of every layer in a whole forward pass, with one layer's output replaced by its input."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def record(layer: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(_module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            found[layer] = args[0].double(), output.double() - args[0].double()
            return args[0] if layer == removed else None

        return hook

    hooks = [one.register_forward_hook(record(layer)) for layer, one in enumerate(model.model.layers)]
    model(input_ids=packed.tokens_NT, position_ids=packed.position_ids_NT, use_cache=False)
    for one in hooks:
        one.remove()
    return found


def distance(first: Tensor, second: Tensor) -> float:
    return float((1 - torch.cosine_similarity(first, second, dim=-1)).mean())


@pytest.mark.parametrize("batch_tokens", [12, 40, 10_000])
@torch.no_grad()
def test_dependencies_equal_whole_passes_with_a_layer_hooked_out(monkeypatch: pytest.MonkeyPatch, batch_tokens: int):
    monkeypatch.setattr(composition, "MAX_BATCH_TOKENS", batch_tokens)
    model, packed = make_model(MIXED).double(), packed_samples()
    found = measure_dependencies(model, packed, reporter=SilentReporter())
    assert list(found.matrix) == [(i, j) for i in ACTIVE for j in ACTIVE if i < j]
    assert found.num_tokens == 60
    whole = updates(model, packed, removed=None)
    for removed in ACTIVE:
        without = updates(model, packed, removed=removed)
        for layer in ACTIVE:
            if layer > removed:
                expected = distance(whole[layer][1], without[layer][1])
                assert found.matrix[removed, layer] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert tuple(found.layers) == ACTIVE
    for layer, geometry in found.layers.items():
        input_BTD, update_BTD = whole[layer]
        ratio = float((update_BTD.norm(dim=-1) / input_BTD.norm(dim=-1)).mean())
        assert geometry.update_norm_ratio == pytest.approx(ratio, rel=1e-4)
        assert geometry.update_cosine_distance == pytest.approx(distance(input_BTD, update_BTD), rel=1e-4)
        expected = distance(input_BTD, input_BTD + update_BTD)
        assert geometry.output_cosine_distance == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_cosine_distance_keeps_its_digits_where_vectors_hardly_differ():
    first = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    second = first + 1e-5 * torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    exact = 1 - torch.cosine_similarity(first.double(), second.double(), dim=-1)
    assert float(exact.max()) < 1e-9
    torch.testing.assert_close(cosine_distance(first, second).double(), exact, rtol=0.05, atol=0)


def dependencies(num_layers: int, default: float, **entries: float) -> Dependencies:
    """A matrix that is `default` but for entries written as m_0_1=..."""
    matrix = {(i, j): default for i in range(num_layers) for j in range(i + 1, num_layers)}
    for name, value in entries.items():
        _, first, later = name.split("_")
        matrix[int(first), int(later)] = value
    return Dependencies(matrix=matrix, layers={}, num_tokens=1)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, [(0, 1), (2, 3), (4, 5)]),
        ({"m_1_2": 0.1}, [(1, 2), (3, 4)]),
        ({"m_4_5": 0.1, "m_0_1": 0.2, "m_2_3": 0.3}, [(4, 5), (0, 1), (2, 3)]),
    ],
)
def test_parallel_groups_take_the_least_dependent_start_and_never_overlap(
    entries: dict[str, float], expected: list[tuple[int, ...]]
):
    architecture = make_architecture(blocks=make_blocks(*[(A, F)] * 6))
    groups = parallel_groups(dependencies(6, 0.5, **entries), architecture, group_size=2)
    assert [group.layers for group in groups] == expected


def test_parallel_groups_break_ties_by_the_sum_and_skip_blocks_without_attention():
    kinds = [(A, F), (A, F), (A, F), (A, F), (NO_ATTENTION, F), (A, F), (A, F)]
    architecture = make_architecture(blocks=make_blocks(*kinds))
    # Windows of three: 0-2 and 1-3 both have a largest entry of 0.5, that of 1-3 has the smaller sum.
    groups = parallel_groups(dependencies(7, 0.5, m_2_3=0.1), architecture, group_size=3)
    assert [group.layers for group in groups] == [(1, 2, 3)]
    assert (groups[0].max_dependency, groups[0].sum_dependency) == (0.5, pytest.approx(1.1))
