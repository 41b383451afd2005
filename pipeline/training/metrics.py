"""What a training records: the curve, one row per optimizer step, and its speed."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

CURVE_FILE = "curve.parquet"

CurveRow = Mapping[str, int | float]


def write_curve(out_dir: Path, rows: Sequence[CurveRow]) -> None:
    """Write curve.parquet: step, tokens, loss, learning_rate, grad_norm, then the objective's own terms."""
    pl.DataFrame(rows).write_parquet(out_dir / CURVE_FILE)


def read_curve(artifact: Path) -> pl.DataFrame:
    """Return the curve of a trained artifact."""
    return pl.read_parquet(artifact / CURVE_FILE)


class Throughput:
    """Tokens per second since this process began to train; what a run before a resume did is not counted."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._num_tokens = 0

    def add(self, num_tokens: int) -> None:
        """Count tokens of all ranks."""
        self._num_tokens += num_tokens

    @property
    def tokens_per_second(self) -> float:
        """The mean so far; 0 when nothing was trained."""
        return self._num_tokens / max(time.monotonic() - self._began, 1e-9)
