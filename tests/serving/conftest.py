"""Prints the table of the suite when it ends."""

from typing import Any

from tests.serving.table import ROWS, markdown


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if ROWS:
        terminalreporter.write_sep("-", "max |difference of a log-probability|, fp32")
        terminalreporter.write_line(markdown(ROWS))
