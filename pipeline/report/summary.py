"""The summary of one run of a recipe: what lands in .refit/summary.json, and the table a terminal shows."""

import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.architecture import Frozen
from pipeline.costs import num_parameters
from pipeline.errors import ArtifactError
from pipeline.progress import format_duration
from pipeline.report.inputs import ReportInputs, TargetLimits, read_inputs

REPORT_FILE = "report.html"


class ParameterCounts(Frozen):
    """Parameters of the whole models, tied tensors counted once."""

    parent: int
    child: int


class PhaseSpeeds(Frozen):
    """Speed relative to the parent, 1.0 being as fast."""

    decode: float
    prefill: float


class Perplexities(Frozen):
    """Perplexity on all held-out text."""

    parent: float
    child: float
    kd: float
    cpt: float
    sft: float
    rl: float


class Divergences(Frozen):
    """KL(parent || checkpoint) on all held-out text, nats per token."""

    child: float
    kd: float
    cpt: float
    sft: float
    rl: float


class ToggleCompliance(Frozen):
    """Share of the final checkpoint's answers that obey the reasoning switch."""

    on: float
    off: float


class Summary(Frozen):
    """One recipe and target from parent to report; paths are relative to the repository root."""

    recipe: str
    target: str
    wall_s: dict[str, float]
    total_wall_s: float
    parameters: ParameterCounts
    speedup: PhaseSpeeds
    predicted_speedup: PhaseSpeeds
    perplexity: Perplexities
    kl: Divergences
    toggle_compliance: ToggleCompliance
    target_limits: TargetLimits
    exported_model: str
    report: str


def build_summary(
    artifacts: Mapping[str, Path], *, recipe_name: str, target: str, total_wall_s: float, repository_root: Path
) -> Summary:
    """Read the summary's figures from finished artifacts, by asset name.

    `wall_s` is how long each stage ran when its artifact was made; `total_wall_s` is this run's, reuse included.

    Raises:
        ArtifactError: when an artifact is not finished, or a figure is not among what its stage reported.
    """
    inputs = read_inputs(artifacts)
    limits = inputs.target_limits()
    if limits is None:
        raise ArtifactError("there is no speed_report: materialize it before its figures are summed up")
    evaluations = inputs.evaluations
    perplexity = {name: found.text_overall.perplexity.value for name, found in evaluations.items()}
    kl = {name: found.text_overall.kl_nats_per_token.value for name, found in evaluations.items()}
    final = evaluations["rl"]
    return Summary(
        recipe=recipe_name,
        target=target,
        wall_s={asset: round(record.wall_s, 1) for asset, record in inputs.records.items()},
        total_wall_s=round(total_wall_s, 1),
        parameters=ParameterCounts(
            parent=num_parameters(inputs.architectures["parent_checkpoint"]),
            child=num_parameters(inputs.architectures["child_checkpoint"]),
        ),
        speedup=_speeds(inputs, asset="speed_report", prefix=""),
        predicted_speedup=_speeds(inputs, asset="child_checkpoint", prefix="predicted_"),
        perplexity=Perplexities(**{name: perplexity[name] for name in Perplexities.model_fields}),
        kl=Divergences(**{name: kl[name] for name in Divergences.model_fields}),
        toggle_compliance=ToggleCompliance(
            on=final.thinking_on.toggle_compliance.value, off=final.thinking_off.toggle_compliance.value
        ),
        target_limits=limits,
        exported_model=_relative(artifacts["exported_model"], repository_root),
        report=_relative(artifacts["report"] / REPORT_FILE, repository_root),
    )


def render_summary(summary: Summary) -> str:
    """Return the summary as a plain-text table."""
    parameters, speed, predicted = summary.parameters, summary.speedup, summary.predicted_speedup
    limits = summary.target_limits
    change = 100 * (parameters.child / parameters.parent - 1)
    lines = [
        f"Recipe {summary.recipe}, target {summary.target}",
        "",
        f"  {'parameters':<20} {parameters.parent:>14,} -> {parameters.child:,} ({change:+.1f}%)",
        f"  {'decode speed':<20} {speed.decode:>13.2f}x measured, {predicted.decode:.2f}x predicted",
        f"  {'prefill speed':<20} {speed.prefill:>13.2f}x measured, {predicted.prefill:.2f}x predicted",
        f"  {'reasoning switch':<20} {100 * summary.toggle_compliance.on:>13.0f}% obey on, "
        f"{100 * summary.toggle_compliance.off:.0f}% obey off",
        f"  {'target limits':<20} {limits.num_limits - limits.num_missed:>14} of {limits.num_limits} met by the final "
        "checkpoint",
        f"  {'':<20} {limits.num_within_tolerance:>14} of them only within the tolerance of "
        f"{100 * limits.speed_tolerance:g}%",
        "",
        f"  {'checkpoint':<20} {'perplexity':>14} {'KL to parent, nats/token':>26}",
    ]
    for name in Perplexities.model_fields:
        perplexity = getattr(summary.perplexity, name)
        kl = getattr(summary.kl, name) if name in Divergences.model_fields else 0.0
        lines.append(f"  {name:<20} {perplexity:>14.2f} {kl:>26.4f}")
    lines += ["", f"  {'stage':<28} {'wall time':>10}"]
    lines += [f"  {asset:<28} {format_duration(seconds):>10}" for asset, seconds in summary.wall_s.items()]
    lines += [
        f"  {'this run':<28} {format_duration(summary.total_wall_s):>10}",
        "",
        f"  exported model  {summary.exported_model}",
        f"  report          {summary.report}",
    ]
    return "\n".join(lines) + "\n"


def _speeds(inputs: ReportInputs, *, asset: str, prefix: str) -> PhaseSpeeds:
    found = {}
    for phase in ("decode", "prefill"):
        value = inputs.metric(asset, f"{prefix}{phase}_speedup")
        if value is None:
            raise ArtifactError(f"{asset} reported no {prefix}{phase}_speedup: materialize {asset} again")
        found[phase] = float(value)
    return PhaseSpeeds(**found)


def _relative(path: Path, root: Path) -> str:
    # os.path and not Path.relative_to: the store may stand outside the repository (REFIT_HOME).
    return Path(os.path.relpath(path.resolve(), root.resolve())).as_posix()
