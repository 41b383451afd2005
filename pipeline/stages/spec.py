"""The file that tells a stage process what to run: config, inputs, output, execution. No torch."""

import contextlib
import importlib
from pathlib import Path
from typing import Any, Self

from pipeline.architecture import Frozen
from pipeline.progress import Reporter
from pipeline.stage import WORK_DIR, ExecutionSettings, StageInputs

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

    @classmethod
    def of(cls, config: Frozen, inputs: StageInputs, out_dir: Path) -> Self:
        """Describe what a stage would be given in this process."""
        return cls(
            config_type=f"{type(config).__module__}:{type(config).__name__}",
            config=config.model_dump(mode="json"),
            artifacts={name: str(path.absolute()) for name, path in inputs.artifacts.items()},
            store_root=str(inputs.store_root.absolute()),
            downloads=str(inputs.downloads.absolute()),
            out_dir=str(out_dir.absolute()),
            execution=inputs.execution,
        )

    def inputs(self, reporter: Reporter) -> StageInputs:
        """Return what the stage is given, and who listens."""
        return StageInputs(
            artifacts={name: Path(path) for name, path in self.artifacts.items()},
            store_root=Path(self.store_root),
            downloads=Path(self.downloads),
            execution=self.execution,
            reporter=reporter,
        )

    def parse_config(self) -> Frozen:
        """Return the stage's config as the type it was written from."""
        module, _, name = self.config_type.partition(":")
        if module != "pipeline.stages.configs" and not module.startswith("pipeline.recipe."):
            raise ValueError(f"config_type is {self.config_type!r}; a stage's config is a model of this project")
        config: Frozen = getattr(importlib.import_module(module), name).model_validate(self.config)
        return config


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
