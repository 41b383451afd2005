"""The job over every stage and the schedule that keeps it current; the schedule is shipped stopped."""

import dagster as dg

from pipeline.execution import Workspace
from pipeline.stages.registry import STAGES
from resources.run_hygiene import end_dead_runs
from resources.staleness import find_stale_stages
from resources.time_zone import find_time_zone

RERUN_TAG = "refit/rerun"
EVERY_HALF_HOUR_AT_NIGHT = "*/30 1-5 * * *"

_IN_PROGRESS = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


ALL_STAGES = dg.define_asset_job(
    "all_stages",
    selection=dg.AssetSelection.assets(*(stage.name for stage in STAGES)),
    description="Every stage of the recipe for one target; what is already there is reused.",
)


def build_schedule(workspace: Workspace) -> dg.ScheduleDefinition:
    """Return the nightly schedule: whatever is stale and everything that follows, one target at a time.

    Targets share stages, artifacts under construction are locked, and stages that measure speed want the machine to
    themselves; so a tick requests one target and later ticks the next. A target is requested once a night: one that
    keeps failing is tried again the night after, not every half hour. Hours and dates are those of the machine's zone.
    """

    @dg.schedule(
        name="rerun_stale",
        job=ALL_STAGES,
        cron_schedule=EVERY_HALF_HOUR_AT_NIGHT,
        execution_timezone=find_time_zone(),
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Runs whatever is missing for the recipe as it stands, and everything downstream of it.",
    )
    def rerun_stale(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        instance = context.instance
        end_dead_runs(instance)
        for run in instance.get_runs(filters=dg.RunsFilter(statuses=_IN_PROGRESS), limit=1):
            return dg.SkipReason(f"run {run.run_id} is in progress")
        night = context.scheduled_execution_time.date().isoformat()
        return _next_request(instance, workspace, night=night)

    return rerun_stale


def _next_request(instance: dg.DagsterInstance, workspace: Workspace, *, night: str) -> dg.RunRequest | dg.SkipReason:
    waiting: list[str] = []
    for target in sorted(workspace.recipe.targets):
        stale = find_stale_stages(workspace, target)
        if not stale:
            continue
        tags = {RERUN_TAG: f"{night}/{target}"}
        if instance.get_runs_count(filters=dg.RunsFilter(tags=tags)):
            waiting.append(target)
            continue
        return dg.RunRequest(
            run_key=tags[RERUN_TAG],
            partition_key=target,
            asset_selection=[dg.AssetKey(name) for name in stale],
            tags=tags,
        )
    if waiting:
        return dg.SkipReason(f"stale, but already run this night: {', '.join(waiting)}")
    return dg.SkipReason(f"every artifact of recipe {workspace.recipe.name} is current")
