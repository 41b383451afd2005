"""Opening a checkpoint for training: bf16 keeps every digit of the fp32 weights that the stage before it exported."""

import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from pipeline.model.checkpoint import TensorReader, load_model
from pipeline.processes import run_checked
from pipeline.progress import SilentReporter
from pipeline.training.engine import TrainEngine
from tests.pipeline.training import export_untrained
from tests.pipeline.training.builders import child_architecture, random_tokens, write_checkpoint
from tests.pipeline.training.export_untrained import LEARNING_RATE, export_without_steps, open_bf16

ZERO_STAGES = pytest.mark.parametrize("zero_stage", [1, 2, 3])


@pytest.fixture
def start_dir(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "start", child_architecture(), seed=1)


def take_step(engine: TrainEngine) -> None:
    tokens_BT = random_tokens(4 // engine.world_size, 12, seed=0)
    engine.backward(engine.forward(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss)
    engine.step()


@ZERO_STAGES
def test_bf16_engine_exports_the_fp32_weights_it_was_opened_on(
    start_dir: Path, tmp_path: Path, zero_stage: Literal[1, 2, 3]
):
    export_without_steps(start_dir, tmp_path / "out", zero_stage=zero_stage)
    started, ended = TensorReader(start_dir), TensorReader(tmp_path / "out")
    assert ended.names == started.names  # tied: no head
    for name in started.names:
        assert torch.equal(ended.read(name), started.read(name)), name
    embedding = started.read("model.embed_tokens.weight")
    assert not torch.equal(embedding, embedding.bfloat16().float())  # else the test shows nothing


@ZERO_STAGES
def test_bf16_step_moves_the_fp32_weights_by_the_update_alone(start_dir: Path, zero_stage: Literal[1, 2, 3]):
    engine = open_bf16(start_dir, zero_stage=zero_stage)
    take_step(engine)
    exported = dict(engine.exported_tensors())
    engine.close()
    started = TensorReader(start_dir)
    for name, tensor in exported.items():
        moved = (tensor - started.read(name)).abs()
        assert 0 < moved.max() <= 1.2 * LEARNING_RATE, name  # rounding to bf16 would move weights by 1e-3


def test_bf16_model_computes_with_the_rounded_weights_before_and_after_a_resume(start_dir: Path, tmp_path: Path):
    engine = open_bf16(start_dir, zero_stage=1)
    rounded = load_model(start_dir, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in engine.model.state_dict().items())
    take_step(engine)
    stepped = dict(engine.exported_tensors())
    engine.save(tmp_path / "checkpoints", {})
    engine.close()
    again = open_bf16(start_dir, zero_stage=1)
    again.load_latest(tmp_path / "checkpoints", reporter=SilentReporter())
    resumed = dict(again.exported_tensors())
    again.close()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in stepped.items())


@pytest.mark.slow
@ZERO_STAGES
def test_bf16_engine_of_two_ranks_exports_the_fp32_weights(tmp_path: Path, zero_stage: Literal[1, 2, 3]):
    """Vocabulary and hidden size are odd: the ranks' parts are padded."""
    odd = child_architecture().model_copy(update={"vocab_size": 97, "hidden_size": 31})
    start_dir = write_checkpoint(tmp_path / "start", odd, seed=1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(start_dir), str(tmp_path / "out"), str(zero_stage)]
    run_checked([*launcher, "-m", export_untrained.__name__, *arguments], what="two ranks", timeout_s=240)
    started, ended = TensorReader(start_dir), TensorReader(tmp_path / "out")
    for name in started.names:
        assert torch.equal(ended.read(name), started.read(name)), name
