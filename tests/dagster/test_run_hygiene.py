"""Runs whose process is gone: seen, ended, and their pool slots given back; runs that live are left alone."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from resources.home import prepare_home
from resources.run_hygiene import HOST_TAG, PID_TAG, PROCESS_TAG, claim_run, end_dead_runs, process_identity


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


@pytest.fixture
def dead_process() -> tuple[int, str]:
    """A process that was killed outright, and what identified it while it lived."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    identity = process_identity(child.pid)
    assert identity is not None
    child.send_signal(signal.SIGKILL)
    child.wait()
    return child.pid, identity


def _add_run(
    instance: dg.DagsterInstance, *, pid: int, identity: str, status: dg.DagsterRunStatus, host: str | None = None
) -> str:
    tags = {HOST_TAG: host or socket.gethostname(), PID_TAG: str(pid), PROCESS_TAG: identity}
    run = dg.DagsterRun(job_name="all_stages", status=status, tags=tags)
    instance.run_storage.add_run(run)
    return run.run_id


def _status(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def test_run_of_a_killed_process_is_failed(instance: dg.DagsterInstance, dead_process: tuple[int, str]):
    pid, identity = dead_process
    run_id = _add_run(instance, pid=pid, identity=identity, status=dg.DagsterRunStatus.STARTED)

    assert end_dead_runs(instance) == [run_id]
    assert _status(instance, run_id) is dg.DagsterRunStatus.FAILURE


def test_run_being_cancelled_by_a_killed_process_is_canceled(
    instance: dg.DagsterInstance, dead_process: tuple[int, str]
):
    pid, identity = dead_process
    run_id = _add_run(instance, pid=pid, identity=identity, status=dg.DagsterRunStatus.CANCELING)

    end_dead_runs(instance)

    assert _status(instance, run_id) is dg.DagsterRunStatus.CANCELED


def test_run_of_a_living_process_is_left_alone(instance: dg.DagsterInstance):
    identity = process_identity(os.getpid())
    assert identity is not None
    run_id = _add_run(instance, pid=os.getpid(), identity=identity, status=dg.DagsterRunStatus.STARTED)

    assert end_dead_runs(instance) == []
    assert _status(instance, run_id) is dg.DagsterRunStatus.STARTED


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="process start times are read from /proc")
def test_run_whose_process_id_was_given_to_another_is_failed(
    instance: dg.DagsterInstance, dead_process: tuple[int, str]
):
    run_id = _add_run(instance, pid=os.getpid(), identity=dead_process[1], status=dg.DagsterRunStatus.STARTED)

    assert end_dead_runs(instance) == [run_id]


def test_run_of_another_host_is_left_alone(instance: dg.DagsterInstance, dead_process: tuple[int, str]):
    pid, identity = dead_process
    _add_run(instance, pid=pid, identity=identity, status=dg.DagsterRunStatus.STARTED, host="elsewhere")

    assert end_dead_runs(instance) == []


def test_run_without_a_step_yet_is_given_time(instance: dg.DagsterInstance):
    instance.run_storage.add_run(dg.DagsterRun(job_name="all_stages", status=dg.DagsterRunStatus.STARTED))

    assert end_dead_runs(instance) == []


def test_dead_run_gives_back_its_pool_slot(instance: dg.DagsterInstance, dead_process: tuple[int, str]):
    storage = instance.event_log_storage
    storage.set_concurrency_slots("gpu", 1)
    pid, identity = dead_process
    run_id = _add_run(instance, pid=pid, identity=identity, status=dg.DagsterRunStatus.STARTED)
    assert storage.claim_concurrency_slot("gpu", run_id, "kd_checkpoint").is_claimed

    end_dead_runs(instance)

    assert storage.get_concurrency_info("gpu").active_slot_count == 0


def test_claimed_run_is_tagged_with_the_process_that_executes_it(instance: dg.DagsterInstance):
    @dg.asset
    def claiming(context: dg.AssetExecutionContext) -> None:
        claim_run(context.instance, run_id=context.run.run_id)

    result = dg.materialize([claiming], instance=instance)

    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.tags[PID_TAG] == str(os.getpid())
    assert run.tags[PROCESS_TAG] == process_identity(os.getpid())


def test_process_identity_of_a_zombie_is_none():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    assert process_identity(child.pid) is None or not Path("/proc").exists()
    child.wait()


def test_home_keeps_settings_that_a_user_changed(tmp_path: Path):
    prepare_home(tmp_path, recipe_name="tiny")
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")

    prepare_home(tmp_path, recipe_name="tiny")

    assert (tmp_path / "dagster.yaml").read_text() == "telemetry: {enabled: false}\n"


def test_home_names_the_code_location_after_the_recipe(tmp_path: Path):
    prepare_home(tmp_path, recipe_name="tiny")

    assert '"location_name": "refit-tiny"' in (tmp_path / "workspace.yaml").read_text()
