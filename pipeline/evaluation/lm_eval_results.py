"""What lm-eval says of one checkpoint, as frozen models that are written to lm_eval.json. No torch, no lm-eval."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import ConfigDict

from pipeline.architecture import Frozen
from pipeline.artifacts import write_atomically
from pipeline.recipe import LmEvalPrompt

LM_EVAL_FILE = "lm_eval.json"


class LmEvalScore(Frozen):
    """One metric behind one filter of replies (`none` where there is none), as lm-eval reports it.

    `task` is the task of the recipe, or where that is a tag or a group without a mean of its own, one of its parts.
    `stderr` is lm-eval's standard error, None where it knows none.
    """

    # A broken checkpoint may measure NaN; JSON would turn that into null, and the file could not be read back.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    num_items: int

    @property
    def name(self) -> str:
        """The metric, with its filter where there is one: `exact_match, last-word`."""
        return self.metric if self.filter == "none" else f"{self.metric}, {self.filter}"


class LmEvalResult(Frozen):
    """One task under one prompt: what was asked, by which version, and every score."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    task: str
    prompt: LmEvalPrompt
    num_fewshot: int | None
    lm_eval_version: str
    task_versions: dict[str, str]
    scores: tuple[LmEvalScore, ...]


class LmEvalSet(Frozen):
    """The content of lm_eval.json: results by checkpoint, in the order of CHECKPOINTS; none where it is not asked."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    checkpoints: dict[str, tuple[LmEvalResult, ...]]


def write_lm_eval(directory: Path, *, checkpoints: Mapping[str, tuple[LmEvalResult, ...]]) -> None:
    """Write lm_eval.json."""
    text = LmEvalSet(checkpoints=dict(checkpoints)).model_dump_json(indent=1)
    write_atomically(directory / LM_EVAL_FILE, text.encode())


def read_lm_eval(directory: Path) -> dict[str, tuple[LmEvalResult, ...]]:
    """Read lm_eval.json; nothing where lm-eval was not asked."""
    path = directory / LM_EVAL_FILE
    return LmEvalSet.model_validate_json(path.read_bytes()).checkpoints if path.is_file() else {}
