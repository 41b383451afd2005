"""What the suite found, as the Markdown table of docs/serving.md."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One runtime on one case."""

    runtime: str
    case: str
    outcome: str
    version: str | None = None

    @classmethod
    def ran(cls, runtime: str, case: str, *, difference: float, is_same_text: bool, version: str) -> "Row":
        """The runtime answered."""
        outcome = f"{difference:.1e}" if is_same_text else f"{difference:.1e}, other text"
        return cls(runtime=runtime, case=case, outcome=outcome, version=version)

    @classmethod
    def refused(cls, runtime: str, case: str, *, reason: str) -> "Row":
        """The runtime, or our writer for it, ended with an error."""
        assert reason
        return cls(runtime=runtime, case=case, outcome="refused")


ROWS: list[Row] = []


def markdown(rows: list[Row]) -> str:
    """Return one line per case and one column per runtime, and the versions that answered."""
    runtimes = list(dict.fromkeys(row.runtime for row in rows))
    outcomes = {(row.case, row.runtime): row.outcome for row in rows}
    versions = {row.runtime: row.version for row in rows if row.version is not None}
    lines = [
        " | ".join(["| case", *(f"{runtime} {versions.get(runtime, '')}".strip() for runtime in runtimes)]) + " |",
        "|---" * (len(runtimes) + 1) + "|",
    ]
    for case in dict.fromkeys(row.case for row in rows):
        cells = [outcomes.get((case, runtime), "") for runtime in runtimes]
        lines.append(" | ".join([f"| {case}", *cells]) + " |")
    return "\n".join(lines)
