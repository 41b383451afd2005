"""The task files of a directory that a recipe includes: which tasks they define, and every file their results hang on.

Read as data, before lm-eval is loaded. A task file is its owner's code all the same: `!function` names Python beside it
and its templates may run Python, too. Refused is what would run code of somebody else: metrics fetched from a hub, and
programs that a model wrote. (Data sets bring none: datasets 4 and later run no scripts.)
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import DataError

# Readers of datasets that fetch nothing; any other dataset_path that is no local directory names a set of the hub.
LOCAL_READERS = frozenset({"arrow", "csv", "json", "parquet", "text"})

_REFUSED = {
    "hf_evaluate": "its metric is a script that would be fetched from the Hugging Face hub and run",
    "unsafe_code": "it runs programs that the model wrote",
}


def read_task_files(include_path: str) -> dict[Path, dict[str, Any]]:
    """Return every task file below a directory, and whatever these include, by its path, as the mapping it holds.

    Raises:
        DataError: when there is no such directory or no file in it, a file is no YAML, or it would run foreign code.
    """
    directory = Path(include_path).expanduser().resolve()
    if not directory.is_dir():
        raise DataError(
            f"evaluation.lm_eval.include_path is {include_path!r}, which is no directory: give one, or null"
        )
    waiting = sorted(directory.rglob("*.yaml"), reverse=True)
    if not waiting:
        raise DataError(f"evaluation.lm_eval.include_path {include_path!r} holds no *.yaml: put task files in it")
    found: dict[Path, dict[str, Any]] = {}
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = _read(path)
            waiting += [(path.parent / name).resolve() for name in _texts(found[path].get("include"))]
    return found


def names_of(task_files: dict[Path, dict[str, Any]]) -> list[str]:
    """Return the names under which the files' tasks, groups and tags can be asked for."""
    found: set[str] = set()
    for config in task_files.values():
        found.update(name for key in ("task", "group") if isinstance(name := config.get(key), str))
        found.update(_texts(config.get("tag")))
    return sorted(found)


def files_read_by(include_path: str) -> list[Path]:
    """Return every file below the directory, and the files elsewhere that its task files include or read.

    Raises:
        DataError: as read_task_files.
    """
    directory = Path(include_path).expanduser().resolve()
    found = {path for path in directory.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    for path, config in read_task_files(include_path).items():
        found.add(path)
        found.update(path for pattern in _data_files(config) for path in _matching(pattern))
    return sorted(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise DataError(f"task file {path} cannot be read as YAML: {err}") from err
    if not isinstance(config, dict):
        raise DataError(f"task file {path} holds a {type(config).__name__}, wanted a mapping with a key `task`")
    for key, value in _pairs(config):
        if key in _REFUSED and value is not False:
            raise DataError(f"task file {path} sets {key}: {_REFUSED[key]}; leave it out")
    return config


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key), item
            yield from _pairs(item)
    elif isinstance(value, list):
        for item in value:
            yield from _pairs(item)


def _data_files(config: dict[str, Any]) -> Iterator[str]:
    for key, value in _pairs(config):
        if key == "data_files":
            yield from _texts(value)
        elif key == "dataset_path" and isinstance(value, str) and Path(value).is_dir():
            yield f"{value}/**/*"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    root = Path(path.anchor or ".")
    return (
        [] if "://" in pattern else [file for file in root.glob(str(path.relative_to(path.anchor))) if file.is_file()]
    )


class _TaskLoader(yaml.SafeLoader):
    """A safe loader that reads `!function module.name` as that text."""


def _function_name(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


_TaskLoader.add_constructor("!function", _function_name)
