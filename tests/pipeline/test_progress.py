"""Progress lines: throttled, complete at the end, and readable."""

import json
from pathlib import Path

import pytest

from pipeline import progress
from pipeline.progress import EtaEstimator, JsonlReporter, format_duration, render_progress


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """Stand in for time.monotonic."""
        return self.now

    def time(self) -> float:
        """Stand in for time.time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eta_has_no_value_before_there_is_evidence(clock: Clock):
    assert EtaEstimator().remaining_s("steps", 5, 10) is None


def test_eta_of_a_resumed_stage_counts_its_own_steps_only(clock: Clock):
    eta = EtaEstimator()
    eta.remaining_s("steps", 80, 100)
    clock.now += 10

    assert eta.remaining_s("steps", 85, 100) == pytest.approx(30.0)


def test_eta_of_work_that_begins_anew_under_its_name_is_measured_anew(clock: Clock):
    eta = EtaEstimator()
    eta.remaining_s("steps", 0, 100)
    clock.now += 1000
    eta.remaining_s("steps", 100, 100)
    assert eta.remaining_s("steps", 0, 10) is None
    clock.now += 1
    assert eta.remaining_s("steps", 5, 10) == pytest.approx(1.0)


def test_reporter_throttles_steps_and_always_writes_the_last(clock: Clock, tmp_path: Path):
    reporter = JsonlReporter(tmp_path / "progress.jsonl", label="kd", echo=False, min_interval_s=2.0)
    for step in range(1, 11):
        clock.now += 0.5
        reporter.step(step, 10, what="steps", loss=1.0 / step)

    assert [line["step"] for line in _lines(tmp_path / "progress.jsonl")] == [1, 5, 9, 10]


def test_reporter_line_holds_metrics_and_eta(clock: Clock, tmp_path: Path):
    reporter = JsonlReporter(tmp_path / "progress.jsonl", label="kd", echo=False, min_interval_s=0.0)
    reporter.step(1, 3, what="steps", loss=0.5)
    clock.now += 4
    reporter.step(2, 3, what="steps", loss=0.25)

    assert _lines(tmp_path / "progress.jsonl")[1] == {
        "time": 104.0,
        "what": "steps",
        "step": 2,
        "total": 3,
        "eta_s": 4.0,
        "metrics": {"loss": 0.25},
    }


def test_reporter_note_is_never_throttled(clock: Clock, tmp_path: Path):
    reporter = JsonlReporter(tmp_path / "progress.jsonl", label="kd", echo=False)
    reporter.note("first")
    reporter.note("second")

    assert [line["note"] for line in _lines(tmp_path / "progress.jsonl")] == ["first", "second"]


def test_render_progress_reads_as_a_sentence():
    line = {"what": "steps", "step": 12, "total": 64, "eta_s": 100.4, "metrics": {"loss": 0.41234}}

    assert render_progress(line) == "12/64 steps  loss 0.4123  eta 1m40s"
    assert render_progress({"note": "the library is complete"}) == "the library is complete"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7800, "2h10m")]
)
def test_format_duration_rounds_to_what_people_read(seconds: float, text: str):
    assert format_duration(seconds) == text
