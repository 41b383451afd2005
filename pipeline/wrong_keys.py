"""What is wrong with a file of settings, key by key: pydantic's errors in the words of whoever wrote the file."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

_MAX_SHOWN = 60


def wrong_keys(err: ValidationError, data: object) -> list[str]:
    """Return one line for each wrong key: its path, what is wanted, and what was got; `data` is what pydantic read."""
    wanted: dict[tuple[int | str, ...], list[str]] = {}
    missing: dict[tuple[int | str, ...], list[str]] = {}
    unknown: list[tuple[int | str, ...]] = []
    got: dict[tuple[int | str, ...], object] = {}
    for item in err.errors():
        path = _path(item["loc"], data)
        if item["type"] == "missing":
            path = (*path, item["loc"][-1])
            missing.setdefault(path[:-1], []).append(str(path[-1]))
            wanted[path] = ["this key is missing"]
        elif item["type"] == "extra_forbidden":
            unknown.append(path)
        else:
            # The options of a union fail one by one, each under a path of its own.
            message = item["msg"].removeprefix("Value error, ").replace("Input should be ", "want ", 1)
            wanted.setdefault(path, []).append(message)
            got[path] = item["input"]
    for path in unknown:
        meant = get_close_matches(str(path[-1]), missing.get(path[:-1], []), n=1)
        wanted[path] = [f"no such key; did you mean {meant[0]}?" if meant else "no such key: take it out"]
        if meant:
            del wanted[(*path[:-1], meant[0])]
    return [
        f"{'.'.join(map(str, path)) or 'the whole'}: {' or '.join(dict.fromkeys(messages))}{_shown(got.get(path))}"
        for path, messages in wanted.items()
    ]


def _path(loc: Sequence[int | str], data: object) -> tuple[int | str, ...]:
    """Return the part of pydantic's path that leads through the data: it also names the options of a union."""
    path: list[int | str] = []
    for step in loc:
        match data:
            case Mapping() if step in data:
                data = data[step]
            case list() if isinstance(step, int) and step < len(data):
                data = data[step]
            case _:
                continue
        path.append(step)
    return tuple(path)


def _shown(value: Any) -> str:
    """Return a value in words; a whole section says nothing."""
    if value is None or isinstance(value, Mapping | list | tuple):
        return ""
    text = repr(value)
    return f"; got {text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + '...'}"
