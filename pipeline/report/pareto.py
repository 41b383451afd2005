"""Quality against measured speed: the children of every target as points, and those that no other beats.

Children are comparable where the same text was read and the same phase timed: each such group is a panel of its own.
Before distillation the text is the mixture's validation tokens (asset baselines); of the assembled child and the final
checkpoint it is held-out text, with an interval (assets evaluation and speed_report).
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.artifacts import read_json
from pipeline.errors import ArtifactError
from pipeline.evaluation.results import read_evaluations
from pipeline.puzzle.baselines import PUZZLE, WITHOUT_BLD
from pipeline.puzzle.tables import CHILDREN, read_table

PARENT, CHILD, FINAL = "parent", "child", "final"
# What the search itself chose, in its forms; every other method is a baseline.
OURS = (PUZZLE, WITHOUT_BLD, CHILD, FINAL)
SPEED_FILE = "speed.json"
# The name that the evaluation gives what the speed report calls so.
EVALUATED = {CHILD: "child", FINAL: "rl"}

Text = Literal["validation", "held-out"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """What must be equal for two children to be compared."""

    text: Text
    scenario: str
    phase: str

    @property
    def title(self) -> str:
        """What is read and what is timed."""
        return f"{self.text} text; {self.phase} speed, {self.scenario}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A figure and its interval; the figure itself where none is known."""

    value: float
    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> "Span":
        """Return a figure without an interval."""
        return cls(value=value, low=value, high=value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One child: how far from the parent in nats per token, and how many times as fast as it was measured to be."""

    target: str
    method: str
    panel: Panel
    speedup: Span
    kl: Span
    num_parameters: int | None

    @property
    def is_ours(self) -> bool:
        """Whether the search chose it."""
        return self.method in OURS

    def beats(self, other: "Point") -> bool:
        """Return whether it is at least as fast and as close to the parent, and better in one of the two."""
        ours, theirs = (self.speedup.value, -self.kl.value), (other.speedup.value, -other.kl.value)
        return ours != theirs and all(a >= b for a, b in zip(ours, theirs, strict=True))


def read_baselines(directory: Path, *, target: str) -> list[Point]:
    """Return the children of a baselines artifact, as they are before any distillation."""
    return [
        Point(
            target=target,
            method=row["method"],
            panel=Panel(text="validation", scenario=row["scenario"], phase=row["phase"]),
            speedup=Span(value=row["measured_speedup"], low=row["speedup_low"], high=row["speedup_high"]),
            kl=Span.exactly(row["kl"]),
            num_parameters=row["num_parameters"],
        )
        for row in read_table(directory, CHILDREN).iter_rows(named=True)
    ]


def read_checkpoints(
    evaluation_dir: Path, speed_dir: Path, *, target: str, scenarios: Sequence[str], phase: str
) -> list[Point]:
    """Return the assembled child and the final checkpoint of a target, each timed and read on held-out text.

    Of a swept scenario's batches, given by name, the report has the one that the search chose.

    Raises:
        ArtifactError: when the speed report has no such scenario.
    """
    evaluations = read_evaluations(evaluation_dir)
    report = read_json(speed_dir / SPEED_FILE)
    rows = report["speed"]
    assert isinstance(rows, list)
    timed = {
        row["model"]: row
        for row in rows
        if row["backend"] == report["backend_of_limits"] and row["scenario"] in scenarios and row["phase"] == phase
    }
    if not timed:
        raise ArtifactError(
            f"{speed_dir / SPEED_FILE} has no {phase} of scenario {' or '.join(scenarios)}: make speed_report again"
        )
    points = []
    for name, evaluated in EVALUATED.items():
        row, found = timed[name], evaluations[evaluated]
        kl = found.text_overall.kl_nats_per_token
        points.append(
            Point(
                target=target,
                method=name,
                panel=Panel(text="held-out", scenario=row["scenario"], phase=phase),
                speedup=Span(value=row["speedup"], low=row["speedup_low"], high=row["speedup_high"]),
                kl=Span(value=kl.value, low=kl.low, high=kl.high),
                num_parameters=found.num_parameters,
            )
        )
    return points


def by_panel(points: Sequence[Point]) -> dict[Panel, list[Point]]:
    """Return the points of each panel, the parent first: as fast as itself, at no distance."""
    panels: dict[Panel, list[Point]] = {}
    for point in points:
        panels.setdefault(point.panel, [_parent(point.panel)]).append(point)
    return panels


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats, from the slowest to the fastest; a distance that is no number never is."""
    sound = [point for point in points if math.isfinite(point.kl.value)]
    best = [point for point in sound if not any(other.beats(point) for other in sound)]
    return sorted(best, key=lambda point: (point.speedup.value, -point.kl.value))


def dominated_targets(points: Sequence[Point]) -> dict[str, str]:
    """Return the targets in which a baseline beats the search's child, with the closest such baseline.

    Children are compared within their own target: they were chosen under the same limits.
    """
    found = {}
    for ours in points:
        if ours.method != PUZZLE:
            continue
        rivals = [other for other in _rivals(ours, points) if other.beats(ours)]
        if rivals:
            found[ours.target] = min(rivals, key=lambda other: other.kl.value).method
    return found


def missing(found: Mapping[str, Collection[str]], targets: Sequence[str]) -> dict[str, list[str]]:
    """Return the assets that each incomplete target lacks, from the targets found of each asset."""
    lacks = {target: [asset for asset, there in found.items() if target not in there] for target in targets}
    return {target: assets for target, assets in lacks.items() if assets}


def _rivals(ours: Point, points: Sequence[Point]) -> Iterator[Point]:
    for other in points:
        if (other.target, other.panel) == (ours.target, ours.panel) and not other.is_ours:
            yield other


def _parent(panel: Panel) -> Point:
    return Point(
        target="",
        method=PARENT,
        panel=panel,
        speedup=Span.exactly(1.0),
        kl=Span.exactly(0.0),
        num_parameters=None,
    )
