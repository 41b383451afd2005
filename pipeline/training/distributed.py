"""The process group: a world of one without a launcher, gloo ranks under torchrun, GPUs with nccl. One code path.

Belongs here: starting the group once per process, its threads, and the few collectives the trainings use. DeepSpeed is
imported inside functions because its accelerator is chosen by the environment at import, and because it costs seconds.
"""

import atexit
import logging
import os
import socket
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Ranks wait for one that writes hundreds of gigabytes, for which DeepSpeed's ten minutes are few. A rank whose partner
# has died is ended by its launcher.
_LONGEST_WAIT = timedelta(days=1)
LONGEST_CACHE_S = 120.0  # NFS keeps what it knows of a directory for 60 s by default
_LOOPBACK = "127.0.0.1"
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among its ranks, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device


def init_distributed() -> World:
    """Join the launcher's process group, or make one of a single rank without a port; later calls change nothing.

    The group lives until the process ends: DeepSpeed cannot be initialised a second time in one process.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not dist.is_initialized():
        _start_group(on_gpu=on_gpu)
    local_rank = int(os.environ["LOCAL_RANK"])
    return World(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"),
    )


def use_threads(count: int | None) -> None:
    """Let torch use that many threads in this process from here on; None leaves it as it is."""
    if count is not None:
        torch.set_num_threads(count)


def sum_across_ranks(values: list[float], *, device: torch.device) -> list[float]:
    """Return the elementwise sums over all ranks, added in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather_across_ranks(value: str) -> list[str]:
    """Return one string of every rank, in rank order."""
    gathered: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def told_by_rank_0(value: str) -> str:
    """Return rank 0's string on every rank.

    What is on a disk of the network looks different from another node for as long as that node's cache is old, so one
    rank decides what a resume begins with.
    """
    return gather_across_ranks(value)[0]


def barrier() -> None:
    """Wait until every rank is here."""
    dist.barrier()


def _start_group(*, on_gpu: bool) -> None:
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates: one warning per call, hundreds of lines.
    warnings.filterwarnings(
        "ignore",
        message=r".*torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor).*",
        category=FutureWarning,
    )
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not on_gpu:
        # Otherwise init_distributed compiles this op: 64 CPU-seconds, a C++ compiler, and a lock file that hangs every
        # later process when the build is killed. gloo was as fast at the sizes measured.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if not all(name in os.environ for name in _LAUNCHER_VARIABLES):
        os.environ["LOCAL_RANK"] = "0"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    else:
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if os.environ["MASTER_ADDR"] == _LOOPBACK:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            store = _loopback_store(rank, world_size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_LONGEST_WAIT)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=_LONGEST_WAIT)
    if dist.get_world_size() > 1:
        atexit.register(_let_gloo_finish)


def _loopback_store(rank: int, world_size: int) -> Any:
    """Return the ranks' store on this machine's loopback; left to itself, rank 0 listens on every interface."""
    make_store: Any = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    port, is_master = int(os.environ["MASTER_PORT"]), rank == 0
    listening: dict[str, int] = {}
    if is_master:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_LOOPBACK, port))
        listener.listen(2 * world_size)
        listening["master_listen_fd"] = listener.detach()
    return make_store(_LOOPBACK, port, world_size, is_master=is_master, timeout=_LONGEST_WAIT, **listening)


def _let_gloo_finish() -> None:
    """Give gloo's threads time to drop the tensors of the last collective, while this one waits without the GIL.

    Such a thread that asks for the GIL when the interpreter is already ending aborts the process: five times in twelve
    on two busy cores, after all its work was done.
    """
    time.sleep(0.5)
