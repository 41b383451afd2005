"""The tiny parent and tokens of the Puzzle tests, as a fixture of these tests, too."""

from tests.pipeline.puzzle.conftest import workplace

__all__ = ["workplace"]
