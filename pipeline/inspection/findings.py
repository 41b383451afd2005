"""One thing that an examination found, and how a list of them reads on a terminal. Pure."""

from collections.abc import Sequence
from typing import Literal

from pipeline.architecture import Frozen

Severity = Literal["problem", "note", "ok"]

_MARKS: dict[Severity, str] = {"problem": "!!", "note": " -", "ok": "ok"}


class Finding(Frozen):
    """What was looked at, what was found, and what to do about it (nothing where all is well)."""

    severity: Severity
    subject: str
    detail: str
    next_step: str = ""


def render_findings(findings: Sequence[Finding]) -> str:
    """Return one line per finding, problems first, with the next step below."""
    order: list[Severity] = ["problem", "note", "ok"]
    lines = []
    for finding in sorted(findings, key=lambda one: order.index(one.severity)):
        lines.append(f"{_MARKS[finding.severity]} {finding.subject}: {finding.detail}")
        if finding.next_step:
            lines.append(f"     {finding.next_step}")
    num_problems = sum(finding.severity == "problem" for finding in findings)
    lines += ["", f"{num_problems} problem{'s' if num_problems != 1 else ''}" if num_problems else "no problems"]
    return "\n".join(lines)
