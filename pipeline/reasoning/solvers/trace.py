"""What a solver returns, and the shape that every solver has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """The steps that were taken, as they stand between think tags, and the answer they lead to."""

    text: str
    answer: str


# A solver reads the metadata that reasoning-gym gives with an item, never its reference answer; it returns None for an
# item that its algorithm does not cover.
Solver = Callable[[Mapping[str, Any]], Trace | None]
