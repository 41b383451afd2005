"""How sums of block times become predictions: one factor per scenario and phase, from whole models that were measured.

    predicted_ms(child) = factor * (fixed_ms + sum over layers of attention_ms + ffn_ms)

The profile sets the factor so that the parent's prediction is its measurement; a child that was measured sets it anew,
because what a sum of blocks leaves out weighs more in a shallow, narrow child.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from pipeline.architecture import Frozen

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, Phase] = ("prefill", "decode")


class CalibrationEntry(Frozen):
    """One scenario and phase: the factor on sums, and the parent's measured time that relative limits refer to."""

    scenario: str
    phase: Phase
    factor: float = Field(gt=0)
    parent_ms: float = Field(gt=0)


class Calibration(Frozen):
    """The factors of every scenario and phase."""

    entries: tuple[CalibrationEntry, ...]

    def get(self, scenario: str, phase: Phase) -> CalibrationEntry:
        """Return the entry of one scenario and phase."""
        return next(entry for entry in self.entries if (entry.scenario, entry.phase) == (scenario, phase))


Times = Mapping[tuple[str, Phase], float]


def calibrate(*, sum_ms: Times, measured_ms: Times, parent_ms: Times) -> Calibration:
    """Return the calibration under which a model whose blocks add up to `sum_ms` is predicted to take `measured_ms`.

    Args:
        sum_ms: uncalibrated sums of block times of the measured model, by scenario and phase.
        measured_ms: its measured times; for the profile these are the parent's, after a search the child's.
        parent_ms: the parent's times measured in the same sitting.
    """
    return Calibration(
        entries=tuple(
            CalibrationEntry(
                scenario=scenario,
                phase=phase,
                factor=measured_ms[scenario, phase] / sum_ms[scenario, phase],
                parent_ms=parent_ms[scenario, phase],
            )
            for scenario, phase in sum_ms
        )
    )


def relative_residuals(*, sum_ms: Times, measured_ms: Times) -> dict[tuple[str, Phase], float]:
    """Return |sum - measured| / measured for every scenario and phase, before calibration."""
    return {key: abs(sum_ms[key] - measured_ms[key]) / measured_ms[key] for key in sum_ms}
