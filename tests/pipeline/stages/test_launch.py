"""The commands of stage processes, and what is refused before one starts; tests/slurm runs those of Slurm."""

import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.execution import require_runtimes
from pipeline.hardware import num_cpus
from pipeline.processes import run_checked
from pipeline.stage import ExecutionSettings
from pipeline.stages.launch import child_environment, missing_allocation, stage_command
from pipeline.stages.registry import get_stage
from tests.dagster.stores import open_tiny
from tests.pipeline.stages import listening

SPEC = Path("spec.json")
IN_A_JOB = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "SLURM_JOB_NUM_NODES": "2"}
TWO_NODES = ExecutionSettings(launcher="slurm", num_nodes=2, num_ranks=16, srun_options=("--network=ib",))


def test_ranks_on_this_machine_are_torchruns_and_a_stage_of_one_rank_is_not():
    execution = ExecutionSettings(num_ranks=8)
    training = stage_command(execution, get_stage("kd_checkpoint"), SPEC)
    assert training[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "8"]
    assert stage_command(execution, get_stage("block_scores"), SPEC)[:3] == [sys.executable, "-m", "pipeline.stages"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_on_this_machine_listen_to_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What launcher and ranks listen on, as the kernel has it; torchrun alone takes ports of every interface."""
    execution = ExecutionSettings(num_ranks=2, num_threads=1)
    command = stage_command(execution, get_stage("kd_checkpoint"), tmp_path / "spec.json")
    own = [*command[: command.index("pipeline.stages")], listening.__name__, str(tmp_path / "seen")]
    for name, value in child_environment(execution).items():
        monkeypatch.setenv(name, value)
    run_checked(own, what="two ranks", timeout_s=240)
    seen = [line.split() for rank in (0, 1) for line in (tmp_path / f"seen-{rank}").read_text().splitlines()]
    assert {whose for whose, _ in seen} >= {"rank"}
    assert [address for _, address in seen if not address.startswith(("127.", "::1"))] == []


def test_one_rank_under_slurm_is_started_by_srun_too(monkeypatch: pytest.MonkeyPatch):
    for name, value in IN_A_JOB.items():
        monkeypatch.setenv(name, value)
    one = ExecutionSettings(launcher="slurm")
    assert stage_command(one, get_stage("kd_checkpoint"), SPEC)[:2] == ["srun", "--nodes=1"]
    assert stage_command(one, get_stage("evaluation"), SPEC)[:3] == [sys.executable, "-m", "pipeline.stages"]


def test_ranks_on_nodes_are_one_torchrun_each_that_meet_here(monkeypatch: pytest.MonkeyPatch):
    for name, value in IN_A_JOB.items():
        monkeypatch.setenv(name, value)
    command = stage_command(TWO_NODES, get_stage("kd_checkpoint"), SPEC)
    of_srun, of_torchrun = command[: command.index(sys.executable)], command[command.index(sys.executable) :]
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1", "--network=ib"} < set(of_srun)
    options = dict(itertools.pairwise(of_torchrun))
    assert (options["--nnodes"], options["--nproc_per_node"]) == ("2", "8")
    host, _, port = options["--rdzv_endpoint"].partition(":")
    assert host == os.uname().nodename
    assert 0 < int(port) < 65536


def test_threads_are_shared_among_the_ranks_of_a_node():
    environment = child_environment(ExecutionSettings(launcher="slurm", num_nodes=3, num_ranks=3))
    assert environment["OMP_NUM_THREADS"] == str(num_cpus())
    environment = child_environment(ExecutionSettings(launcher="slurm", num_nodes=3, num_ranks=3 * 4096))
    assert environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "no node of a Slurm job"),
        ({"SLURM_JOB_ID": "7"}, "no node of a Slurm job"),  # a login node, by salloc
        ({**IN_A_JOB, "SLURM_JOB_NUM_NODES": "1"}, r"has 1 nodes, execution\.num_nodes is 2"),
        (IN_A_JOB, None),
    ],
)
def test_ranks_are_refused_outside_a_job_of_so_many_nodes(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], told: str | None, tmp_path: Path
):
    for name in IN_A_JOB:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    workspace = replace(open_tiny(tmp_path), execution=TWO_NODES.model_copy(update={"num_ranks": 4}))
    require_runtimes(workspace, ["block_scores", "evaluation"], target="fused")
    if told is None:
        require_runtimes(workspace, ["kd_checkpoint"], target="fused")
        return
    with pytest.raises(StageError, match=f"kd_checkpoint starts its ranks by srun .* {told}.*sbatch --nodes=2"):
        require_runtimes(workspace, ["block_scores", "kd_checkpoint"], target="fused")
    with pytest.raises(StageError, match=told):
        stage_command(TWO_NODES, get_stage("kd_checkpoint"), SPEC)


def test_other_launchers_need_no_job(monkeypatch: pytest.MonkeyPatch):
    for name in IN_A_JOB:
        monkeypatch.delenv(name, raising=False)
    assert missing_allocation(ExecutionSettings(num_ranks=8)) is None


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("0", "0")])
def test_stage_processes_fetch_nothing_unless_they_are_told_to(
    monkeypatch: pytest.MonkeyPatch, given: str | None, found: str
):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if given is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", given)
    assert child_environment(ExecutionSettings())["HF_HUB_OFFLINE"] == found
