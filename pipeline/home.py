"""Where all state lies: REFIT_HOME, or `.refit` beside the Makefile. Knows nothing of what lies there."""

import os
from pathlib import Path

_BESIDE_MAKEFILE = Path(__file__).resolve().parents[1] / ".refit"


def refit_home() -> Path:
    """Return the directory of all state: REFIT_HOME, or .refit beside the repository's Makefile."""
    return Path(os.environ.get("REFIT_HOME", _BESIDE_MAKEFILE)).absolute()
