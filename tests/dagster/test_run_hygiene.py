"""Runs whose process is gone: seen, ended, and their pool slots given back; runs that live are left alone."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import EngineEventData

from resources import run_hygiene
from resources.home import prepare_home
from resources.run_hygiene import HOST_TAG, PID_TAG, PROCESS_TAG, claim_run, end_dead_runs, process_identity

LONG_AGO_S = 1e9


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


def _add_untagged_run(instance: dg.DagsterInstance, *, executor_pid: int | None, logged_at_s: float) -> str:
    """Add a run that has not executed a step, as while it waits for a slot of its pool."""
    run = dg.DagsterRun(job_name="all_stages", status=dg.DagsterRunStatus.STARTED)
    instance.run_storage.add_run(run)
    if executor_pid is not None:
        event = dg.DagsterEvent(
            event_type_value=dg.DagsterEventType.ENGINE_EVENT.value,
            job_name=run.job_name,
            event_specific_data=EngineEventData.in_process(executor_pid),
        )
        entry = dg.EventLogEntry(
            error_info=None,
            level=10,
            user_message="",
            run_id=run.run_id,
            timestamp=logged_at_s,
            job_name=run.job_name,
            dagster_event=event,
        )
        instance.event_log_storage.store_event(entry)
    return run.run_id


def test_run_that_waits_long_for_its_first_step_is_left_alone_while_its_executor_lives(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_hygiene, "UNCLAIMED_RUN_S", 0.0)
    _add_untagged_run(instance, executor_pid=os.getpid(), logged_at_s=time.time())

    assert end_dead_runs(instance) == []


def test_run_whose_executor_was_killed_before_its_first_step_is_failed(
    instance: dg.DagsterInstance, dead_process: tuple[int, str]
):
    run_id = _add_untagged_run(instance, executor_pid=dead_process[0], logged_at_s=time.time())

    assert end_dead_runs(instance) == [run_id]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="process start times are read from /proc")
def test_run_whose_executor_began_after_it_was_logged_is_failed(instance: dg.DagsterInstance):
    run_id = _add_untagged_run(instance, executor_pid=os.getpid(), logged_at_s=LONG_AGO_S)

    assert end_dead_runs(instance) == [run_id]


def test_run_that_never_named_a_process_is_failed_after_a_while(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
):
    run_id = _add_untagged_run(instance, executor_pid=None, logged_at_s=0.0)
    monkeypatch.setattr(run_hygiene, "UNCLAIMED_RUN_S", 0.0)

    assert end_dead_runs(instance) == [run_id]


def test_executor_of_a_real_run_is_found_in_its_log(instance: dg.DagsterInstance):
    @dg.asset
    def nothing() -> None: ...

    result = dg.materialize([nothing], instance=instance)

    executor = run_hygiene._find_executor(instance, result.run_id)
    assert executor is not None
    assert executor.pid == os.getpid()
    assert run_hygiene._lives(executor)


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
