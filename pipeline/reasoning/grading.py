"""Answers judged in a process of their own that is killed when it takes too long: right, wrong, or no verdict.

A verifier that raised, hung or died says nothing about the answer; it is never counted as wrong.
"""

import json
import re
import sys
from dataclasses import dataclass

from pipeline.data.reasoning_items import ReasoningItem
from pipeline.processes import LineServer

_START_TIMEOUT_S = 120.0
_BOXED = re.compile(r"\\boxed\s*\{")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """A verdict, or why there is none."""

    is_right: bool
    error: str | None


class Grader:
    """Judges answers one at a time; use it as a context, which ends its process."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._server = LineServer([sys.executable, "-m", "pipeline.reasoning.grader"], start_timeout_s=_START_TIMEOUT_S)

    def __enter__(self) -> "Grader":
        """Return itself."""
        return self

    def __exit__(self, *details: object) -> None:
        """End the process."""
        self._server.__exit__(*details)

    def grade_task(self, answer: str, *, item: ReasoningItem) -> Grade:
        """Judge by the scorer of the task that the item belongs to."""
        return self._ask({"kind": "task", "item": item.model_dump(mode="json"), "answer": answer})

    def grade_equal(self, answer: str, *, reference: str) -> Grade:
        """Judge by comparing with a reference, as words or as mathematics."""
        return self._ask({"kind": "equal", "answer": answer, "reference": reference})

    def _ask(self, question: dict[str, object]) -> Grade:
        line = self._server.ask(json.dumps(question), timeout_s=self._timeout_s)
        if line is None:
            return Grade(is_right=False, error=f"no verdict in {self._timeout_s:g} s")
        found = json.loads(line)
        return Grade(is_right=found.get("is_right", False), error=found.get("error"))


def final_answer(text: str) -> str:
    r"""Return what the visible part of a reply comes to: its last \boxed{...}, or else its last line with words."""
    starts = [match.end() for match in _BOXED.finditer(text)]
    if starts:
        depth, start = 1, starts[-1]
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
        return text[start:].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
