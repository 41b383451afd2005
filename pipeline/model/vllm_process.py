"""vLLM in a process of its own environment, asked line by line; errors of vLLM come back as ours."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import StageError
from pipeline.model import vllm_driver
from pipeline.model.exported_code import configuration_decilm
from pipeline.processes import LineServer
from pipeline.runtimes import require_python

START_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 3600.0  # loading compiles


class VLLM:
    """The driver of pipeline.model.vllm_driver, which says what may be asked."""

    def __init__(self, *, work_dir: Path, num_threads: int, device: str = "") -> None:
        """The process starts with the first question.

        Args:
            work_dir: where vLLM's log goes.
            num_threads: of a CPU.
            device: the only GPU that it may see, by its number among those this process sees; empty for all of them.

        Raises:
            RuntimeMissingError: when vLLM is not installed.
        """
        self._log = work_dir / "vllm.log"
        # -P: what lies beside the driver is not for vLLM to import.
        settings = (str(self._log), str(num_threads), device, configuration_decilm.__file__)
        command = (str(require_python("vllm")), "-P", vllm_driver.__file__, *settings)
        self._server = LineServer(command, start_timeout_s=START_TIMEOUT_S)

    def __enter__(self) -> "VLLM":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._server.__exit__()

    def ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        """Return the driver's answer.

        Raises:
            StageError: with what vLLM said last when it fails, dies or runs past an hour.
        """
        what = f"{str(request)[:200]} ..."  # the prompts of a whole batch may stand in it
        line = self._server.ask(json.dumps(request), timeout_s=ANSWER_TIMEOUT_S)
        if line is None:
            tail = self._log.read_text(errors="replace").splitlines()[-12:] if self._log.is_file() else []
            raise StageError(f"vLLM gave no answer to {what}; it said last:\n" + "\n".join(tail))
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise StageError(f"vLLM failed at {what}:\n" + "\n".join(found["error"].strip().splitlines()[-12:]))
        return found
