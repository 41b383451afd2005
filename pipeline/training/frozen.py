"""Models of a training as they come from disk, and those that run beside it: whole on every rank, or split at ZeRO 3.

    teacher = load_for_training(directory, precision="bf16", execution=inputs.execution)
    with placed_frozen(teacher, precision="bf16", execution=inputs.execution):
        logits_BTV = teacher(**batch.model_inputs()).logits

Where it is split, every rank must run it at the same time.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.model.checkpoint import TORCH_DTYPES, load_model, unread_model
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.recipe import Precision
from pipeline.stage import ExecutionSettings
from pipeline.training.distributed import init_distributed
from pipeline.training.engine import close_deepspeed, zero_config


def load_for_training(
    directory: Path, *, precision: Precision, execution: ExecutionSettings
) -> HeterogeneousLlamaForCausalLM:
    """Return a checkpoint's model on the CPU, to be given to TrainEngine.create or placed_frozen.

    At ZeRO 3 DeepSpeed sends rank 0's weights to all ranks, one tensor at a time, before it splits them. So rank 0
    alone reads them; the others' have a shape, and no memory until then: no host holds 253 B parameters eight times.

    Raises:
        CheckpointError: see pipeline.model.checkpoint.load_model.
    """
    dtype = TORCH_DTYPES[precision]
    if execution.zero_stage == 3 and init_distributed().rank > 0:
        return unread_model(directory, dtype=dtype)
    return load_model(directory, dtype=dtype)


@contextlib.contextmanager
def placed_frozen(model: nn.Module, *, precision: Precision, execution: ExecutionSettings) -> Iterator[None]:
    """Put a model on the rank's device, in evaluation mode and without gradients, for as long as the context lasts.

    At ZeRO 3 each rank keeps its part of every matrix, and a layer is whole only while it runs; the model goes to the
    device one tensor at a time, and computes what it would compute whole, bit for bit. It is of no use afterwards.
    """
    world = init_distributed()
    model.eval().requires_grad_(False)
    if execution.zero_stage < 3:
        nn.Module.to(model, world.device)  # transformers types its own `to` as taking no device
        yield
        return
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and read by trainings alone
        "zero_optimization": zero_config(model, zero_stage=3),
        "bf16": {"enabled": precision == "bf16"},
    }
    # Before the engine, which would move the whole model to the device before it splits it.
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    nn.Module.to(model, world.device)  # the buffers
    engine, *_ = deepspeed.initialize(model=model, config=config)
    try:
        yield
    finally:
        close_deepspeed(engine)
