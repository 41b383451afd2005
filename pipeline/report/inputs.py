"""What a report or a model card reads of the artifacts before it, as frozen values. All its reading of files is here.

Every artifact tells its metrics, facts and tables in result.json; that is read of all of them. Beyond it:
architecture.json of checkpoints, curve.parquet of trainings, evaluation.json, lm_eval.json, scores.parquet,
losses.parquet and dependencies.parquet. What is not among the given artifacts is absent from the result, and the
section that would show it is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.architecture import Architecture, Frozen
from pipeline.artifacts import MANIFEST, RESULT, Manifest, RunRecord, read_json
from pipeline.errors import ArtifactError
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.lm_eval_results import LmEvalResult, read_lm_eval
from pipeline.evaluation.results import CheckpointEvaluation, read_evaluations
from pipeline.puzzle.tables import DEPENDENCIES, LOSSES, SCORES, read_table
from pipeline.stage import Number, StageResult
from pipeline.training.metrics import CURVE_FILE, read_curve

ARCHITECTURE_FILE = "architecture.json"
TRAINED = ("kd_checkpoint", "cpt_checkpoint", "sft_checkpoint", "rl_checkpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRecord:
    """One upstream artifact: what its stage said, how long it ran, and what identifies it."""

    asset: str
    path: Path
    result: StageResult
    wall_s: float
    fingerprint: str
    content_hash: str
    provenance: Mapping[str, str | int | float]


class TargetLimits(Frozen):
    """How the final checkpoint stands to its target's limits; within tolerance: met by the recipe's tolerance alone."""

    num_limits: int
    num_missed: int
    num_within_tolerance: int
    speed_tolerance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportInputs:
    """Everything a report shows, by asset name where there are several."""

    records: Mapping[str, StageRecord]
    architectures: Mapping[str, Architecture]
    evaluations: Mapping[str, CheckpointEvaluation]
    lm_eval: Mapping[str, tuple[LmEvalResult, ...]]
    curves: Mapping[str, pl.DataFrame]
    scores: pl.DataFrame | None
    library_losses: pl.DataFrame | None
    dependencies: pl.DataFrame | None

    def metric(self, asset: str, name: str) -> Number | None:
        """Return a metric of an upstream stage, None when the stage or the metric is not there."""
        record = self.records.get(asset)
        return None if record is None else record.result.metrics.get(name)

    def speedup(self, phase: str) -> Estimate | None:
        """Return the final checkpoint's measured speed relative to the parent's, None without a speed report.

        The interval is that of the report, by order statistics over rounds; its facts say what it covers.
        """
        if "speed_report" not in self.records:
            return None
        metrics = self.records["speed_report"].result.metrics
        return Estimate(
            value=metrics[f"{phase}_speedup"],
            low=metrics[f"{phase}_speedup_low"],
            high=metrics[f"{phase}_speedup_high"],
            num_samples=int(metrics["num_rounds"]),
        )

    def target_limits(self) -> TargetLimits | None:
        """Return how the final checkpoint, as measured, stands to the target; None without a speed report."""
        if "speed_report" not in self.records:
            return None
        metrics = self.records["speed_report"].result.metrics
        return TargetLimits(
            num_limits=int(metrics["num_limits"]),
            num_missed=int(metrics["num_missed_limits"]),
            num_within_tolerance=int(metrics["num_limits_within_tolerance"]),
            speed_tolerance=metrics["speed_tolerance"],
        )

    def predicted_speedup(self, phase: str) -> Number | None:
        """Return what the search's last solution promised."""
        return self.metric("child_checkpoint", f"predicted_{phase}_speedup")


def read_inputs(artifacts: Mapping[str, Path]) -> ReportInputs:
    """Read every given artifact.

    Raises:
        ArtifactError: when one has no manifest or result, that is, was never finished.
    """
    losses_dir = artifacts.get("block_library")
    return ReportInputs(
        records={asset: read_record(asset, path) for asset, path in artifacts.items()},
        architectures={
            asset: read_architecture(path)
            for asset, path in artifacts.items()
            if asset.endswith("_checkpoint") and (path / ARCHITECTURE_FILE).is_file()
        },
        evaluations=read_evaluations(artifacts["evaluation"]) if "evaluation" in artifacts else {},
        lm_eval=read_lm_eval(artifacts["evaluation"]) if "evaluation" in artifacts else {},
        curves={
            asset: read_curve(artifacts[asset])
            for asset in TRAINED
            if asset in artifacts and (artifacts[asset] / CURVE_FILE).is_file()
        },
        scores=read_table(artifacts["block_scores"], SCORES) if "block_scores" in artifacts else None,
        library_losses=(
            read_table(losses_dir, LOSSES) if losses_dir is not None and (losses_dir / LOSSES).is_file() else None
        ),
        dependencies=(
            read_table(artifacts["dependency_matrix"], DEPENDENCIES) if "dependency_matrix" in artifacts else None
        ),
    )


def read_record(asset: str, path: Path) -> StageRecord:
    """Read manifest.json and result.json of one artifact.

    Raises:
        ArtifactError: when either is missing.
    """
    for name in (MANIFEST, RESULT):
        if not (path / name).is_file():
            raise ArtifactError(f"{path} has no {name}: {asset} is not finished; materialize it first")
    manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    record = RunRecord.model_validate_json((path / RESULT).read_bytes())
    return StageRecord(
        asset=asset,
        path=path,
        result=record.result,
        wall_s=record.wall_s,
        fingerprint=manifest.fingerprint,
        content_hash=manifest.content_hash,
        provenance=manifest.provenance,
    )


def read_architecture(directory: Path) -> Architecture:
    """Read architecture.json of a checkpoint."""
    return Architecture.model_validate(read_json(directory / ARCHITECTURE_FILE))
