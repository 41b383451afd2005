"""The three stages end to end on tiny checkpoints: outputs, metrics, resume, ranks."""

import dataclasses
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from pipeline.architecture import Frozen
from pipeline.data.packed import long_context_split, save_packed
from pipeline.model.checkpoint import TensorReader, load_model, read_architecture
from pipeline.processes import run_checked
from pipeline.progress import SilentReporter
from pipeline.recipe import DistillationConfig, LongContextPhase, PretrainingConfig, SFTConfig
from pipeline.stage import ExecutionSettings, StageInputs, StageResult
from pipeline.stages import cpt_checkpoint, kd_checkpoint, sft_checkpoint
from pipeline.stages.spec import StageSpec, config_type_name
from tests.pipeline.training import run_stages
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
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_and_zero_stages_give_one_trajectory_and_the_same_weights(
    inputs: StageInputs, tmp_path: Path, num_ranks: int
):
    """KD and SFT, fp32, at ZeRO 1, 2 and 3, against ZeRO 1 on one rank."""
    start = write_checkpoint(tmp_path / "start", child_architecture(), seed=1)  # fp32: nothing is rounded away
    artifacts = {**inputs.artifacts, "fused_checkpoint": start, "cpt_checkpoint": start}
    placed = dataclasses.replace(inputs, artifacts=artifacts)
    configs: dict[str, Frozen] = {"kd_checkpoint": KD, "sft_checkpoint": SFT.model_copy(update={"precision": "fp32"})}

    def settings(zero_stage: int) -> ExecutionSettings:
        return ExecutionSettings.model_validate({"micro_batch_size": 2, "zero_stage": zero_stage, "num_threads": 1})

    specs = []
    for stage_name, config in configs.items():
        for zero_stage in (1, 2, 3):
            spec = tmp_path / f"{stage_name}-zero{zero_stage}.json"
            out_dir = tmp_path / spec.stem
            text = _spec(config, placed, execution=settings(zero_stage), out_dir=out_dir).model_dump_json()
            spec.write_text(text, encoding="utf-8")
            specs.append(str(spec))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    run_checked([*launcher, "-m", run_stages.__name__, *specs], what=f"{num_ranks} ranks", timeout_s=280)
    kd_checkpoint.run(KD, dataclasses.replace(placed, execution=settings(1)), tmp_path / "kd_checkpoint-one")
    sft_config = configs["sft_checkpoint"]
    assert isinstance(sft_config, SFTConfig)
    sft_checkpoint.run(sft_config, dataclasses.replace(placed, execution=settings(1)), tmp_path / "sft_checkpoint-one")

    for stage_name in configs:
        one = pl.read_parquet(tmp_path / f"{stage_name}-one" / "curve.parquet")
        weights = TensorReader(tmp_path / f"{stage_name}-one")
        for zero_stage in (1, 2, 3):
            found_dir = tmp_path / f"{stage_name}-zero{zero_stage}"
            found = pl.read_parquet(found_dir / "curve.parquet")
            assert found.columns == one.columns
            for column in one.columns:
                assert found[column].to_list() == pytest.approx(one[column].to_list(), abs=1e-5), (found_dir, column)
            reader = TensorReader(found_dir)
            assert reader.names == weights.names
            for name in weights.names:
                torch.testing.assert_close(reader.read(name), weights.read(name), rtol=0, atol=2e-5)


LONG = LongContextPhase(sequence_length=32, tokens=6 * 2 * 32, global_batch_size=2, learning_rate=5e-4)


def _with_long_windows(inputs: StageInputs, root: Path) -> StageInputs:
    mixture = root / "long-mixture"
    save_packed(mixture, "train", text_windows(80))
    save_packed(mixture, "validation", text_windows(6, seed=9))
    save_packed(mixture, long_context_split(32), text_windows(12, num_tokens=32, seed=3))
    start = write_checkpoint(root / "start", child_architecture(), seed=1)  # fp32, as between two phases
    return dataclasses.replace(
        inputs, artifacts={**inputs.artifacts, "pretraining_mix": mixture, "kd_checkpoint": start}
    )


def test_long_windows_are_a_training_of_their_own_behind_the_first(inputs: StageInputs, tmp_path: Path):
    placed = _with_long_windows(inputs, tmp_path)
    both = CPT.model_copy(update={"long_context": (LONG,)})
    result = cpt_checkpoint.run(both, placed, tmp_path / "both")

    cpt_checkpoint.run(CPT, placed, tmp_path / "first")
    only_long = tmp_path / "only-long"
    save_packed(only_long, "train", text_windows(12, num_tokens=32, seed=3))
    save_packed(only_long, "validation", text_windows(6, seed=9))
    second = CPT.model_copy(
        update={
            "tokens": LONG.tokens,
            "global_batch_size": LONG.global_batch_size,
            "optimizer": OPTIMIZER.model_copy(update={"learning_rate": LONG.learning_rate}),
        }
    )
    # A micro-batch of the long windows holds as many tokens as one of the short ones.
    alone = dataclasses.replace(
        placed,
        artifacts={**placed.artifacts, "pretraining_mix": only_long, "kd_checkpoint": tmp_path / "first"},
        execution=placed.execution.model_copy(update={"micro_batch_size": 1}),
    )
    cpt_checkpoint.run(second, alone, tmp_path / "second")

    weights, expected = TensorReader(tmp_path / "both"), TensorReader(tmp_path / "second")
    assert all(torch.equal(weights.read(name), expected.read(name)) for name in expected.names)
    curve = pl.read_parquet(tmp_path / "both" / "curve.parquet")
    assert curve["step"].to_list() == list(range(1, 27))
    assert curve["tokens"][-1] == CPT.tokens + LONG.tokens == result.metrics["num_tokens"]
    assert curve["loss"][20:].to_list() == pl.read_parquet(tmp_path / "second" / "curve.parquet")["loss"].to_list()


@pytest.mark.parametrize("phase", [16, 32])
def test_a_training_interrupted_in_either_phase_publishes_the_same_bytes(
    inputs: StageInputs, tmp_path: Path, phase: int
):
    class InterruptingPhase(SilentReporter):
        def step(self, step: int, total: int, /, *, what: str, **metrics: float) -> None:
            if step == 5 and f"{phase} tokens a window" in what:
                raise Interrupted

    placed = _with_long_windows(inputs, tmp_path)
    placed = dataclasses.replace(placed, execution=placed.execution.model_copy(update={"checkpoint_interval_steps": 2}))
    config = CPT.model_copy(update={"long_context": (LONG,)})
    cpt_checkpoint.run(config, placed, tmp_path / "straight")
    with pytest.raises(Interrupted):
        cpt_checkpoint.run(config, dataclasses.replace(placed, reporter=InterruptingPhase()), tmp_path / "resumed")
    result = cpt_checkpoint.run(config, placed, tmp_path / "resumed")
    assert result.metrics["num_resumes"] == 1
    for name in ("model.safetensors", "curve.parquet"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


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
