"""A reporter that keeps what it is told in words."""

from pipeline.progress import SilentReporter


class NotingReporter(SilentReporter):
    """Keeps every note."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        """Keep one."""
        self.notes.append(message)
