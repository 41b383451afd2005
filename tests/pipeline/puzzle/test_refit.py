"""The closed-form start: its objective, written down in float64, has no gradient left where the matrix ends."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.model.checkpoint import TensorReader
from pipeline.progress import SilentReporter
from pipeline.puzzle.bld import TrainedBlock, train_blocks
from pipeline.puzzle.bld_state import Trainee
from pipeline.puzzle.importance import load_importance
from pipeline.puzzle.initial import build_variant
from pipeline.puzzle.library import BlockKey
from pipeline.puzzle.parent_layers import ParentLayers
from pipeline.puzzle.refit import RIDGE, halves, last_matrix, refit_blocks
from pipeline.recipe import BlockLoss, OptimizerConfig
from tests.pipeline.puzzle.test_bld import ALL, LINEAR, LINEAR_FFN, NARROW, ONE_HEAD, SETTINGS
from tests.pipeline.puzzle.workplace import Workplace

OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3,
    min_learning_rate_ratio=1.0,
    warmup_ratio=0.0,
    schedule="constant",
    weight_decay=0.0,
    betas=(0.9, 0.95),
    max_grad_norm=1.0,
)


def make_trainee(workplace: Workplace, key: BlockKey) -> Trainee:
    reader, importance = TensorReader(workplace.parent_dir), load_importance(workplace.importance_dir)
    module = build_variant(key, workplace.architecture, reader, importance, dtype=torch.float32)
    return Trainee(key=key, fingerprint="f", module=module, settings=OPTIMIZER)


def objective(workplace: Workplace, trainee: Trainee, start_DI: Tensor, *, loss: BlockLoss) -> tuple[Tensor, Tensor]:
    """The objective over all training windows at once in float64, and the matrix it is a function of."""
    model, packed = workplace.model().double(), workplace.packed()
    (activations,) = (
        one
        for one in ParentLayers.whole(model).activations(packed.tokens_NT, packed.position_ids_NT, stop=3)
        if one.layer == trainee.key.layer
    )
    matrix, read = last_matrix(trainee.module, halves(trainee)[-1]), []
    module = trainee.module.double()
    handle = matrix.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    if trainee.key.subblock == "ffn":
        predicted_BTD = module.feed_forward(activations.middle_BTD)
        parent_BTD = activations.output_BTD
    else:
        predicted_BTD = module.attend(activations.input_BTD, **activations.attention_kwargs)
        parent_BTD = activations.middle_BTD
    handle.remove()
    error_BT = (predicted_BTD - parent_BTD).square().sum(dim=-1)
    weight_BT = torch.ones_like(error_BT)
    if loss == "token":
        weight_BT = 1 / activations.output_BTD.square().mean(dim=-1)
    mean_square = (weight_BT[..., None] * read[0].square()).sum() / matrix.in_features
    distance = (matrix.weight - start_DI).square().sum()
    return (weight_BT * error_BT).sum() + RIDGE * mean_square.detach() * distance, matrix.weight


@pytest.mark.parametrize("loss", ["tensor", "token"])
@pytest.mark.parametrize("key", [NARROW, ONE_HEAD, LINEAR, LINEAR_FFN], ids=str)
def test_refit_ends_where_the_objective_has_no_gradient(workplace: Workplace, key: BlockKey, loss: BlockLoss):
    trainee = make_trainee(workplace, key)
    start_DI = last_matrix(trainee.module, halves(trainee)[-1]).weight.detach().double().clone()
    before, _ = objective(workplace, trainee, start_DI, loss=loss)
    trainee.module.float()
    refit_blocks(
        ParentLayers.whole(workplace.model()),
        {key.layer: [trainee]},
        workplace.packed(),
        stop=key.layer + 1,
        settings=SETTINGS.model_copy(update={"loss": loss}),
        reporter=SilentReporter(),
    )
    after, matrix_DI = objective(workplace, trainee, start_DI, loss=loss)
    (gradient_DI,) = torch.autograd.grad(after, matrix_DI)
    at_start = make_trainee(workplace, key)
    far, start_matrix_DI = objective(workplace, at_start, start_DI, loss=loss)
    (far_gradient_DI,) = torch.autograd.grad(far, start_matrix_DI)
    assert after.item() < 0.95 * before.item()
    assert gradient_DI.norm() < 1e-4 * far_gradient_DI.norm()


def test_refit_of_a_variant_equal_to_its_parent_changes_nothing(workplace: Workplace):
    key = BlockKey(layer=1, subblock="ffn", variant="ffn48")
    trainee = make_trainee(workplace, key)
    before_DI = last_matrix(trainee.module, halves(trainee)[-1]).weight.detach().clone()
    parent = ParentLayers.whole(workplace.model())
    refit_blocks(parent, {1: [trainee]}, workplace.packed(), stop=2, settings=SETTINGS, reporter=SilentReporter())
    assert torch.allclose(last_matrix(trainee.module, halves(trainee)[-1]).weight, before_DI, atol=1e-6)


def test_training_from_the_closed_form_start_begins_lower_and_is_the_same_alone_and_in_company(
    workplace: Workplace, tmp_path: Path
):
    def run(keys: tuple[BlockKey, ...], closed_form_tokens: int, name: str) -> dict[BlockKey, TrainedBlock]:
        training = train_blocks(
            ParentLayers.whole(workplace.model()),
            {key: str(key) for key in keys},
            parent_tensors=TensorReader(workplace.parent_dir),
            importance=load_importance(workplace.importance_dir),
            train=workplace.packed(),
            validation=workplace.packed("validation"),
            settings=SETTINGS.model_copy(update={"closed_form_tokens": closed_form_tokens}),
            work_dir=tmp_path / name,
            checkpoint_interval_steps=100,
            reporter=SilentReporter(),
        )
        assert all(isinstance(outcome, TrainedBlock) for outcome in training.outcomes)
        return {outcome.key: outcome for outcome in training.outcomes if isinstance(outcome, TrainedBlock)}

    plain, fitted, alone = run(ALL, 0, "plain"), run(ALL, 128, "fitted"), run((NARROW,), 128, "alone")
    for key in ALL:
        assert fitted[key].record.initial_loss == plain[key].record.initial_loss
        assert fitted[key].record.curve[0].loss < plain[key].record.curve[0].loss
    for name, tensor in fitted[NARROW].tensors.items():
        assert torch.equal(tensor, alone[NARROW].tensors[name])
