"""The process that judges answers: python -m pipeline.reasoning.grader. One JSON question a line, one answer a line.

Verifiers are third-party code fed with what a model wrote: some raise, some never end, and some powers of powers fill
the memory. Here they can, and whoever asks kills the process (pipeline.reasoning.grading).
"""

import json
import logging
import re
import resource
import sys
from typing import Any

from pipeline.data.reasoning_items import ReasoningItem, ask_scorer

READY = "ready"
_MAX_MEMORY_BYTES = 4 * 2**30
_WORDS = re.compile(r"[^\W\d_]{2}[^\d\\${}^=<>]*")


def is_equal_answer(answer: str, *, reference: str) -> bool:
    r"""Return whether two answers are the same words, or the same mathematics by math-verify.

    Words are compared as words: math-verify reads Paris as p * a * r * i * s, which pairs equals.
    """
    if _plain(answer) == _plain(reference):
        return True
    if _WORDS.fullmatch(reference.strip()):
        return False
    from math_verify import parse, verify  # needs a second, and tasks with a scorer of their own do without it

    # Its own time-outs use signals; the process is killed from outside instead.
    wanted = parse(f"\\boxed{{{reference}}}", parsing_timeout=0)
    got = parse(f"\\boxed{{{answer}}}", parsing_timeout=0)
    return bool(verify(wanted, got, timeout_seconds=0))


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").casefold()


def _judge(question: dict[str, Any]) -> bool:
    if question["kind"] == "task":
        item = ReasoningItem.model_validate(question["item"])
        return ask_scorer(item, question["answer"]) == 1.0
    return is_equal_answer(question["answer"], reference=question["reference"])


def main() -> None:
    """Answer until standard input ends."""
    # macOS refuses this limit (EINVAL) and keeps none of its kind; there, time alone ends a question that grows.
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    logging.disable()  # math-verify warns once per question that its time-outs are off
    print(READY, flush=True)  # noqa: T201  the line protocol
    for line in sys.stdin:
        try:
            found: dict[str, Any] = {"is_right": _judge(json.loads(line))}
        except Exception as err:  # noqa: BLE001  third-party code fed with whatever a model wrote
            found = {"error": type(err).__name__}
        print(json.dumps(found), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
