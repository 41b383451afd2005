"""The loop and its checkpoints: resume, invariance, refusals."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.packed import IGNORED_LABEL, PackedTokens
from pipeline.errors import ArtifactError, CheckpointError, DataError, DivergedError
from pipeline.model.heterogeneous import build_model
from pipeline.progress import Reporter, SilentReporter
from pipeline.recipe import OptimizerConfig, Precision
from pipeline.stage import ExecutionSettings
from pipeline.training import checkpoints
from pipeline.training.batches import plan_batches
from pipeline.training.checkpoints import CheckpointManifest
from pipeline.training.engine import TrainEngine
from pipeline.training.loop import TrainingRun, train
from pipeline.training.objectives import NextTokenObjective
from tests.pipeline.reporters import NotingReporter
from tests.pipeline.training.builders import (
    OPTIMIZER,
    Interrupted,
    InterruptingReporter,
    parent_architecture,
    sample_windows,
    text_windows,
)

GLOBAL_BATCH_SIZE = 4
NUM_STEPS = 6


def _train(
    checkpoints_dir: Path,
    *,
    data: PackedTokens | None = None,
    reporter: Reporter | None = None,
    optimizer: OptimizerConfig = OPTIMIZER,
    precision: Precision = "fp32",
    **execution: Any,
) -> tuple[TrainingRun, dict[str, torch.Tensor]]:
    settings = ExecutionSettings(**{"micro_batch_size": 2, "checkpoint_interval_steps": 2, **execution})
    data = data or sample_windows(10)
    plan = plan_batches(
        data,
        tokens=NUM_STEPS * GLOBAL_BATCH_SIZE * data.sequence_length,
        global_batch_size=GLOBAL_BATCH_SIZE,
        shuffle_seed=5,
        what="sft",
    )
    engine = TrainEngine.create(
        build_model(parent_architecture(), dtype=torch.float32, seed=0, initializer_range=0.1),
        optimizer=optimizer,
        total_steps=plan.num_steps,
        precision=precision,
        execution=settings,
        global_batch_size=GLOBAL_BATCH_SIZE,
    )
    try:
        run = train(
            engine,
            plan=plan,
            objective=NextTokenObjective(),
            what="SFT steps",
            reporter=reporter or SilentReporter(),
            checkpoints_dir=checkpoints_dir,
            checkpoint_interval_steps=settings.checkpoint_interval_steps,
        )
        return run, dict(engine.exported_tensors())
    finally:
        engine.close()


def _interrupt(checkpoints_dir: Path, *, at_step: int, **settings: Any) -> None:
    with pytest.raises(Interrupted):
        _train(checkpoints_dir, reporter=InterruptingReporter(at_step=at_step), **settings)


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_resumed_training_is_bit_identical(tmp_path: Path, zero_stage: int, precision: Precision):
    settings = {"zero_stage": zero_stage, "precision": precision}
    straight, straight_weights = _train(tmp_path / "straight", **settings)

    _interrupt(tmp_path / "resumed", at_step=3, **settings)
    _interrupt(tmp_path / "resumed", at_step=5, **settings)
    resumed, resumed_weights = _train(tmp_path / "resumed", **settings)

    assert (straight.num_resumes, resumed.num_resumes) == (0, 2)
    assert resumed.curve == straight.curve
    assert [row["step"] for row in resumed.curve] == [1, 2, 3, 4, 5, 6]
    for name, weight in straight_weights.items():
        assert torch.equal(resumed_weights[name], weight), name


def test_gradient_accumulation_with_ragged_token_counts_changes_nothing(tmp_path: Path):
    at_once, weights = _train(tmp_path / "a", micro_batch_size=4)
    one_by_one, other_weights = _train(tmp_path / "b", micro_batch_size=1)
    assert [row["loss"] for row in one_by_one.curve] == pytest.approx([row["loss"] for row in at_once.curve], abs=1e-6)
    norms = [row["grad_norm"] for row in at_once.curve]
    assert [row["grad_norm"] for row in one_by_one.curve] == pytest.approx(norms, abs=1e-5)
    for name, weight in weights.items():
        # Adam's first steps are signs: a gradient near 0 turns a rounding into a hundredth of a learning rate.
        torch.testing.assert_close(other_weights[name], weight, atol=OPTIMIZER.learning_rate / 100, rtol=0)


def test_curve_has_one_row_per_step_with_tokens_and_learning_rate(tmp_path: Path):
    run, _ = _train(tmp_path)
    assert [row["tokens"] for row in run.curve] == [64 * step for step in range(1, NUM_STEPS + 1)]
    assert list(run.curve[0]) == ["step", "tokens", "loss", "learning_rate", "grad_norm"]
    assert run.curve[0]["learning_rate"] == OPTIMIZER.learning_rate / 2
    assert run.curve[-1]["loss"] < run.curve[0]["loss"]


def test_only_the_two_newest_checkpoints_are_kept(tmp_path: Path):
    _train(tmp_path, checkpoint_interval_steps=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_half_written_checkpoint_is_removed_and_the_one_before_is_used(tmp_path: Path):
    straight, _ = _train(tmp_path / "straight")
    _interrupt(tmp_path / "cut", at_step=5)
    (tmp_path / "cut" / "step-00000004" / "manifest.json").unlink()
    resumed, _ = _train(tmp_path / "cut")
    assert resumed.curve == straight.curve
    assert resumed.num_resumes == 1


def test_full_disk_is_refused_and_the_newest_checkpoint_stays(tmp_path: Path):
    _interrupt(tmp_path, at_step=5)
    layout = CheckpointManifest.model_validate_json((tmp_path / "step-00000004" / "manifest.json").read_bytes()).layout
    with pytest.raises(ArtifactError, match="a checkpoint of this training needs"):
        checkpoints.save(tmp_path, step=6, layout=layout, state={}, needed_bytes=2**60, write=Path.mkdir)
    assert _train(tmp_path)[0].num_resumes == 1


def test_changed_checkpoint_is_refused_before_it_is_read(tmp_path: Path):
    _interrupt(tmp_path, at_step=3)
    weights = next((tmp_path / "step-00000002" / "state").glob("mp_rank_*"))
    weights.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match="does not hold the bytes its manifest names"):
        _train(tmp_path)


def test_checkpoint_that_a_power_cut_broke_is_passed_over_for_the_one_before_it(tmp_path: Path):
    straight, straight_weights = _train(tmp_path / "straight")
    _interrupt(tmp_path / "resumed", at_step=5)
    broken = tmp_path / "resumed" / "step-00000004"
    weights = next((broken / "state").glob("mp_rank_*"))
    weights.write_bytes(b"\0" * weights.stat().st_size)  # as a file system shows a file whose bytes never came
    reporter = NotingReporter()
    resumed, resumed_weights = _train(tmp_path / "resumed", reporter=reporter)
    assert [note for note in reporter.notes if str(broken) in note and "continues from the one before" in note]
    assert "continuing SFT steps after step 2 of 6" in reporter.notes
    assert resumed.curve == straight.curve
    assert all(torch.equal(resumed_weights[name], weight) for name, weight in straight_weights.items())


def test_checkpoint_is_on_the_disk_before_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []

    def record(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    monkeypatch.setattr(os, "fsync", record)
    _interrupt(tmp_path, at_step=3)
    manifest = next(place for place, name in enumerate(synced) if "manifest.json" in name)
    files = {str(path) for path in (tmp_path / "step-00000002" / "state").rglob("*") if path.is_file()}
    assert files
    assert files <= set(synced[:manifest])


@pytest.mark.parametrize(("setting", "value"), [("zero_stage", 2), ("micro_batch_size", 4), ("precision", "bf16")])
def test_checkpoint_of_another_layout_is_refused(tmp_path: Path, setting: str, value: Any):
    _interrupt(tmp_path, at_step=3)
    with pytest.raises(CheckpointError, match=rf"was written with {setting} .* \(now {value}\)"):
        _train(tmp_path, **{setting: value})


def test_diverged_training_names_step_and_checkpoint(tmp_path: Path):
    too_fast = OPTIMIZER.model_copy(update={"learning_rate": 1e30, "warmup_ratio": 0.5})
    with pytest.raises(DivergedError, match=r"step \d of 6 has loss .*newest good checkpoint is"):
        _train(tmp_path, optimizer=too_fast)


def test_step_without_trained_tokens_is_refused(tmp_path: Path):
    data = text_windows(10)
    data.labels_NT.fill_(IGNORED_LABEL)
    with pytest.raises(DataError, match="step 1 has no token to train on"):
        _train(tmp_path, data=data)
