"""What the doctor sees in a Dagster home: dead runs and slots they hold, and a home that is not there."""

import socket
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from resources.dagster_health import examine_dagster
from resources.home import prepare_home
from resources.run_hygiene import HOST_TAG, PID_TAG, PROCESS_TAG, process_identity


@pytest.fixture
def home(tmp_path: Path) -> Path:
    prepare_home(tmp_path, recipe_name="tiny")
    return tmp_path


def add_dead_run(home: Path) -> str:
    """Record a run whose process was killed outright, and let it hold the one slot of a pool."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    identity = process_identity(child.pid)
    assert identity is not None
    child.kill()
    child.wait()
    tags = {HOST_TAG: socket.gethostname(), PID_TAG: str(child.pid), PROCESS_TAG: identity}
    run = dg.DagsterRun(job_name="all_stages", status=dg.DagsterRunStatus.STARTED, tags=tags)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        instance.run_storage.add_run(run)
        instance.event_log_storage.set_concurrency_slots("gpu", 1)
        claim = instance.event_log_storage.claim_concurrency_slot("gpu", run.run_id, "kd_checkpoint")
        assert claim.is_claimed
    return run.run_id


def test_a_home_that_is_not_there_is_said_to_be_so(tmp_path: Path):
    (finding,) = examine_dagster(tmp_path / "nowhere", fix=False)
    assert finding.severity == "ok"
    assert "no Dagster home yet" in finding.detail
    assert not (tmp_path / "nowhere").exists()


def test_a_sound_home_has_no_problem(home: Path):
    assert {finding.severity for finding in examine_dagster(home, fix=False)} == {"ok"}


def test_a_dead_run_is_told_and_ended_on_request_alone(home: Path):
    run_id = add_dead_run(home)
    for _ in range(2):  # looking changes nothing
        (problem,) = [finding for finding in examine_dagster(home, fix=False) if finding.severity == "problem"]
        assert run_id in problem.detail
        assert "is gone" in problem.detail
    examine_dagster(home, fix=True)
    assert {finding.severity for finding in examine_dagster(home, fix=False)} == {"ok"}
    with dg.DagsterInstance.from_config(str(home)) as instance:
        run = instance.get_run_by_id(run_id)
        assert run is not None
        assert run.status is dg.DagsterRunStatus.FAILURE
        assert instance.event_log_storage.claim_concurrency_slot("gpu", "another", "kd_checkpoint").is_claimed


def test_a_slot_that_an_ended_run_holds_is_told_and_freed(home: Path):
    run_id = add_dead_run(home)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        run = instance.get_run_by_id(run_id)
        assert run is not None
        instance.report_run_failed(run, message="ended without giving its slot back")
        # The event frees the slot; take it again, as a run that was resumed by hand would.
        instance.event_log_storage.claim_concurrency_slot("gpu", run_id, "kd_checkpoint")
    (problem,) = [finding for finding in examine_dagster(home, fix=False) if finding.severity == "problem"]
    assert problem.subject == "pool slot"
    assert "ended as FAILURE" in problem.detail
    examine_dagster(home, fix=True)
    assert {finding.severity for finding in examine_dagster(home, fix=False)} == {"ok"}
