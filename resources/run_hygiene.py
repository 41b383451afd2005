"""Runs whose process is gone: how they are recognised, marked as ended, and made to give back their pool slots.

A run that was killed outright stays STARTED in Dagster's database and keeps its slots for ever. Every run is therefore
tagged with its host and process on its first step; at the next start, whatever process is gone ends its run.
"""

import os
import socket
import time
from pathlib import Path

import dagster as dg

HOST_TAG = "refit/host"
PID_TAG = "refit/pid"
PROCESS_TAG = "refit/process"
# A run executes its first step seconds after it starts; one that has not claimed its process by then has none.
UNCLAIMED_RUN_S = 600.0

_UNFINISHED = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def claim_run(instance: dg.DagsterInstance, *, run_id: str) -> None:
    """Tag a run with the process that executes it, and end the runs whose process is gone; once per run."""
    run = instance.get_run_by_id(run_id)
    if run is None or PID_TAG in run.tags:
        return
    pid = _executing_pid(instance, run_id) or os.getpid()
    identity = process_identity(pid)
    if identity is None:
        return
    instance.add_run_tags(run_id, {HOST_TAG: socket.gethostname(), PID_TAG: str(pid), PROCESS_TAG: identity})
    end_dead_runs(instance)


def end_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark every unfinished run of this host whose process is gone as ended, free its slots, and return their ids."""
    ended = []
    for record in instance.get_run_records(filters=dg.RunsFilter(statuses=_UNFINISHED)):
        run = record.dagster_run
        reason = _why_dead(run, age_s=time.time() - record.create_timestamp.timestamp())
        if reason is None:
            continue
        if run.status is dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, message=reason)
        else:
            instance.report_run_failed(run, message=reason)
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        ended.append(run.run_id)
    return ended


def process_identity(pid: int) -> str | None:
    """Return what tells this process from a later one with the same id, or None when no such process runs.

    On Linux: the machine's boot and the process's start since then; elsewhere the id alone.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it runs, and belongs to someone else
    stat = Path(f"/proc/{pid}/stat")
    if not stat.is_file():
        return str(pid)
    # The name in field 2 may hold spaces and brackets; state is the first field after it, the start time the 20th.
    fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{fields[19]}"


def _why_dead(run: dg.DagsterRun, *, age_s: float) -> str | None:
    if PID_TAG not in run.tags:
        if age_s < UNCLAIMED_RUN_S:
            return None
        return f"the run executed no step within {UNCLAIMED_RUN_S:.0f} s of its creation; its process is taken for dead"
    if run.tags[HOST_TAG] != socket.gethostname():
        return None
    if process_identity(int(run.tags[PID_TAG])) == run.tags[PROCESS_TAG]:
        return None
    return f"process {run.tags[PID_TAG]} on {run.tags[HOST_TAG]}, which executed this run, is gone"


def _executing_pid(instance: dg.DagsterInstance, run_id: str) -> int | None:
    """Return the process of the run's executor: with one process per step, the steps' parent and not a step."""
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.dagster_event
        pid = event.engine_event_data.metadata.get("pid") if event else None
        if isinstance(pid, dg.TextMetadataValue):
            return int(str(pid.value))
    return None
