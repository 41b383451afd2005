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


def missing_paths(config: Frozen) -> list[str]:
    """Return the keys of the recipe, with their values, that name files which a stage of this config would not find."""
    return [key for key, files in _files_by_key(config).items() if not files]


def local_files(config: Frozen) -> list[Path]:
    """Return the files outside the store that a stage of this config reads and that are there."""
    return [file for files in _files_by_key(config).values() for file in files]


def _files_by_key(config: Frozen) -> dict[str, list[Path]]:
    """Return what is there of every path that a stage of this config is given, by its key and value."""
    if isinstance(config, ParentStage) and isinstance(config.parent, LocalParent):
        directory = Path(config.parent.path).expanduser()
        return {f"parent.path {config.parent.path}": _below(directory, "*") + _below(directory / SUBBLOCKS_DIR, "*")}
    if isinstance(config, RLConfig) and config.reward_model is not None:
        path = config.reward_model.path
        return {f"rl.reward_model.path {path}": _below(Path(path).expanduser(), "*")}
    if isinstance(config, EvaluationStage) and config.evaluation.lm_eval is not None:
        include_path = config.evaluation.lm_eval.include_path
        key = f"evaluation.lm_eval.include_path {include_path}"
        return {} if include_path is None else {key: _task_files(include_path)}
    if isinstance(config, CorporaStage):
        return {
            f"corpora.sources {source.name}, path {source.path}": _source_files(source)
            for source in config.corpora.sources
            if isinstance(source, FileSource) or (isinstance(source, DatasetSource) and source.revision is None)
        }
    if isinstance(config, TracesStage):
        asked = {endpoint.name: endpoint.prompts for endpoint in config.traces.endpoints}
        return {
            f"reasoning_traces.imports {rows.name}, path {rows.path}": _matching(rows.path)
            for rows in config.traces.imports
        } | {
            f"reasoning_traces.endpoints {name}, prompts.path {prompts.path}": [
                file for file in (Path(prompts.path),) if file.is_file()
            ]
            for name, prompts in asked.items()
            if isinstance(prompts, FilePrompts)
        }
    return {}


def _source_files(source: FileSource | DatasetSource) -> list[Path]:
    return _matching(source.path) if isinstance(source, FileSource) else _below(Path(source.path), "**/*")


def _is_library(source: SourceConfig) -> bool:
    return source.kind == "embedded" and source.name == "python-stdlib"


def _task_files(include_path: str) -> list[Path]:
    try:
        return files_read_by(include_path)
    except DataError:  # the stage says what is wrong with them
        return _below(Path(include_path).expanduser(), "**/*")


def _matching(glob: str) -> list[Path]:
    pattern = Path(glob)
    return _below(Path(pattern.anchor or "."), str(pattern.relative_to(pattern.anchor)))


def _below(directory: Path, pattern: str) -> list[Path]:
    return sorted(path for path in directory.glob(pattern) if path.is_file()) if directory.is_dir() else []
