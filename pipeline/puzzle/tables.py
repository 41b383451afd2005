"""The tables that Puzzle stages hand to each other as Parquet: their schemas, and checked reading and writing."""

from pathlib import Path

import polars as pl

from pipeline.errors import ArtifactError

Schema = dict[str, type[pl.DataType]]

# The columns of scores.parquet that say how far a model is from the parent.
MEASURES = ("kl", "lm_loss", "hidden_cosine", "top1_error", "task_error")

SCORES = "scores.parquet"
DEPTH = "depth.parquet"
PROFILE = "profile.parquet"
MEMORY = "memory.parquet"
ACTIVATIONS = "activations.parquet"
LOSSES = "losses.parquet"
CHILDREN = "children.parquet"
PARETO = "pareto.parquet"
DEPENDENCIES = "dependencies.parquet"

SCHEMAS: dict[str, Schema] = {
    # One row per layer and composed block: the base model with that block in that layer, against the parent. The base's
    # own blocks are rows too (is_base), all with the base's own measures. Measures as in pipeline.puzzle.divergence; no
    # task, no task_error. Around a child, some are sums of halves (pipeline.puzzle.half_scores).
    SCORES: {
        "layer": pl.Int64,
        "attention": pl.String,
        "ffn": pl.String,
        "is_base": pl.Boolean,
        "kl": pl.Float64,
        "lm_loss": pl.Float64,
        "hidden_cosine": pl.Float64,
        "top1_error": pl.Float64,
        "task_error": pl.Float64,
        "num_tokens": pl.Int64,
    },
    # One row per layer, the first to be left out first: the model without it and without the num_gone layers that had
    # gone when it was measured. Beyond the measured steps all are as the last step measured them.
    DEPTH: {
        "place": pl.Int64,
        "layer": pl.Int64,
        "num_gone": pl.Int64,
        "kl": pl.Float64,
        "num_tokens": pl.Int64,
    },
    # part is attention, ffn or fixed (all that is outside the layers). A decode time is one step of the whole batch.
    PROFILE: {
        "scenario": pl.String,
        "phase": pl.String,
        "part": pl.String,
        "variant": pl.String,
        "time_ms": pl.Float64,
        "spread_ms": pl.Float64,
        "num_repeats": pl.Int64,
    },
    MEMORY: {
        "part": pl.String,
        "variant": pl.String,
        "num_parameters": pl.Int64,
        "weights_mib": pl.Float64,
        "kv_bytes_per_token": pl.Float64,
    },
    # What one composed block holds at once in a scenario's prefill; a model's peak is the largest of its blocks', or
    # that of `fixed`, which is outside them.
    ACTIVATIONS: {
        "scenario": pl.String,
        "attention": pl.String,
        "ffn": pl.String,
        "activations_mib": pl.Float64,
    },
    # One row per whole child of one target: what chose it, where its weights come from (library or surgery), measures
    # against the parent, and how many times faster than the parent it was measured to be in the target's scenario.
    CHILDREN: {
        "method": pl.String,
        "weights": pl.String,
        "kl": pl.Float64,
        "lm_loss": pl.Float64,
        "hidden_cosine": pl.Float64,
        "top1_error": pl.Float64,
        "num_tokens": pl.Int64,
        "num_parameters": pl.Int64,
        "scenario": pl.String,
        "phase": pl.String,
        "predicted_speedup": pl.Float64,
        "measured_speedup": pl.Float64,
        "speedup_low": pl.Float64,
        "speedup_high": pl.Float64,
    },
    # One row per child of any target and kind of comparison, the parent's too; see pipeline.report.pareto. The interval
    # of kl is the point itself where none is known.
    PARETO: {
        "target": pl.String,
        "method": pl.String,
        "text": pl.String,
        "scenario": pl.String,
        "phase": pl.String,
        "measured_speedup": pl.Float64,
        "speedup_low": pl.Float64,
        "speedup_high": pl.Float64,
        "kl": pl.Float64,
        "kl_low": pl.Float64,
        "kl_high": pl.Float64,
        "num_parameters": pl.Int64,
        "is_on_frontier": pl.Boolean,
    },
    # One row per pair of blocks that add something: the cosine distance of the later one's update with and without the
    # earlier one (M_ij, i removed).
    DEPENDENCIES: {
        "removed_layer": pl.Int64,
        "layer": pl.Int64,
        "cosine_distance": pl.Float64,
    },
    LOSSES: {
        "layer": pl.Int64,
        "subblock": pl.String,
        "variant": pl.String,
        "step": pl.Int64,
        "loss": pl.Float64,
    },
}


def write_table(directory: Path, name: str, frame: pl.DataFrame) -> None:
    """Write a table under its name after comparing its columns with the schema.

    Raises:
        ArtifactError: when they differ.
    """
    _check(frame, name=name, where=directory)
    directory.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(directory / name)


def read_table(directory: Path, name: str) -> pl.DataFrame:
    """Read a table and compare its columns with the schema.

    Raises:
        ArtifactError: when they differ, or the file is missing.
    """
    if not (directory / name).is_file():
        raise ArtifactError(f"{directory} has no {name}: the artifact is not what this stage reads; make it again")
    frame = pl.read_parquet(directory / name)
    _check(frame, name=name, where=directory)
    return frame


def _check(frame: pl.DataFrame, *, name: str, where: Path) -> None:
    got = {column: str(dtype) for column, dtype in frame.schema.items()}
    wanted = {column: str(dtype()) for column, dtype in SCHEMAS[name].items()}
    if got != wanted:
        raise ArtifactError(f"{where / name} has columns {got}, wanted {wanted}")
