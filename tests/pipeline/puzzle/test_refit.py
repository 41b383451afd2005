"""The closed-form start: its objective, in float64, has no gradient left where the matrix ends; what it holds."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.architecture import gqa, swiglu
from pipeline.data.packed import PackedTokens
from pipeline.model.checkpoint import TensorReader, save_checkpoint
from pipeline.model.heterogeneous import build_model
from pipeline.progress import SilentReporter
from pipeline.puzzle import composition
from pipeline.puzzle.bld import TrainedBlock, train_blocks
from pipeline.puzzle.bld_cost import HeldBytes
from pipeline.puzzle.bld_state import Trainee
from pipeline.puzzle.importance import Importance, load_importance
from pipeline.puzzle.initial import build_variant
from pipeline.puzzle.library import BlockKey
from pipeline.puzzle.parent_layers import ParentLayers
from pipeline.puzzle.refit import RIDGE, halves, last_matrix, refit_blocks
from pipeline.recipe import BlockLoss, OptimizerConfig
from tests.pipeline.model.builders import make_architecture, make_blocks
from tests.pipeline.puzzle.test_bld import ALL, LINEAR, LINEAR_FFN, NARROW, ONE_HEAD, SETTINGS
from tests.pipeline.puzzle.workplace import Workplace
from tests.pipeline.test_activation_memory import LiveTensors

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


def refit_all(
    parent: ParentLayers,
    trainees: list[Trainee],
    packed: PackedTokens,
    work_dir: Path,
    *,
    max_activation_bytes: int = 10**9,
) -> list[Tensor]:
    """The refitted matrices of all variants that the rank holds."""
    trainees = [trainee for trainee in trainees if trainee.key.layer in parent.layers]
    by_layer: dict[int, list[Trainee]] = {}
    for trainee in trainees:
        by_layer.setdefault(trainee.key.layer, []).append(trainee)
    refit_blocks(
        parent,
        by_layer,
        packed,
        stop=3,
        settings=SETTINGS,
        work_dir=work_dir,
        max_activation_bytes=max_activation_bytes,
        reporter=SilentReporter(),
    )
    return [last_matrix(one.module, half).weight.detach().clone() for one in trainees for half in halves(one)]


@pytest.mark.parametrize("loss", ["tensor", "token"])
@pytest.mark.parametrize("key", [NARROW, ONE_HEAD, LINEAR, LINEAR_FFN], ids=str)
def test_refit_ends_where_the_objective_has_no_gradient(
    workplace: Workplace, tmp_path: Path, key: BlockKey, loss: BlockLoss
):
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
        work_dir=tmp_path,
        max_activation_bytes=10**9,
        reporter=SilentReporter(),
    )
    after, matrix_DI = objective(workplace, trainee, start_DI, loss=loss)
    (gradient_DI,) = torch.autograd.grad(after, matrix_DI)
    at_start = make_trainee(workplace, key)
    far, start_matrix_DI = objective(workplace, at_start, start_DI, loss=loss)
    (far_gradient_DI,) = torch.autograd.grad(far, start_matrix_DI)
    assert after.item() < 0.95 * before.item()
    assert gradient_DI.norm() < 1e-4 * far_gradient_DI.norm()


def test_refit_of_a_variant_equal_to_its_parent_changes_nothing(workplace: Workplace, tmp_path: Path):
    key = BlockKey(layer=1, subblock="ffn", variant="ffn48")
    trainee = make_trainee(workplace, key)
    before_DI = last_matrix(trainee.module, halves(trainee)[-1]).weight.detach().clone()
    parent = ParentLayers.whole(workplace.model())
    refit_all(parent, [trainee], workplace.packed(), tmp_path)
    assert torch.allclose(last_matrix(trainee.module, halves(trainee)[-1]).weight, before_DI, atol=1e-6)


def live_beside(model: nn.Module, trainees: list[Trainee], packed: PackedTokens) -> LiveTensors:
    """Follows what is held besides weights and windows."""
    modules = [model, *(trainee.module for trainee in trainees)]
    weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return LiveTensors([*weights, packed.tokens_NT, packed.position_ids_NT])


PAIRS = tuple(BlockKey(layer=1, subblock="pair", variant=variant) for variant in ("kv1+ffn16", "kv1+no_op"))


def repeated(packed: PackedTokens, times: int) -> PackedTokens:
    return PackedTokens(
        tokens_NT=packed.tokens_NT.repeat(times, 1),
        labels_NT=packed.labels_NT.repeat(times, 1),
        position_ids_NT=packed.position_ids_NT.repeat(times, 1),
    )


# Groups of three windows beside batches of two; 120 windows of 16 tokens and 32 float32 values are 240 KiB.
@pytest.mark.parametrize("max_activation_bytes", [0, 100_000])
def test_refit_holds_hidden_states_up_to_its_bound_and_gives_the_same_bits(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_activation_bytes: int
):
    monkeypatch.setattr(composition, "MAX_BATCH_TOKENS", 3 * 16)
    model, packed = workplace.model(), repeated(workplace.packed(), 10)

    def refitted(max_bytes: int) -> tuple[list[Tensor], int]:
        trainees = [make_trainee(workplace, key) for key in (*ALL, *PAIRS)]
        live = live_beside(model, trainees, packed)
        with live:
            found = refit_all(ParentLayers.whole(model), trainees, packed, tmp_path, max_activation_bytes=max_bytes)
        return found, live.peak_bytes

    all_bytes = packed.num_tokens * 32 * 4
    wanted, _ = refitted(all_bytes)
    found, peak_bytes = refitted(max_activation_bytes)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert peak_bytes < max_activation_bytes + 0.5 * all_bytes, peak_bytes
    assert not list(tmp_path.rglob("*.safetensors"))


def test_refit_on_two_ranks_passes_groups_on_and_gives_the_same_bits(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(composition, "MAX_BATCH_TOKENS", 3 * 16)
    sent: list[Tensor] = []

    class Sent:
        def wait(self) -> None:
            """It has arrived."""

    def send(tensor: Tensor, _: int) -> Sent:
        sent.append(tensor.clone())
        return Sent()

    monkeypatch.setattr(dist, "isend", send)
    monkeypatch.setattr(dist, "recv", lambda tensor, _: tensor.copy_(sent.pop(0)))
    device, packed = torch.device("cpu"), workplace.packed()
    whole = [make_trainee(workplace, key) for key in ALL]
    wanted = refit_all(ParentLayers.whole(workplace.model()), whole, packed, tmp_path)
    split, found = [make_trainee(workplace, key) for key in ALL], []
    for layers, previous, following in ((range(1), None, 1), (range(1, 3), 0, None)):
        parent = ParentLayers(
            model=workplace.model(), layers=layers, device=device, previous_rank=previous, next_rank=following
        )
        found += refit_all(parent, split, packed, tmp_path, max_activation_bytes=0)
        assert len(sent) == (4 if following else 0)  # twelve windows
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "variants",
    [
        ("ffn ffn300", "ffn ffn400"),  # the wider one's solution
        ("ffn ffn242", "ffn ffn240", "ffn ffn250", "ffn ffn245", "ffn ffn248"),  # the first beside all sums
        ("ffn linear", "attention linear", "pair kv1+ffn300"),
    ],
    ids=", ".join,
)
def test_closed_form_start_holds_what_planning_and_rounds_count(tmp_path: Path, variants: tuple[str, ...]):
    architecture = make_architecture(hidden_size=96, head_dim=24, blocks=make_blocks((gqa(4), swiglu(500))))
    model = build_model(architecture, dtype=torch.float32, seed=0)
    save_checkpoint(tmp_path, architecture=architecture, tensors=model.state_dict(), tokenizer_dir=None)
    importance = Importance(
        ffn_contribution=(torch.ones(500),),
        kv_contribution=(torch.ones(4),),
        channel_order=(torch.arange(500),),
        kv_heads="mean",
    )
    keys = [
        BlockKey(layer=0, subblock=subblock, variant=variant)  # pyright: ignore[reportArgumentType]
        for subblock, variant in map(str.split, variants)
    ]
    trainees = [
        Trainee(
            key=key,
            fingerprint="f",
            module=build_variant(key, architecture, TensorReader(tmp_path), importance, dtype=torch.float32),
            settings=OPTIMIZER,
        )
        for key in keys
    ]
    tokens_NT = torch.zeros(2, 2, dtype=torch.long)  # so few that their activations hardly count
    packed = PackedTokens(tokens_NT=tokens_NT, labels_NT=tokens_NT, position_ids_NT=torch.arange(2).expand(2, 2))
    live = live_beside(model, trainees, packed)
    with live:
        refit_all(ParentLayers.whole(model), trainees, packed, tmp_path)
    counted = HeldBytes.of(architecture, keys).closed_form
    assert counted <= live.peak_bytes <= 1.02 * counted


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
            max_activation_bytes=0,
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
