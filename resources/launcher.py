"""Runs a stage for an asset: hands its progress to Dagster while it runs, and its failure as one clear message."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import dagster as dg

from pipeline.errors import RefitError
from pipeline.execution import Outcome, Workspace, materialize, require_runtimes
from pipeline.progress import format_duration, render_progress
from pipeline.stages.registry import Stage, get_stage
from resources.run_hygiene import claim_run


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """The resource every asset asks for; where a stage runs is decided by the workspace's execution settings."""

    workspace: Workspace
    observation_interval_s: float = 10.0

    def materialize(self, context: dg.AssetExecutionContext, stage_name: str) -> Outcome:
        """Return the stage's artifact, made or found.

        Raises:
            dg.Failure: with the stage's own message; never retried, since the same inputs fail the same way.
        """
        stage = get_stage(stage_name)
        claim_run(context.instance, run_id=context.run.run_id)
        narrator = _Narrator(
            context=context, partition=self._partition(context, stage), interval_s=self.observation_interval_s
        )
        in_this_run = (key.to_user_string() for key in context.job_def.asset_layer.executable_asset_keys)
        of_this_run = context.partition_key if context.has_partition_key else self.workspace.recipe.default_target
        try:
            require_runtimes(self.workspace, in_this_run, target=of_this_run)
            outcome = materialize(
                self.workspace, stage.name, self.target(context, stage.name), on_progress=narrator.report
            )
        except RefitError as err:
            raise dg.Failure(description=f"{stage.name}: {err}", allow_retries=False) from err
        record = outcome.artifact.record
        context.log.info(
            f"{stage.name} {outcome.how}: {outcome.artifact.path} (made in {format_duration(record.wall_s)})"
        )
        return outcome

    def target(self, context: dg.AssetExecutionContext, stage_name: str) -> str:
        """Return the target an asset is made for.

        In a partitioned run `context.has_partition_key` is true inside unpartitioned assets too, so the registry
        decides; a stage that all targets share reads nothing of the one it is given.
        """
        stage = get_stage(stage_name)
        return context.partition_key if stage.per_target else self.workspace.recipe.default_target

    def _partition(self, context: dg.AssetExecutionContext, stage: Stage) -> str | None:
        return context.partition_key if stage.per_target else None


@dataclass(kw_only=True)
class _Narrator:
    """Turns progress lines into log lines and observations; each is a row in the event log, so both are throttled."""

    context: dg.AssetExecutionContext
    partition: str | None
    interval_s: float
    _last: dict[str, float] = field(default_factory=dict)

    def report(self, line: Mapping[str, object]) -> None:
        if "note" in line:
            self.context.log.info(render_progress(line))
            return
        now = time.monotonic()
        what = str(line["what"])
        is_last = line["step"] == line["total"]
        if not is_last and now - self._last.get(what, float("-inf")) < self.interval_s:
            return
        self._last[what] = now
        self.context.log.info(render_progress(line))
        self.context.log_event(
            dg.AssetObservation(
                asset_key=self.context.asset_key, partition=self.partition, metadata=observation_metadata(line)
            )
        )


def observation_metadata(line: Mapping[str, object]) -> dict[str, str | int | float]:
    """Return one progress line as the metadata of an observation: steps, ETA and every metric."""
    metrics = line["metrics"]
    assert isinstance(metrics, Mapping)
    found: dict[str, str | int | float] = {"what": str(line["what"])}
    for name, value in (("step", line["step"]), ("total", line["total"]), ("eta_s", line["eta_s"]), *metrics.items()):
        if isinstance(value, int):
            found[name] = value
        elif isinstance(value, float):
            # Six digits: an observation is read, and plotted, by people.
            found[name] = float(f"{value:.6g}") if abs(value) < float("inf") else str(value)
    return found
