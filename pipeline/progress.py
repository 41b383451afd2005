"""How a stage tells what it is doing: steps, metrics and an ETA from evidence. No Dagster, no torch.

A Reporter writes one JSON line per report. The process that watches the stage (a terminal, Dagster) reads those lines;
the stage itself never knows who listens.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Reporter(Protocol):
    """Where a stage reports to."""

    def step(self, step: int, total: int, /, *, what: str, **metrics: float) -> None:
        """Report that `step` of `total` units of `what` are done, with the newest metrics."""
        ...

    def note(self, message: str) -> None:
        """Report one sentence for the log."""
        ...


class SilentReporter:
    """Reports to nobody: for tests and notebooks."""

    def step(self, step: int, total: int, /, *, what: str, **metrics: float) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Do nothing."""


class EtaEstimator:
    """Remaining seconds from measured steps only; None until there is evidence.

    The rate is taken over the steps of this process, so a resumed stage does not count what an earlier one did. Work of
    the same name that begins anew, which steps that fall tell, is measured anew.
    """

    def __init__(self) -> None:
        self._start: dict[str, tuple[float, int]] = {}
        self._newest: dict[str, int] = {}

    def remaining_s(self, what: str, step: int, total: int) -> float | None:
        """Return the seconds left of `what`, or None before the second report."""
        now = time.monotonic()
        if step < self._newest.get(what, step):
            del self._start[what]
        self._newest[what] = step
        began, first = self._start.setdefault(what, (now, step))
        done = step - first
        if done <= 0:
            return None
        return (now - began) / done * (total - step)


class JsonlReporter:
    """Appends every report to a JSON-lines file and, where asked, one short line to a stream."""

    def __init__(self, path: Path, *, label: str, echo: bool, min_interval_s: float = 2.0) -> None:
        self._path = path
        self._label = label
        self._echo = echo
        self._min_interval_s = min_interval_s
        self._eta = EtaEstimator()
        self._last = 0.0

    def step(self, step: int, total: int, /, *, what: str, **metrics: float) -> None:
        """Write one line, at most every `min_interval_s` seconds; the last step is always written."""
        remaining_s = self._eta.remaining_s(what, step, total)
        now = time.monotonic()
        if step < total and now - self._last < self._min_interval_s:
            return
        self._last = now
        self._write({"what": what, "step": step, "total": total, "eta_s": remaining_s, "metrics": metrics})

    def note(self, message: str) -> None:
        """Write one line with a message."""
        self._write({"note": message})

    def _write(self, line: Mapping[str, object]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **line}) + "\n")
        if self._echo:
            sys.stderr.write(f"[{self._label}] {render_progress(line)}\n")


def render_progress(line: Mapping[str, object]) -> str:
    """Return one progress line as people read it: `12/64 steps  loss 0.41  eta 1m40s`."""
    if "note" in line:
        return str(line["note"])
    metrics = line["metrics"]
    assert isinstance(metrics, Mapping)
    parts = [
        f"{line['step']}/{line['total']} {line['what']}",
        *(f"{name} {value:.4g}" for name, value in metrics.items()),
    ]
    remaining_s = line["eta_s"]
    parts.append("eta unknown" if remaining_s is None else f"eta {format_duration(float(str(remaining_s)))}")
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Return seconds as 42s, 3m05s or 2h10m."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
