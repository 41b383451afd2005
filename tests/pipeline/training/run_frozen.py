"""Places a frozen model at ZeRO 3 and writes what it computes; a program of its own so that several ranks can run it.

python -m torch.distributed.run --nproc_per_node 2 -m tests.pipeline.training.run_frozen CHECKPOINT OUT.safetensors
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.model.checkpoint import load_model
from pipeline.stage import ExecutionSettings
from pipeline.training.distributed import init_distributed, sum_across_ranks
from pipeline.training.frozen import placed_frozen
from tests.pipeline.training.builders import random_tokens

TOKENS_BT = random_tokens(4, 12, seed=0)


def run_at_zero_3(directory: Path) -> dict[str, Tensor]:
    """Return the logits of two passes, and how many values of the model's matrices all ranks hold between them."""
    model = load_model(directory, dtype=torch.float32)
    with placed_frozen(model, precision="fp32", execution=ExecutionSettings(zero_stage=3)), torch.no_grad():
        passes = {f"logits_{index}": model(input_ids=TOKENS_BT, use_cache=False).logits for index in range(2)}
        matrices = [parameter for parameter in model.parameters() if parameter.dim() == 1 and parameter.numel() == 0]
        held = float(sum(parameter.ds_tensor.numel() for parameter in matrices))  # pyright: ignore[reportAttributeAccessIssue]
        device = init_distributed().device
        return {**passes, "num_held": torch.tensor([held, *sum_across_ranks([held], device=device)])}


if __name__ == "__main__":
    found = run_at_zero_3(Path(sys.argv[1]))
    save_file(found, f"{sys.argv[2]}.{init_distributed().rank}")
