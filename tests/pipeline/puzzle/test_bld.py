"""Block-wise local distillation: what it minimises, that blocks are independent, and that a killed run continues."""

from pathlib import Path

import pytest
import torch

from pipeline.model.checkpoint import TensorReader
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter, SilentReporter
from pipeline.puzzle.bld import FailedBlock, TrainedBlock, train_blocks
from pipeline.puzzle.block_loss import block_target
from pipeline.puzzle.importance import load_importance
from pipeline.puzzle.initial import build_variant
from pipeline.puzzle.library import BlockKey
from pipeline.puzzle.parent_layers import ParentLayers
from pipeline.recipe import BlockLibraryConfig
from tests.pipeline.puzzle.workplace import Workplace

SETTINGS = BlockLibraryConfig(
    mode="decoupled",
    coupled_space=None,
    tokens=192,
    closed_form_tokens=0,
    loss="tensor",
    batch_size=2,
    learning_rate=3e-3,
    min_learning_rate_ratio=0.1,
    warmup_ratio=0.2,
    schedule="cosine",
    weight_decay=0.01,
    betas=(0.9, 0.95),
    max_grad_norm=1.0,
    overrides=(),
    precision="fp32",
)
NARROW = BlockKey(layer=1, subblock="ffn", variant="ffn16")
ONE_HEAD = BlockKey(layer=1, subblock="attention", variant="kv1")
LINEAR = BlockKey(layer=2, subblock="attention", variant="linear")
LINEAR_FFN = BlockKey(layer=0, subblock="ffn", variant="linear")
ALL = (LINEAR_FFN, ONE_HEAD, NARROW, LINEAR)


class KilledError(Exception):
    """Stands for kill -9."""


class KillingReporter(SilentReporter):
    """Ends the run after some step, as a kill would: nothing after it is executed."""

    def __init__(self, after_step: int) -> None:
        self.after_step = after_step

    def step(self, step: int, total: int, /, *, what: str, **metrics: float) -> None:
        """Raise after the chosen step."""
        if step == self.after_step:
            raise KilledError


def train(
    workplace: Workplace,
    keys: tuple[BlockKey, ...],
    work_dir: Path,
    *,
    settings: BlockLibraryConfig = SETTINGS,
    reporter: Reporter | None = None,
    model: HeterogeneousLlamaForCausalLM | None = None,
) -> list[TrainedBlock | FailedBlock]:
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    training = train_blocks(
        ParentLayers.whole(model or workplace.model(dtype)),
        {key: f"fingerprint of {key} {settings.learning_rate}" for key in keys},
        parent_tensors=TensorReader(workplace.parent_dir),
        importance=load_importance(workplace.importance_dir),
        train=workplace.packed(),
        validation=workplace.packed("validation"),
        settings=settings,
        work_dir=work_dir,
        max_activation_bytes=10**9,
        checkpoint_interval_steps=2,
        reporter=reporter or SilentReporter(),
    )
    return list(training.outcomes)


def assert_bitwise_equal(one: TrainedBlock | FailedBlock, other: TrainedBlock | FailedBlock):
    assert isinstance(one, TrainedBlock)
    assert isinstance(other, TrainedBlock)
    assert one.record == other.record
    assert set(one.tensors) == set(other.tensors)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_blocks_lowers_validation_loss_of_every_block(workplace: Workplace, tmp_path: Path, precision: str):
    settings = BlockLibraryConfig.model_validate(SETTINGS.model_dump() | {"precision": precision})
    outcomes = train(workplace, ALL, tmp_path, settings=settings)
    assert [outcome.key for outcome in outcomes] == list(ALL)
    for outcome in outcomes:
        assert isinstance(outcome, TrainedBlock)
        assert outcome.record.final_loss < outcome.record.initial_loss
        assert [point.step for point in outcome.record.curve] == [1, 2, 3, 4, 5, 6]
        assert all(tensor.dtype == torch.float32 for tensor in outcome.tensors.values())


def test_initial_loss_equals_the_swapped_layer_computed_whole(workplace: Workplace, tmp_path: Path):
    outcomes = {outcome.key: outcome for outcome in train(workplace, ALL, tmp_path)}
    model, packed = workplace.model(), workplace.packed("validation")
    importance = load_importance(workplace.importance_dir)
    rows = slice(0, SETTINGS.batch_size)
    teachers = ParentLayers.whole(model)
    for activations in teachers.activations(packed.tokens_NT[rows], packed.position_ids_NT[rows], stop=3):
        layer = model.model.layers[activations.layer]
        whole = layer(activations.input_BTD, **activations.attention_kwargs)
        torch.testing.assert_close(activations.output_BTD, whole, rtol=0, atol=0)
        for key in ALL:
            if key.layer != activations.layer:
                continue
            variant = build_variant(
                key, workplace.architecture, TensorReader(workplace.parent_dir), importance, dtype=torch.float32
            )
            middle = (variant if key.subblock == "attention" else layer).attend(
                activations.input_BTD, **activations.attention_kwargs
            )
            swapped = (variant if key.subblock == "ffn" else layer).feed_forward(middle)
            expected = block_target(whole, kind="tensor").loss(swapped)
            assert outcomes[key].record.initial_loss == pytest.approx(expected, rel=1e-5)


def test_train_blocks_alone_and_among_others_gives_the_same_bits(workplace: Workplace, tmp_path: Path):
    together = {outcome.key: outcome for outcome in train(workplace, ALL, tmp_path / "all")}
    for key in (NARROW, LINEAR):
        (alone,) = train(workplace, (key,), tmp_path / str(key))
        assert_bitwise_equal(alone, together[key])


@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_train_blocks_killed_and_run_again_gives_the_same_bits(workplace: Workplace, tmp_path: Path, killed_after: int):
    undisturbed = train(workplace, ALL, tmp_path / "undisturbed")
    with pytest.raises(KilledError):
        train(workplace, ALL, tmp_path / "killed", reporter=KillingReporter(killed_after))
    notes: list[str] = []
    reporter = SilentReporter()
    reporter.note = notes.append  # pyright: ignore[reportAttributeAccessIssue]
    resumed = train(workplace, ALL, tmp_path / "killed", reporter=reporter)
    assert notes == ([] if killed_after == 1 else [f"continuing after step {killed_after - killed_after % 2} of 6"])
    for one, other in zip(undisturbed, resumed, strict=True):
        assert_bitwise_equal(one, other)


def test_train_blocks_ignores_progress_of_other_settings_and_half_written_steps(workplace: Workplace, tmp_path: Path):
    fresh = train(workplace, (NARROW,), tmp_path / "fresh")
    other = BlockLibraryConfig.model_validate(SETTINGS.model_dump() | {"learning_rate": 1e-2})
    with pytest.raises(KilledError):
        train(workplace, (NARROW,), tmp_path / "work", settings=other, reporter=KillingReporter(5))
    assert_bitwise_equal(fresh[0], train(workplace, (NARROW,), tmp_path / "work")[0])

    with pytest.raises(KilledError):
        train(workplace, (NARROW,), tmp_path / "half", reporter=KillingReporter(5))
    (folder,) = (tmp_path / "half").iterdir()
    assert folder.name == "step-00000004"  # the one before is gone
    next(folder.glob("*.json")).unlink()
    next(folder.glob("*.safetensors")).write_bytes(b"cut off")
    assert_bitwise_equal(fresh[0], train(workplace, (NARROW,), tmp_path / "half")[0])


def test_train_blocks_continues_a_part_of_the_saved_blocks(workplace: Workplace, tmp_path: Path):
    (alone,) = train(workplace, (LINEAR,), tmp_path / "alone")
    with pytest.raises(KilledError):
        train(workplace, ALL, tmp_path / "work", reporter=KillingReporter(5))
    (resumed,) = train(workplace, (LINEAR,), tmp_path / "work")
    assert_bitwise_equal(alone, resumed)


def test_train_blocks_block_that_is_not_finite_fails_alone(workplace: Workplace, tmp_path: Path):
    undisturbed = {outcome.key: outcome for outcome in train(workplace, ALL, tmp_path / "undisturbed")}
    model = workplace.model()
    # An attention variant of layer 2 alone reads this FFN's weights with a gradient through the parent's FFN.
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    outcomes = {outcome.key: outcome for outcome in train(workplace, ALL, tmp_path / "work", model=model)}
    failed = outcomes.pop(LINEAR)
    assert isinstance(failed, FailedBlock)
    assert "nan" in failed.reason
    for key, outcome in outcomes.items():
        assert_bitwise_equal(outcome, undisturbed[key])
