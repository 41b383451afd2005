"""The file that tells a stage process what to run: config, inputs, output, execution. No torch."""

import contextlib
import importlib
from pathlib import Path
from typing import Any

from pipeline.architecture import Frozen
from pipeline.stage import WORK_DIR, ExecutionSettings

SPEC_FILE = "spec.json"
RESULT_IN_WORK = f"{WORK_DIR}/result.json"
ERROR_IN_WORK = f"{WORK_DIR}/error.txt"


class StageSpec(Frozen):
    """Everything a stage process needs; paths are absolute."""

    config_type: str
    config: dict[str, Any]
    artifacts: dict[str, str]
    store_root: str
    downloads: str
    out_dir: str
    execution: ExecutionSettings

    def parse_config(self) -> Frozen:
        """Return the stage's config as the type it was written from."""
        module, _, name = self.config_type.partition(":")
        if module != "pipeline.stages.configs" and not module.startswith("pipeline.recipe."):
            raise ValueError(f"config_type is {self.config_type!r}; a stage's config is a model of this project")
        config: Frozen = getattr(importlib.import_module(module), name).model_validate(self.config)
        return config


def config_type_name(config: Frozen) -> str:
    """Return how a spec names the type of a config."""
    return f"{type(config).__module__}:{type(config).__name__}"


def leave_error(out_dir: Path, error: Exception) -> None:
    """Tell the process that started the stage, in one message, why it ended; the log has the rest."""
    with contextlib.suppress(OSError):  # on a full disk the exit code and the log must do
        (out_dir / ERROR_IN_WORK).write_text(str(error), encoding="utf-8")


def take_error(out_dir: Path) -> str | None:
    """Return and remove what leave_error wrote, or None."""
    path = out_dir / ERROR_IN_WORK
    if not path.is_file():
        return None
    message = path.read_text(encoding="utf-8", errors="replace")
    path.unlink()
    return message or None
