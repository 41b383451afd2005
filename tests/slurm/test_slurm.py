"""Trainings spread over the nodes of a real Slurm job: the same bytes as on one node, and nothing left behind."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.artifacts import PROGRESS
from pipeline.data.packed import save_packed
from pipeline.recipe import DistillationConfig
from pipeline.stage import ExecutionSettings, StageInputs
from tests.pipeline.training.builders import (
    KD,
    child_architecture,
    parent_architecture,
    text_windows,
    write_checkpoint,
    write_spec,
)
from tests.slurm.conftest import NODES, Cluster

SHORT_KD = KD.model_copy(update={"tokens": 6 * 4 * 16, "precision": "bf16"})
# Many minutes, were it not ended.
NUM_LONG_STEPS = 20_000
LONG_KD = SHORT_KD.model_copy(update={"tokens": NUM_LONG_STEPS * 4 * 16})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> StageInputs:
    root = tmp_path_factory.mktemp("inputs")
    mixture = root / "mixture"
    save_packed(mixture, "train", text_windows(NUM_LONG_STEPS * 4))
    save_packed(mixture, "validation", text_windows(6, seed=9))
    return StageInputs(
        artifacts={
            "parent_checkpoint": write_checkpoint(root / "parent", parent_architecture(), seed=0),
            "fused_checkpoint": write_checkpoint(root / "child", child_architecture(), seed=1),
            "distillation_mix": mixture,
        },
        store_root=root,
        downloads=root,
    )


def submit_kd(
    cluster: Cluster,
    inputs: StageInputs,
    out_dir: Path,
    *,
    config: DistillationConfig = SHORT_KD,
    then: str | None = None,
    **execution: object,
) -> tuple[str, Path]:
    settings = ExecutionSettings.model_validate({"micro_batch_size": 1, "num_threads": 1, **execution})
    spec = write_spec(
        out_dir.with_suffix(".json"), config, dataclasses.replace(inputs, execution=settings), out_dir=out_dir
    )
    command = [sys.executable, "-m", "tests.slurm.run_stage_here", "kd_checkpoint", str(spec)]
    return cluster.submit(command, num_nodes=settings.num_nodes, then=then)


def test_ranks_on_two_nodes_publish_the_bytes_of_two_ranks_on_one(
    cluster: Cluster, inputs: StageInputs, tmp_path: Path
):
    jobs = {
        "one": submit_kd(cluster, inputs, tmp_path / "one", num_ranks=2, zero_stage=3),
        "two": submit_kd(cluster, inputs, tmp_path / "two", launcher="slurm", num_nodes=2, num_ranks=2, zero_stage=3),
    }
    for job, output in jobs.values():
        assert cluster.wait(job, timeout_s=120) == "COMPLETED", output.read_text()
    assert nodes_of_steps(cluster, jobs["two"][0]) == {"n1", "n2"}
    for name in ("model.safetensors", "curve.parquet"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_a_torchrun_that_dies_on_one_node_ends_the_stage_on_all(cluster: Cluster, inputs: StageInputs, tmp_path: Path):
    job, output = submit_kd(
        cluster, inputs, tmp_path / "out", config=LONG_KD, launcher="slurm", num_nodes=2, num_ranks=2
    )
    ranks = wait_for_ranks(tmp_path / "out")
    os.kill(parent_of(ranks[0]), 9)
    assert cluster.wait(job, timeout_s=90) == "FAILED"
    assert "kd_checkpoint ended with exit code" in output.read_text()
    assert wait_until(lambda: not processes_of(tmp_path / "out"))


def test_a_cancelled_job_leaves_no_rank_on_any_node(cluster: Cluster, inputs: StageInputs, tmp_path: Path):
    job, _ = submit_kd(cluster, inputs, tmp_path / "out", config=LONG_KD, launcher="slurm", num_nodes=2, num_ranks=2)
    wait_for_ranks(tmp_path / "out")
    cluster.call("scancel", job)
    assert wait_until(lambda: not processes_of(tmp_path / "out"))


def test_ranks_end_when_what_started_them_is_killed_and_the_job_goes_on(
    cluster: Cluster, inputs: StageInputs, tmp_path: Path
):
    job, _ = submit_kd(
        cluster, inputs, tmp_path / "out", config=LONG_KD, then="sleep 300", launcher="slurm", num_nodes=2, num_ranks=2
    )
    wait_for_ranks(tmp_path / "out")
    (starter,) = processes_with("tests.slurm.run_stage_here", str(tmp_path / "out.json"))
    os.kill(starter, 9)
    assert wait_until(lambda: not processes_of(tmp_path / "out"))
    assert cluster.state(job) == "RUNNING"
    cluster.call("scancel", job)


def nodes_of_steps(cluster: Cluster, job: str) -> set[str]:
    """Return the nodes on which tasks of the job's steps were started, as the nodes' own logs tell."""
    started = f"launch task StepId={job}.0 "
    return {node for node in NODES if started in (cluster.root / f"slurmd-{node}.log").read_text()}


def wait_for_ranks(out_dir: Path) -> list[int]:
    """Wait until both ranks train, and return their process ids."""
    progress = out_dir / PROGRESS
    assert wait_until(lambda: progress.is_file() and "KD steps" in progress.read_text(), timeout_s=120)
    ranks = ranks_of(out_dir)
    assert len(ranks) == 2
    return ranks


def processes_of(out_dir: Path) -> list[int]:
    """Return the stage's processes: srun, a torchrun on each node, and the ranks."""
    return processes_with("-m pipeline.stages kd_checkpoint", str(out_dir))


def ranks_of(out_dir: Path) -> list[int]:
    return [pid for pid in processes_of(out_dir) if "torch.distributed.run" not in command_of(pid)]


def processes_with(*words: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and all(word in command_of(int(entry.name)) for word in words):
            found.append(int(entry.name))
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def wait_until(is_so: Callable[[], bool], *, timeout_s: float = 40.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(0.2)
    return False
