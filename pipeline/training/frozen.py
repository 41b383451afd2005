"""Models that run beside a training and are not trained: whole on every rank, or split over the ranks at ZeRO 3.

    with placed_frozen(teacher, precision="bf16", execution=inputs.execution):
        logits_BTV = teacher(**batch.model_inputs()).logits

Where it is split, every rank must run it at the same time.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from pipeline.recipe import Precision
from pipeline.stage import ExecutionSettings
from pipeline.training.distributed import init_distributed
from pipeline.training.engine import zero_config


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
        engine.destroy()
