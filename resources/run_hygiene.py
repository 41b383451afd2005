"""Runs whose process is gone: how they are recognised, marked as ended, and made to give back their pool slots.

A run that was killed outright stays STARTED in Dagster's database and keeps its slots for ever. Every run is therefore
tagged with its host and process on its first step; at the next start, whatever process is gone ends its run. Until that
step, which may wait for a slot of its pool for hours, the process that the run's executor wrote into its log stands in.
"""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

HOST_TAG = "refit/host"
PID_TAG = "refit/pid"
PROCESS_TAG = "refit/process"
# An executor writes its process into the log seconds after the run starts, before any step waits for a slot; a run that
# is silent for this long without having done so has none.
UNCLAIMED_RUN_S = 600.0
# /proc/stat gives the boot in whole seconds and follows corrections of the clock: within this, when a process began and
# when it wrote an event cannot be told apart.
CLOCK_SLACK_S = 60.0

_UNFINISHED = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def claim_run(instance: dg.DagsterInstance, *, run_id: str) -> None:
    """Tag a run with the process that executes it, and end the runs whose process is gone; once per run."""
    run = instance.get_run_by_id(run_id)
    if run is None or PID_TAG in run.tags:
        return
    executor = _find_executor(instance, run_id)
    pid = executor.pid if executor else os.getpid()
    identity = process_identity(pid)
    if identity is None:
        return
    instance.add_run_tags(run_id, {HOST_TAG: socket.gethostname(), PID_TAG: str(pid), PROCESS_TAG: identity})
    end_dead_runs(instance)


def find_dead_runs(instance: dg.DagsterInstance) -> dict[str, str]:
    """Return every unfinished run of this host whose process is gone, and how that is known."""
    records = instance.get_run_records(filters=dg.RunsFilter(statuses=_UNFINISHED))
    reasons = {record.dagster_run.run_id: _why_dead(instance, record) for record in records}
    return {run_id: reason for run_id, reason in reasons.items() if reason is not None}


def end_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark every unfinished run of this host whose process is gone as ended, free its slots, and return their ids."""
    dead = find_dead_runs(instance)
    for run_id, reason in dead.items():
        run = instance.get_run_by_id(run_id)
        assert run is not None
        if run.status is dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, message=reason)
        else:
            instance.report_run_failed(run, message=reason)
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    return list(dead)


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
    fields = _stat_fields(pid)
    if fields is None:
        return str(pid)
    if fields[0] in ("Z", "X"):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{fields[19]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Executor:
    """The process that a run's log names as its executor, and when it wrote so (seconds since the epoch)."""

    pid: int
    logged_at_s: float


def _why_dead(instance: dg.DagsterInstance, record: dg.RunRecord) -> str | None:
    """Return why an unfinished run's process is taken for gone, or None while it may live."""
    run = record.dagster_run
    if PID_TAG in run.tags:
        if run.tags[HOST_TAG] != socket.gethostname():
            return None
        if process_identity(int(run.tags[PID_TAG])) == run.tags[PROCESS_TAG]:
            return None
        return f"process {run.tags[PID_TAG]} on {run.tags[HOST_TAG]}, which executed this run, is gone"
    executor = _find_executor(instance, run.run_id)
    if executor is not None:
        return None if _lives(executor) else f"process {executor.pid}, which executed this run, is gone"
    silent_s = time.time() - max(record.start_time or 0.0, record.update_timestamp.timestamp())
    if silent_s < UNCLAIMED_RUN_S:
        return None
    return f"the run has named no process and done nothing for {silent_s:.0f} s; its process is taken for dead"


def _find_executor(instance: dg.DagsterInstance, run_id: str) -> _Executor | None:
    """Return the process of the run's executor: with one process per step, the steps' parent and not a step."""
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.dagster_event
        pid = event.engine_event_data.metadata.get("pid") if event else None
        if isinstance(pid, dg.TextMetadataValue):
            return _Executor(pid=int(str(pid.value)), logged_at_s=entry.timestamp)
    return None


def _lives(executor: _Executor) -> bool:
    """Whether the executor still runs: a process with its id that began after it wrote to the log is another one."""
    if process_identity(executor.pid) is None:
        return False
    began_at_s = _began_at_s(executor.pid)
    return began_at_s is None or began_at_s <= executor.logged_at_s + CLOCK_SLACK_S


def _began_at_s(pid: int) -> float | None:
    """Return when a process began in seconds since the epoch, or None where that cannot be read."""
    fields = _stat_fields(pid)
    if fields is None:
        return None
    lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    booted_at_s = next((float(line.split()[1]) for line in lines if line.startswith("btime ")), None)
    return None if booted_at_s is None else booted_at_s + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/<pid>/stat from the state on, or None; number 19 is the start in clock ticks."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # no /proc on this system, or the process has just ended
        return None
    return text.rpartition(")")[2].split()  # the name before them may hold spaces and brackets
