"""What a stage reads from outside the recipe and the store, by content: a part of the stage's identity.

Files are listed as their readers list them. What is missing is left out: the stage says what is wrong, and an identity
must be there to be asked for.
"""

import sys
from pathlib import Path

from pipeline.architecture import Frozen
from pipeline.errors import DataError
from pipeline.evaluation.task_files import files_read_by
from pipeline.file_hashes import hashes_of
from pipeline.model.shards import SUBBLOCKS_DIR
from pipeline.recipe import DatasetSource, FilePrompts, FileSource, LocalParent, RLConfig, SourceConfig
from pipeline.stages.configs import CorporaStage, EvaluationStage, ParentStage, TracesStage

HASHES_FILE = "file_hashes.json"  # beside the store


def environment_of(config: Frozen, *, home: Path) -> dict[str, str]:
    """Return the sha256 of every local file a stage reads, and the interpreter's version where its library is data.

    The hashes are kept in `home`: a file is read once while it stays as it is.
    """
    files = local_files(config)
    found = hashes_of(files, kept_in=home / HASHES_FILE) if files else {}
    if isinstance(config, CorporaStage) and any(_is_library(source) for source in config.corpora.sources):
        found["python"] = sys.version.split()[0]
    return found


def local_files(config: Frozen) -> list[Path]:
    """Return the files outside the store that a stage of this config reads and that are there."""
    if isinstance(config, ParentStage) and isinstance(config.parent, LocalParent):
        directory = Path(config.parent.path).expanduser()
        return _below(directory, "*") + _below(directory / SUBBLOCKS_DIR, "*")
    if isinstance(config, RLConfig) and config.reward_model is not None:
        return _below(Path(config.reward_model.path).expanduser(), "*")
    if isinstance(config, EvaluationStage) and config.evaluation.lm_eval is not None:
        return _task_files(config.evaluation.lm_eval.include_path)
    if isinstance(config, CorporaStage):
        return [file for source in config.corpora.sources for file in _source_files(source)]
    if isinstance(config, TracesStage):
        prompts = (endpoint.prompts for endpoint in config.traces.endpoints)
        questions = [Path(one.path) for one in prompts if isinstance(one, FilePrompts)]
        imported = [file for rows in config.traces.imports for file in _matching(rows.path)]
        return imported + [file for file in questions if file.is_file()]
    return []


def _source_files(source: SourceConfig) -> list[Path]:
    if isinstance(source, DatasetSource):
        return _below(Path(source.path), "**/*")
    return _matching(source.path) if isinstance(source, FileSource) else []


def _is_library(source: SourceConfig) -> bool:
    return source.kind == "embedded" and source.name == "python-stdlib"


def _task_files(include_path: str | None) -> list[Path]:
    if include_path is None:
        return []
    try:
        return files_read_by(include_path)
    except DataError:  # the stage says what is wrong with them
        return _below(Path(include_path).expanduser(), "**/*")


def _matching(glob: str) -> list[Path]:
    pattern = Path(glob)
    return _below(Path(pattern.anchor or "."), str(pattern.relative_to(pattern.anchor)))


def _below(directory: Path, pattern: str) -> list[Path]:
    return sorted(path for path in directory.glob(pattern) if path.is_file()) if directory.is_dir() else []
