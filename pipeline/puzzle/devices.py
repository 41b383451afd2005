"""Where Puzzle's stages compute: device and its rates, threads, autocast, and the share of one rank among several."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import nn

from pipeline.architecture import Architecture
from pipeline.devices import Device
from pipeline.model.checkpoint import TORCH_DTYPES
from pipeline.recipe import Precision
from pipeline.training.distributed import init_distributed

# The fastest of so many products counts, so that a moment's load does not.
NUM_TRIALS = 30
# Of this machine's own rates: a product of square matrices, a copy, and calls that have next to nothing to do. A GPU
# takes less for the smaller product than for starting it.
_MATMUL_SIZES = {"cpu": 2048, "cuda": 8192}
_COPY_BYTES = 2**28
_NUM_RATE_TRIALS = 7
_NUM_SMALL_CALLS = 1000

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Ranks:
    """This process among the ranks that run the same stage; alone where no launcher started it."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.size > 1:
            # Only then: joining a group imports DeepSpeed, which costs seconds.
            world = init_distributed()
            self.rank, self.device = world.rank, world.device


def place(model: ModuleT, device: torch.device) -> ModuleT:
    """Move a module to a device and return it as what it was."""
    module: nn.Module = model  # transformers types its own `to` as taking no device
    module.to(device)
    return model


@contextmanager
def num_threads(count: int | None) -> Iterator[None]:
    """Let torch use that many threads (None: leave it as it is), and give it back what it had."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def matmul_peak(architecture: Architecture, *, num_tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the best FLOP/s of matrix products of the parent FFN's two shapes over that many tokens."""
    width = architecture.homogeneous_block().ffn.intermediate_size
    assert width is not None
    best = 0.0
    for inner, outer in ((architecture.hidden_size, width), (width, architecture.hidden_size)):
        left = torch.randn(num_tokens, inner, dtype=dtype, device=device)
        right = torch.randn(outer, inner, dtype=dtype, device=device)
        for _ in range(NUM_TRIALS):
            began = time.perf_counter()
            torch.nn.functional.linear(left, right)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 2.0 * num_tokens * inner * outer / (time.perf_counter() - began))
    return best


def measure_this_machine(precision: Precision) -> Device:
    """Measure the matmul peak in a precision, the copy bandwidth and the time of an empty kernel here; a few seconds.

    The fastest of seven trials each, so that a moment's load does not count.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = _MATMUL_SIZES[device.type]
    left = torch.randn(size, size, device=device).to(TORCH_DTYPES[precision])
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target, small = torch.empty_like(source), torch.ones(1, device=device)

    def fastest_s(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(_NUM_RATE_TRIALS):
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    def many_small_calls() -> None:
        for _ in range(_NUM_SMALL_CALLS):
            torch.add(small, small)

    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Device(
        name="this machine, measured",
        peak_flops_per_s=2 * size**3 / fastest_s(lambda: left @ left),
        bandwidth_bytes_per_s=2 * _COPY_BYTES / fastest_s(lambda: target.copy_(source)),
        memory_bytes=memory,
        kernel_s=fastest_s(many_small_calls) / _NUM_SMALL_CALLS,
    )
