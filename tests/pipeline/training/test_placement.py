"""Ranks, ZeRO stage and precision are a matter of placement: one trajectory, and the same exported weights.

All on the model of the recipe `tiny`. Every case is a stage run as the product runs it; one launch per number of ranks
serves all cases, since starting the ranks takes longer than their training.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pytest

from pipeline.architecture import NO_ATTENTION, Architecture, BlockSpec, gqa, swiglu
from pipeline.data.packed import blend_split, long_context_split, save_packed
from pipeline.model.architecture_files import random_architecture
from pipeline.model.checkpoint import TensorReader
from pipeline.processes import run_checked
from pipeline.recipe import (
    DistillationConfig,
    LongContextPhase,
    PretrainingConfig,
    RandomParent,
    SFTConfig,
)
from pipeline.recipe_file import load_recipe
from pipeline.stage import ExecutionSettings, StageInputs
from tests.pipeline.training import run_stages
from tests.pipeline.training.builders import sample_windows, text_windows, write_checkpoint, write_spec

pytestmark = pytest.mark.slow

TINY = load_recipe("tiny")
NUM_TOKENS, NUM_LONG_TOKENS = 32, 64
NUM_STEPS, NUM_LONG_STEPS = 8, 4

StageConfig = DistillationConfig | PretrainingConfig | SFTConfig
KD = TINY.kd.model_copy(update={"tokens": NUM_STEPS * 4 * NUM_TOKENS})
SFT = TINY.sft.model_copy(
    update={"stages": (TINY.sft.stages[0].model_copy(update={"tokens": NUM_STEPS * 4 * NUM_TOKENS}),)}
)
LONG = LongContextPhase(
    sequence_length=NUM_LONG_TOKENS,
    tokens=NUM_LONG_STEPS * 2 * NUM_LONG_TOKENS,
    global_batch_size=2,
    learning_rate=5e-4,
)
IN_BF16 = {"precision": "bf16"}
# <stage>-<case>: the program that runs them takes the stage's name from the first part.
CASES: Mapping[str, tuple[StageConfig, int]] = {
    **{f"kd_checkpoint-zero{stage}": (KD, stage) for stage in (1, 2, 3)},
    **{f"sft_checkpoint-zero{stage}": (SFT, stage) for stage in (1, 2, 3)},
    **{f"kd_checkpoint-long{stage}": (KD.model_copy(update={"long_context": (LONG,)}), stage) for stage in (1, 3)},
    "kd_checkpoint-bf16": (KD.model_copy(update=IN_BF16), 3),
    "sft_checkpoint-bf16": (SFT.model_copy(update=IN_BF16), 2),
}
REFERENCE = "zero1"  # on one rank
LEARNING_RATES = {
    "kd_checkpoint": KD.optimizer.learning_rate,
    "sft_checkpoint": SFT.stages[0].optimizer.learning_rate,
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Run all cases on one rank and on two; return where, by the number of ranks."""
    root = tmp_path_factory.mktemp("placement")
    inputs = _inputs(root)
    places = {}
    for num_ranks in (1, 2):
        places[num_ranks] = root / f"ranks-{num_ranks}"
        specs = [
            write_spec(
                places[num_ranks] / f"{name}.json",
                config,
                dataclasses.replace(
                    inputs,
                    execution=ExecutionSettings.model_validate(
                        {"micro_batch_size": 2, "zero_stage": zero_stage, "num_threads": 1}
                    ),
                ),
                out_dir=places[num_ranks] / name,
            )
            for name, (config, zero_stage) in CASES.items()
        ]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
        command = [*launcher, "-m", run_stages.__name__, *map(str, specs)]
        run_checked(command, what=f"{num_ranks} ranks", timeout_s=280)
    return places


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("stage", ["kd_checkpoint", "sft_checkpoint"])
def test_fp32_training_is_one_trajectory(ran: dict[int, Path], stage: str, zero_stage: int, num_ranks: int):
    found, reference = ran[num_ranks] / f"{stage}-zero{zero_stage}", ran[1] / f"{stage}-{REFERENCE}"
    assert _curve_difference(found, reference, num_steps=NUM_STEPS) <= 1e-5
    _require_same_weights(found, reference, learning_rate=LEARNING_RATES[stage])


@pytest.mark.parametrize("stage", ["kd_checkpoint", "sft_checkpoint"])
def test_zero_1_and_2_on_one_rank_are_equal_to_the_bit(ran: dict[int, Path], stage: str):
    for name in ("curve.parquet", "model.safetensors"):
        one, two = (ran[1] / f"{stage}-zero{zero_stage}" / name for zero_stage in (1, 2))
        assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.parametrize(("zero_stage", "num_ranks"), [(3, 1), (1, 2), (3, 2)])
def test_longer_windows_are_one_trajectory_too(ran: dict[int, Path], zero_stage: int, num_ranks: int):
    found, reference = ran[num_ranks] / f"kd_checkpoint-long{zero_stage}", ran[1] / "kd_checkpoint-long1"
    assert _curve_difference(found, reference, num_steps=NUM_STEPS + NUM_LONG_STEPS) <= 1e-5
    _require_same_weights(found, reference, learning_rate=KD.optimizer.learning_rate)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", ["kd_checkpoint", "sft_checkpoint"])
def test_bf16_training_follows_fp32(ran: dict[int, Path], stage: str, num_ranks: int):
    found = pl.read_parquet(ran[num_ranks] / f"{stage}-bf16" / "curve.parquet")["loss"].to_list()
    exact = pl.read_parquet(ran[1] / f"{stage}-{REFERENCE}" / "curve.parquet")["loss"].to_list()
    assert found == pytest.approx(exact, abs=0.01 * exact[0])
    assert found != exact


def _inputs(root: Path) -> StageInputs:
    assert isinstance(TINY.parent, RandomParent)
    parent = random_architecture(TINY.parent)
    start = write_checkpoint(root / "start", _child(parent), seed=1)  # fp32: nothing is rounded away
    mixture, toggle = root / "mixture", root / "toggle"
    save_packed(mixture, "train", text_windows(NUM_STEPS * 4, num_tokens=NUM_TOKENS))
    save_packed(mixture, "validation", text_windows(4, num_tokens=NUM_TOKENS, seed=9))
    long_windows = text_windows(NUM_LONG_STEPS * 2, num_tokens=NUM_LONG_TOKENS, seed=3)
    save_packed(mixture, long_context_split(NUM_LONG_TOKENS), long_windows)
    save_packed(toggle, blend_split("all"), sample_windows(30, num_tokens=NUM_TOKENS))
    save_packed(toggle, "validation", sample_windows(4, num_tokens=NUM_TOKENS, seed=9))
    return StageInputs(
        artifacts={
            "parent_checkpoint": write_checkpoint(root / "parent", parent, seed=0),
            "fused_checkpoint": start,
            "cpt_checkpoint": start,
            "distillation_mix": mixture,
            "pretraining_mix": mixture,
            "reasoning_toggle_dataset": toggle,
        },
        store_root=root,
        downloads=root,
    )


def _child(parent: Architecture) -> Architecture:
    """Return the first two blocks whole, a narrow one, and the last three fused into one without attention."""
    narrow = BlockSpec(attention=gqa(1), ffn=swiglu(96), parent_layers=(2,))
    fused = BlockSpec(attention=NO_ATTENTION, ffn=swiglu(384), parent_layers=(3, 4, 5))
    return parent.with_blocks([*parent.blocks[:2], narrow, fused])


def _curve_difference(found_dir: Path, expected_dir: Path, *, num_steps: int) -> float:
    """Return the largest difference of any figure of any step: losses, their terms, gradient norms, learning rates."""
    found, expected = (pl.read_parquet(directory / "curve.parquet") for directory in (found_dir, expected_dir))
    assert found.columns == expected.columns
    assert found.height == expected.height == num_steps
    return max(float((found[column] - expected[column]).abs().max()) for column in found.columns)  # pyright: ignore[reportArgumentType]


def _require_same_weights(found_dir: Path, expected_dir: Path, *, learning_rate: float) -> None:
    """Compare every exported weight: a tensor's mean, and how far single weights may lie.

    AdamW's first steps are signs: of a gradient of 5e-9, which is rounding, it makes a good part of a learning rate.
    Which weights have such a gradient is the processor's own matter, so few of them are let go, and not far: of the
    221,696 here one lies beyond a twentieth of a learning rate on an EPYC and none on a Xeon, the farthest 8.3e-5 away
    where fp32 itself is 7.5e-4 from float64.
    """
    found, expected = TensorReader(found_dir), TensorReader(expected_dir)
    assert found.names == expected.names
    num_weights = num_far = 0
    for name in expected.names:
        difference = (found.read(name) - expected.read(name)).abs()
        assert difference.mean() <= 1e-7, name
        assert difference.max() <= min(learning_rate / 5, 1.5e-4), name
        num_weights += difference.numel()
        num_far += int((difference > learning_rate / 20).sum())
    assert num_far <= num_weights / 50_000
