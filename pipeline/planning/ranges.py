"""An estimate as low, expected and high, and the arithmetic that keeps the three apart. Pure."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Three values of one quantity; low <= expected <= high."""

    low: float
    expected: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.expected <= self.high:
            raise ValueError(f"a range must rise from 0, got {self.low}, {self.expected}, {self.high}")

    @classmethod
    def of(cls, value: float) -> Self:
        """Return a quantity that is known exactly."""
        return cls(low=value, expected=value, high=value)

    def __add__(self, other: "Range | float") -> "Range":
        """Return the sum, end by end."""
        if not isinstance(other, Range):
            other = Range.of(other)
        return Range(low=self.low + other.low, expected=self.expected + other.expected, high=self.high + other.high)

    def times(self, factor: float) -> "Range":
        """Return every value times one factor."""
        return Range(low=factor * self.low, expected=factor * self.expected, high=factor * self.high)

    def over(self, rate: "Range") -> "Range":
        """Return this quantity divided by a rate: the least by the fastest, the most by the slowest."""
        return Range(low=self.low / rate.high, expected=self.expected / rate.expected, high=self.high / rate.low)

    def at_least(self, other: "Range") -> "Range":
        """Return the larger of two at each end."""
        return Range(
            low=max(self.low, other.low),
            expected=max(self.expected, other.expected),
            high=max(self.high, other.high),
        )

    def holds(self, value: float) -> bool:
        """Return whether a measured value lies within."""
        return self.low <= value <= self.high


ZERO = Range.of(0.0)
