"""The block losses against their definitions, and the curvature behind `kl` against autograd and the KL itself."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import MissingInputError
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import SilentReporter
from pipeline.puzzle import block_loss as subject
from pipeline.puzzle.bld import TrainedBlock, train_blocks
from pipeline.puzzle.block_loss import block_target, output_curvature, output_gradients
from pipeline.puzzle.importance import load_importance
from pipeline.puzzle.parent_layers import ParentLayers
from pipeline.recipe import BlockLoss
from tests.pipeline.puzzle.test_bld import ALL, SETTINGS, train
from tests.pipeline.puzzle.workplace import Workplace

LAYER = 1


def written_out(prediction: Tensor, target: Tensor, curvature: Tensor) -> dict[BlockLoss, Tensor]:
    """The three losses as the paper and the module's docstring have them."""
    error, size = (prediction - target).square(), target.square()
    return {
        "tensor": error.sum() / size.sum(),
        "token": (error.sum(dim=-1) / size.sum(dim=-1)).mean(),
        "kl": (0.5 * (error * curvature).sum(dim=-1) / size.mean(dim=-1)).mean(),
    }


@pytest.mark.parametrize("kind", ["tensor", "token", "kl"])
def test_losses_and_gradients_are_those_of_autograd_in_float64(kind: BlockLoss):
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    target[0, 1] *= 1000  # a massive activation
    curvature = torch.rand(5, generator=generator)
    expected = written_out(prediction.requires_grad_(), target, curvature.double())[kind]
    (expected_gradient,) = torch.autograd.grad(expected, prediction)
    held = block_target(target, kind=kind, curvature_D=curvature)

    value, gradient = held.loss_and_gradient(prediction)
    assert value == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-12)
    assert held.loss(target.float()) == 0.0


def test_the_gradient_has_the_precision_of_what_it_is_given_and_its_squares_do_not():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 3, 64, generator=generator)
    prediction = (target + 1e-2 * torch.randn(2, 3, 64, generator=generator)).bfloat16()
    value, gradient = block_target(target, kind="token").loss_and_gradient(prediction)
    assert gradient.dtype == torch.bfloat16
    expected = written_out(prediction.double(), target.double(), torch.ones(64, dtype=torch.float64))["token"]
    assert value == pytest.approx(expected.item(), rel=1e-5)


def log_probabilities(model: HeterogeneousLlamaForCausalLM, tokens_BT: Tensor, output_BTD: Tensor) -> Tensor:
    """The model's log-probabilities when layer 1 gives this output."""
    parent = ParentLayers.whole(model)
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    kwargs = parent.attention_kwargs(output_BTD, positions_BT)
    hidden_BTD = model.model.layers[LAYER + 1](output_BTD, **kwargs)
    return model.lm_head(model.model.norm(hidden_BTD)).log_softmax(dim=-1)


def exact_curvature(workplace: Workplace, tokens_BT: Tensor) -> tuple[Tensor, Tensor, HeterogeneousLlamaForCausalLM]:
    """Layer 1's output, and the diagonal of the Fisher information there: every label at every position, weighed."""
    model = workplace.model(torch.float64)
    model.requires_grad_(requires_grad=False)
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    *_, last = ParentLayers.whole(model).activations(tokens_BT, positions_BT, stop=LAYER + 1)
    output_BTD = last.output_BTD.requires_grad_()
    scores_BTV = log_probabilities(model, tokens_BT, output_BTD)
    diagonal_BTD = torch.zeros_like(output_BTD)
    for row in range(tokens_BT.shape[0]):
        for position in range(tokens_BT.shape[1]):
            for score in scores_BTV[row, position]:
                (gradient_BTD,) = torch.autograd.grad(score, output_BTD, retain_graph=True)
                diagonal_BTD += score.detach().exp() * gradient_BTD.square()
    return output_BTD.detach(), diagonal_BTD, model


def test_curvature_is_that_of_the_final_kl(workplace: Workplace):
    tokens_BT = workplace.packed().tokens_NT[:1, :6]
    output_BTD, diagonal_BTD, model = exact_curvature(workplace, tokens_BT)
    before = log_probabilities(model, tokens_BT, output_BTD)
    for token, channel in ((0, 3), (2, 17), (5, 31)):
        step = 1e-3 / diagonal_BTD[0, token, channel].sqrt()
        moved_BTD = output_BTD.clone()
        moved_BTD[0, token, channel] += step
        after = log_probabilities(model, tokens_BT, moved_BTD)
        kl = (before.exp() * (before - after)).sum()
        assert kl.item() == pytest.approx((0.5 * diagonal_BTD[0, token, channel] * step**2).item(), rel=0.02)


def test_output_curvature_is_the_mean_of_sampled_gradients_and_tends_to_the_exact_one(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
):
    packed = workplace.packed().take(16)
    output_BTD, diagonal_BTD, model = exact_curvature(workplace, packed.tokens_NT)
    exact_D = (output_BTD.square().mean(dim=-1, keepdim=True) * diagonal_BTD).mean(dim=(0, 1))
    total_D, num_draws = torch.zeros_like(exact_D), 150
    for seed in range(num_draws):
        monkeypatch.setattr(subject, "LABEL_SEED", seed)
        total_D += output_curvature(model, packed, batch_size=1, reporter=SilentReporter())[LAYER]
    ratio_D = total_D / num_draws / exact_D
    assert ratio_D.mean().item() == pytest.approx(1, abs=0.1)
    assert 0.5 < ratio_D.min().item() < ratio_D.max().item() < 1.8


def test_output_gradients_are_those_of_the_sampled_log_probabilities(workplace: Workplace):
    packed = workplace.packed().take(16)
    model = workplace.model(torch.float64)
    outputs, gradients = output_gradients(
        model, packed.tokens_NT, packed.position_ids_NT, generator=torch.Generator().manual_seed(7)
    )
    output_BTD = outputs[LAYER].clone().requires_grad_()
    scores_SV = log_probabilities(model, packed.tokens_NT, output_BTD).flatten(0, 1)
    labels_S1 = torch.multinomial(scores_SV.detach().float().exp(), 1, generator=torch.Generator().manual_seed(7))
    (expected_BTD,) = torch.autograd.grad(scores_SV.gather(1, labels_S1).sum(), output_BTD)
    torch.testing.assert_close(gradients[LAYER], expected_BTD, rtol=1e-4, atol=1e-6)


def test_training_by_the_kl_lowers_it_for_every_block(workplace: Workplace, tmp_path: Path):
    outcomes = train(workplace, ALL, tmp_path, settings=SETTINGS.model_copy(update={"loss": "kl"}))
    for outcome in outcomes:
        assert isinstance(outcome, TrainedBlock)
        assert outcome.record.final_loss < outcome.record.initial_loss


def test_kl_loss_without_its_curvature_is_refused(workplace: Workplace, tmp_path: Path):
    importance = load_importance(workplace.importance_dir)
    with pytest.raises(MissingInputError, match="without the curvature"):
        train_blocks(
            ParentLayers.whole(workplace.model()),
            {},
            parent_tensors=None,  # pyright: ignore[reportArgumentType]
            importance=type(importance)(
                ffn_contribution=importance.ffn_contribution,
                kv_contribution=importance.kv_contribution,
                channel_order=importance.channel_order,
                kv_heads="mean",
            ),
            train=workplace.packed(),
            validation=workplace.packed("validation"),
            settings=SETTINGS.model_copy(update={"loss": "kl"}),
            work_dir=tmp_path,
            max_activation_bytes=10**9,
            checkpoint_interval_steps=1,
            reporter=SilentReporter(),
        )
