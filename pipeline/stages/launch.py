"""The command and the environment of a stage's process: alone, as ranks on this machine, or on nodes of a Slurm job.

    local    python -m torch.distributed.run --nnodes 1 --nproc_per_node R ... -m pipeline.stages NAME --spec FILE
    slurm    srun, one task a node:  python -m torch.distributed.run --nnodes N --nproc_per_node R/N ...

Stages of one rank run here in any case, without srun: whoever starts them is on a node of the job. Ranks of one machine
meet over a file and talk over its loopback interface: torchrun's own store listens to every machine, without asking
who calls, and what it holds is unpickled.
"""

import os
import socket
import sys
import uuid
from pathlib import Path

from pipeline.errors import StageError
from pipeline.hardware import num_cpus
from pipeline.stage import ExecutionSettings
from pipeline.stages.registry import Stage

_MEETING_TIMEOUT_S = 600

REPOSITORY = Path(__file__).resolve().parents[2]


def stage_command(execution: ExecutionSettings, stage: Stage, spec_path: Path) -> list[str]:
    """Return the command of a stage process; training stages run on every rank, the others on one.

    Raises:
        StageError: when ranks are to be started by srun and this is no node of a job of so many.
    """
    arguments = ["-m", "pipeline.stages", stage.name, "--spec", str(spec_path)]
    if not stage.runs_on_all_ranks or (execution.num_ranks == 1 and execution.launcher == "local"):
        return [sys.executable, *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    ranks = ["--nproc_per_node", str(execution.ranks_per_node)]
    if execution.launcher == "local":
        return [*torchrun, *ranks, *meeting_on_this_machine(spec_path.parent), *arguments]
    told = missing_allocation(execution)
    if told is not None:
        raise StageError(f"{stage.name}: {told}")
    # The torchruns meet at this node, which the job's script runs on.
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{socket.gethostname()}:{_free_port()}"]
    meeting += ["--rdzv_id", f"{stage.name}-{os.getpid()}"]
    # Nodes import torch from a shared disk at speeds of their own; a minute is given unless asked for more.
    meeting += ["--rdzv_conf", f"read_timeout={_MEETING_TIMEOUT_S}"]
    return [*_srun(execution), *torchrun, "--nnodes", str(execution.num_nodes), *ranks, *meeting, *arguments]


def meeting_on_this_machine(directory: Path) -> list[str]:
    """Return torchrun's options with which ranks meet over a new file in `directory`, and on no port."""
    name = f"meeting-{uuid.uuid4().hex}"
    return [
        *("--nnodes", "1", "--local_addr", "127.0.0.1"),
        *("--rdzv_backend", "c10d", "--rdzv_conf", "store_type=file"),
        *("--rdzv_endpoint", str(directory / name), "--rdzv_id", name),
    ]


def missing_allocation(execution: ExecutionSettings) -> str | None:
    """Return why this process cannot start ranks under Slurm, and what to do; None where it can or need not."""
    if execution.launcher != "slurm":
        return None
    submit = f"submit the command by `sbatch --nodes={execution.num_nodes}`, see docs/cluster.md"
    if not {"SLURM_JOB_ID", "SLURMD_NODENAME"} <= os.environ.keys():
        return f"this is no node of a Slurm job (SLURM_JOB_ID and SLURMD_NODENAME are not both set): {submit}"
    num_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if num_nodes < execution.num_nodes:
        return f"the Slurm job has {num_nodes} nodes, execution.num_nodes is {execution.num_nodes}: {submit}"
    return None


def child_environment(execution: ExecutionSettings) -> dict[str, str]:
    """Return what a stage process finds in its environment beside what is there."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # libgomp's spinning threads slowed a shared 2-core machine up to 80 times
        # glibc would map every large tensor anew and unmap it at once: a fault for each page, 12% of scoring's time.
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "TOKENIZERS_PARALLELISM": "false",
        # What a stage process reads is in the store; nothing is looked up behind its back, unless it is told to.
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    }
    if execution.launcher == "local" and execution.num_ranks > 1:
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment[name] = os.environ.get(name, loopback)
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = (
            "1"  # the file is torchrun's; ranks have a store of their own
        )
    num_threads = execution.num_threads
    if num_threads is None and execution.num_ranks > 1:
        num_threads = max(1, num_cpus() // execution.ranks_per_node)  # torchrun's own default is one
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment


def _srun(execution: ExecutionSettings) -> list[str]:
    nodes = str(execution.num_nodes)
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        f"--nodelist={os.environ['SLURMD_NODENAME']}",  # this one among them, where they meet
        "--overlap",  # where this is itself a step, as in a shell that srun opened, it would wait for itself
        "--label",  # which node said it
        "--cpu-bind=none",  # a task is bound to one core otherwise, and with it all ranks below it
        "--export=ALL",  # even where the job was submitted without its environment
        "--kill-on-bad-exit=1",
        *execution.srun_options,
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
