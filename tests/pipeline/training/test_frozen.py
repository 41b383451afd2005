"""A model beside a training: split over the ranks it computes what it computes whole, and no rank holds it all."""

import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from pipeline.model.checkpoint import load_model
from pipeline.processes import run_checked
from pipeline.recipe import Precision
from pipeline.stage import ExecutionSettings
from pipeline.training.frozen import placed_frozen
from tests.pipeline.training import run_frozen
from tests.pipeline.training.builders import parent_architecture, write_checkpoint
from tests.pipeline.training.run_frozen import TOKENS_BT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "teacher", parent_architecture(), seed=0)


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_placed_model_computes_the_same_bits(directory: Path, precision: Precision, zero_stage: Literal[1, 3]):
    execution = ExecutionSettings(zero_stage=zero_stage)
    whole, placed = (load_model(directory, dtype=DTYPES[precision]) for _ in range(2))
    with torch.no_grad(), placed_frozen(placed, precision=precision, execution=execution):
        for _ in range(2):
            got = placed(input_ids=TOKENS_BT, use_cache=False).logits
            assert torch.equal(got, whole(input_ids=TOKENS_BT, use_cache=False).logits)
        matrix = placed.get_parameter("model.layers.0.mlp.up_proj.weight")
        assert (matrix.numel() == 0) == (zero_stage == 3)  # whole only while it runs
        assert not any(parameter.requires_grad for parameter in placed.parameters())


@pytest.mark.slow
def test_two_ranks_hold_half_of_every_matrix_each_and_compute_the_same_bits(directory: Path, tmp_path: Path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    out = tmp_path / "found"
    run_checked([*launcher, "-m", run_frozen.__name__, str(directory), str(out)], what="two ranks", timeout_s=120)
    whole = load_model(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(input_ids=TOKENS_BT, use_cache=False).logits
    num_values = sum(parameter.numel() for parameter in whole.parameters() if parameter.ndim == 2)
    for rank in range(2):
        found = load_file(f"{out}.{rank}")
        assert found["num_held"].tolist() == [num_values / 2, num_values]
        assert torch.equal(found["logits_0"], expected)
        assert torch.equal(found["logits_1"], expected)
