"""The three stages end to end on tiny checkpoints: outputs, metrics, resume, ranks."""

import dataclasses
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from pipeline.architecture import Frozen
from pipeline.data.packed import save_packed
from pipeline.model.checkpoint import TensorReader, load_model, read_architecture
from pipeline.processes import run_checked
from pipeline.recipe import DistillationConfig, PretrainingConfig, SFTConfig
from pipeline.stage import ExecutionSettings, StageInputs, StageResult
from pipeline.stages import cpt_checkpoint, kd_checkpoint, sft_checkpoint
from pipeline.stages.spec import StageSpec, config_type_name
from tests.pipeline.training.builders import (
    OPTIMIZER,
    Interrupted,
    InterruptingReporter,
    child_architecture,
    parent_architecture,
    sample_windows,
    text_windows,
    write_checkpoint,
)

KD = DistillationConfig(
    tokens=20 * 4 * 16,
    global_batch_size=4,
    long_context=(),
    cosine_weight=1.0,
    kl_weight=1.0,
    optimizer=OPTIMIZER,
    precision="fp32",
)
CPT = PretrainingConfig(tokens=20 * 4 * 16, global_batch_size=4, long_context=(), optimizer=OPTIMIZER, precision="bf16")
SFT = SFTConfig(tokens=20 * 4 * 16, global_batch_size=4, optimizer=OPTIMIZER, precision="bf16", seed=0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> StageInputs:
    root = tmp_path_factory.mktemp("store")
    child = write_checkpoint(root / "child", child_architecture(), seed=1, dtype=torch.bfloat16)
    mixture, toggle = root / "mixture", root / "toggle"
    save_packed(mixture, "train", text_windows(80))
    save_packed(mixture, "validation", text_windows(6, seed=9))
    save_packed(toggle, "train", sample_windows(30))
    save_packed(toggle, "validation", sample_windows(4, seed=9))
    return StageInputs(
        artifacts={
            "parent_checkpoint": write_checkpoint(root / "parent", parent_architecture(), seed=0),
            "fused_checkpoint": child,
            "kd_checkpoint": child,
            "cpt_checkpoint": child,
            "distillation_mix": mixture,
            "pretraining_mix": mixture,
            "reasoning_toggle_dataset": toggle,
        },
        store_root=root,
        downloads=root,
        execution=ExecutionSettings(micro_batch_size=2, checkpoint_interval_steps=8),
    )


def _require_trained_checkpoint(out_dir: Path, result: StageResult, *, start_dir: Path) -> None:
    assert read_architecture(out_dir) == read_architecture(start_dir)
    start, end = TensorReader(start_dir), TensorReader(out_dir)
    assert end.names == start.names  # tied: no head
    assert all(end.dtype(name) == start.dtype(name) for name in end.names)
    assert not torch.equal(end.read("model.norm.weight"), start.read("model.norm.weight"))
    load_model(out_dir, dtype=torch.float32)
    assert (out_dir / "tokenizer.json").is_file()
    curve = pl.read_parquet(out_dir / "curve.parquet")
    assert curve["step"].to_list() == list(range(1, 21))
    assert result.metrics["num_steps"] == 20
    assert result.metrics["num_tokens"] == 1280
    assert result.metrics["final_loss"] == curve["loss"][-1]
    assert result.facts["world_size"] == "1"
    assert result.facts["micro_batch_size"] == "2"


def test_kd_brings_the_child_nearer_to_its_parent(inputs: StageInputs, tmp_path: Path):
    result = kd_checkpoint.run(KD, inputs, tmp_path)
    _require_trained_checkpoint(tmp_path, result, start_dir=inputs["fused_checkpoint"])
    assert result.metrics["validation_kl_ratio"] < 0.9
    assert pl.read_parquet(tmp_path / "curve.parquet").columns[-2:] == ["kl", "cosine"]


def test_kd_of_the_parent_itself_has_nothing_to_lower(inputs: StageInputs, tmp_path: Path):
    same = {**inputs.artifacts, "fused_checkpoint": inputs["parent_checkpoint"]}
    slow = KD.model_copy(update={"optimizer": OPTIMIZER.model_copy(update={"learning_rate": 1e-8})})
    result = kd_checkpoint.run(slow, dataclasses.replace(inputs, artifacts=same), tmp_path)
    assert result.metrics["validation_kl_before"] == pytest.approx(0, abs=1e-6)
    assert result.metrics["validation_kl_ratio"] < 0.01


def test_cpt_lowers_perplexity(inputs: StageInputs, tmp_path: Path):
    result = cpt_checkpoint.run(CPT, inputs, tmp_path)
    _require_trained_checkpoint(tmp_path, result, start_dir=inputs["kd_checkpoint"])
    assert result.metrics["validation_perplexity_ratio"] < 0.9


def test_sft_lowers_loss_over_several_epochs(inputs: StageInputs, tmp_path: Path):
    result = sft_checkpoint.run(SFT, inputs, tmp_path)
    _require_trained_checkpoint(tmp_path, result, start_dir=inputs["cpt_checkpoint"])
    assert result.metrics["validation_loss_ratio"] < 0.98
    assert result.metrics["num_epochs"] == pytest.approx(80 / 30)
    assert 0 < result.metrics["trained_token_share"] < 1


def test_interrupted_kd_publishes_the_same_bytes(inputs: StageInputs, tmp_path: Path):
    kd_checkpoint.run(KD, inputs, tmp_path / "straight")
    with pytest.raises(Interrupted):
        kd_checkpoint.run(
            KD, dataclasses.replace(inputs, reporter=InterruptingReporter(at_step=11)), tmp_path / "resumed"
        )
    result = kd_checkpoint.run(KD, inputs, tmp_path / "resumed")
    assert result.metrics["num_resumes"] == 1
    for name in ("model.safetensors", "curve.parquet", "architecture.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_ranks_give_the_trajectory_of_one(inputs: StageInputs, tmp_path: Path, zero_stage: int):
    execution = ExecutionSettings.model_validate(
        {"micro_batch_size": 2, "checkpoint_interval_steps": 8, "zero_stage": zero_stage, "num_threads": 1}
    )
    kd_checkpoint.run(KD, dataclasses.replace(inputs, execution=execution), tmp_path / "one")
    spec = tmp_path / "spec.json"
    spec.write_text(_spec(KD, inputs, execution=execution, out_dir=tmp_path / "two").model_dump_json())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_checked(
        [*launcher, "-m", "pipeline.stages", "kd_checkpoint", "--spec", str(spec)], what="two ranks", timeout_s=240
    )
    one, two = (pl.read_parquet(tmp_path / name / "curve.parquet") for name in ("one", "two"))
    for column in ("loss", "kl", "cosine", "grad_norm"):
        assert two[column].to_list() == pytest.approx(one[column].to_list(), abs=1e-5), column
    result = StageResult.model_validate_json((tmp_path / "two" / "_work" / "result.json").read_bytes())
    assert result.facts["world_size"] == "2"


def _spec(config: Frozen, inputs: StageInputs, *, execution: ExecutionSettings, out_dir: Path) -> StageSpec:
    return StageSpec(
        config_type=config_type_name(config),
        config=config.model_dump(mode="json"),
        artifacts={name: str(path) for name, path in inputs.artifacts.items()},
        store_root=str(inputs.store_root),
        downloads=str(inputs.downloads),
        out_dir=str(out_dir),
        execution=execution,
    )
