"""Contributions against brute force: zero one channel, or all but one head, and look at the output."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import RecipeError
from pipeline.model.heterogeneous import attention_inputs
from pipeline.progress import SilentReporter
from pipeline.puzzle import composition
from pipeline.puzzle.importance import (
    block_influence,
    count_non_finite,
    load_importance,
    measure_importance,
    save_importance,
)
from pipeline.puzzle.parent_layers import ParentLayers
from tests.pipeline.puzzle.test_refit import repeated
from tests.pipeline.puzzle.workplace import IMPORTANCE, Workplace
from tests.pipeline.test_activation_memory import LiveTensors


def test_channel_contribution_equals_change_of_output_when_the_channel_is_zeroed(workplace: Workplace):
    model, packed = workplace.model(torch.float64), workplace.packed().take(48)
    importance = measure_importance(model, packed, settings=IMPORTANCE, reporter=SilentReporter())
    for activations in ParentLayers.whole(model).activations(packed.tokens_NT, packed.position_ids_NT, stop=3):
        layer = model.model.layers[activations.layer]
        down = layer.mlp.down_proj
        for channel in (0, 7, 47):
            kept_D = down.weight[:, channel].detach().clone()
            down.weight.data[:, channel] = 0
            change_BTD = activations.output_BTD - layer.feed_forward(activations.middle_BTD).detach()
            down.weight.data[:, channel] = kept_D
            torch.testing.assert_close(
                importance.ffn_contribution[activations.layer][channel].double(),
                change_BTD.norm(dim=-1).mean(),
                rtol=1e-5,
                atol=0,
            )


def test_kv_contribution_equals_norm_of_what_one_head_adds(workplace: Workplace):
    model, packed = workplace.model(torch.float64), workplace.packed().take(32)
    importance = measure_importance(model, packed, settings=IMPORTANCE, reporter=SilentReporter())
    kwargs = attention_inputs(model, batch_size=2, num_tokens=16, device="cpu", dtype=torch.float64)
    for activations in ParentLayers.whole(model).activations(packed.tokens_NT, packed.position_ids_NT, stop=3):
        layer = model.model.layers[activations.layer]
        output = layer.self_attn.o_proj.weight
        whole_DX = output.detach().clone()
        for head in range(2):
            # Two query heads of 8 values share one key/value head: 16 columns each.
            output.data = torch.zeros_like(whole_DX)
            output.data[:, 16 * head : 16 * head + 16] = whole_DX[:, 16 * head : 16 * head + 16]
            added_BTD = layer.attend(activations.input_BTD, **kwargs).detach() - activations.input_BTD
            torch.testing.assert_close(
                importance.kv_contribution[activations.layer][head].double(),
                added_BTD.norm(dim=-1).mean(),
                rtol=1e-5,
                atol=0,
            )
        output.data = whole_DX


def test_importance_survives_the_disk_and_orders_channels(workplace: Workplace, tmp_path: Path):
    importance = load_importance(workplace.importance_dir)
    save_importance(importance, tmp_path)
    again = load_importance(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(importance.ffn_contribution, again.ffn_contribution, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(importance.channel_order, again.channel_order, strict=True))
    assert again.kv_heads == "mean"
    order_F = importance.channel_order[1]
    ordered_F = importance.ffn_contribution[1][order_F]
    assert bool((ordered_F[:-1] >= ordered_F[1:]).all())
    assert count_non_finite(importance) == 0


@pytest.mark.parametrize("num_rounds", [3, 48])
def test_channel_order_in_rounds_equals_brute_force_that_zeroes_channels(workplace: Workplace, num_rounds: int):
    model, packed = workplace.model(torch.float64), workplace.packed().take(48)
    settings = IMPORTANCE.model_copy(update={"channel_rounds": num_rounds})
    importance = measure_importance(model, packed, settings=settings, reporter=SilentReporter())
    for activations in ParentLayers.whole(model).activations(packed.tokens_NT, packed.position_ids_NT, stop=3):
        layer = model.model.layers[activations.layer]
        whole_DF = layer.mlp.down_proj.weight.detach().clone()

        def error_without(channels: list[int], activations: Any = activations, layer: Any = layer) -> float:
            layer.mlp.down_proj.weight.data[:, channels] = 0
            output_BTD = layer.feed_forward(activations.middle_BTD).detach()
            layer.mlp.down_proj.weight.data = whole_DF.clone()  # noqa: B023
            return (output_BTD - activations.output_BTD).norm(dim=-1).mean().item()

        removed: list[int] = []
        for number in range(1, num_rounds + 1):
            left = [channel for channel in range(48) if channel not in removed]
            left.sort(key=lambda channel: error_without([*removed, channel]))
            removed += left[: 48 * number // num_rounds - len(removed)]
        assert importance.channel_order[activations.layer].tolist() == removed[::-1]


# Groups of three windows; 120 windows of 16 tokens and 32 float32 values are 240 KiB.
@pytest.mark.parametrize("max_activation_bytes", [0, 100_000, 10**9])
def test_block_influence_equals_cosines_of_a_whole_pass_and_holds_states_up_to_its_bound(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_activation_bytes: int
):
    monkeypatch.setattr(composition, "MAX_BATCH_TOKENS", 3 * 16)
    model, packed = workplace.model(), repeated(workplace.packed(), 10)
    live = LiveTensors([*model.parameters(), *model.buffers(), packed.tokens_NT, packed.position_ids_NT])
    with live:
        found = block_influence(model, packed, work_dir=tmp_path, max_activation_bytes=max_activation_bytes)
    passed = ParentLayers.whole(model).activations(packed.tokens_NT, packed.position_ids_NT, stop=3)
    expected = []
    for one in passed:
        x_SD, y_SD = (states.double().flatten(0, 1) for states in (one.input_BTD, one.output_BTD))
        cosine_S = (x_SD * y_SD).sum(dim=1) / (x_SD.norm(dim=1) * y_SD.norm(dim=1))
        expected.append((1 - cosine_S).mean().item())
    assert found == pytest.approx(expected, rel=1e-4)
    all_bytes = packed.num_tokens * 32 * 4
    assert live.peak_bytes < min(max_activation_bytes, all_bytes) + 0.4 * all_bytes, live.peak_bytes
    assert not list(tmp_path.rglob("*.safetensors"))


def test_channel_rounds_above_the_number_of_channels_are_refused(workplace: Workplace):
    settings = IMPORTANCE.model_copy(update={"channel_rounds": 49})
    with pytest.raises(RecipeError, match="channel_rounds is 49; the parent's FFNs have 48"):
        measure_importance(workplace.model(), workplace.packed(), settings=settings, reporter=SilentReporter())
