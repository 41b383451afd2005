"""What is wrong with a Dagster home: runs whose process is gone, and pool slots that ended runs still hold."""

from pathlib import Path

import dagster as dg

from pipeline.inspection.findings import Finding
from resources.run_hygiene import end_dead_runs, find_dead_runs

_ENDED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


def examine_dagster(home: Path, *, fix: bool) -> tuple[Finding, ...]:
    """Return what is wrong with the runs recorded in a home; with `fix`, end dead runs and free stuck slots."""
    if not (home / "dagster.yaml").is_file():
        detail = f"{home} is no Dagster home yet: nothing of this recipe has run under Dagster"
        return (Finding(severity="ok", subject="dagster", detail=detail),)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        return (*_examine_runs(instance, fix=fix), *_examine_slots(instance, fix=fix))


def _examine_runs(instance: dg.DagsterInstance, *, fix: bool) -> list[Finding]:
    dead = find_dead_runs(instance)
    if fix:
        end_dead_runs(instance)
    findings = [
        Finding(
            severity="note" if fix else "problem",
            subject="dead run",
            detail=f"{run_id}: {reason}" + ("; it was marked as ended" if fix else ""),
            next_step="" if fix else "`python -m pipeline doctor --fix` marks it as ended, as does the next `make`",
        )
        for run_id, reason in dead.items()
    ]
    if not findings:
        num_runs = instance.get_runs_count()
        findings.append(Finding(severity="ok", subject="runs", detail=f"{num_runs} recorded, none without a process"))
    return findings


def _examine_slots(instance: dg.DagsterInstance, *, fix: bool) -> list[Finding]:
    storage = instance.event_log_storage
    stuck: dict[str, str] = {}
    for run_id in storage.get_concurrency_run_ids():
        run = instance.get_run_by_id(run_id)
        if run is None:
            stuck[run_id] = "is not recorded any more"
        elif run.status in _ENDED:
            stuck[run_id] = f"ended as {run.status.value}"
    for run_id in stuck if fix else ():
        storage.free_concurrency_slots_for_run(run_id)
    findings = [
        Finding(
            severity="note" if fix else "problem",
            subject="pool slot",
            detail=f"held by run {run_id}, which {state}" + ("; it was freed" if fix else ""),
            next_step="" if fix else "`python -m pipeline doctor --fix` frees it",
        )
        for run_id, state in stuck.items()
    ]
    if not findings:
        limits = ", ".join(f"{pool.name} {pool.limit}" for pool in storage.get_pool_limits()) or "none"
        findings.append(Finding(severity="ok", subject="pools", detail=f"no slot is stuck; limits: {limits}"))
    return findings
