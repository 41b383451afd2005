"""sha256 of files outside the store, kept between processes: a parent of 140 GB is read once, not by every command.

A file is read again when its size or one of its times differs. Size and modification time alone would not do: archives
and wheels give every file one time, and two checkpoints of one architecture have the same size.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.architecture import Frozen
from pipeline.artifacts import sha256_file, write_atomically

# A file written twice within one tick of its file system's clock looks unchanged; the coarsest (FAT) ticks every 2 s.
SETTLED_S = 2.0


class _State(Frozen):
    """What tells that a file is still the one that was read."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int


class _Entry(Frozen):
    """A file as it was when it was read."""

    state: _State
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


_ENTRIES = TypeAdapter(dict[str, _Entry])
_READ_HERE: dict[str, _Entry] = {}


def hashes_of(files: Sequence[Path], *, kept_in: Path) -> dict[str, str]:
    """Return the sha256 of every file by its path as given, reading those alone that changed since they were read.

    Processes may share `kept_in`: what two of them add in the same moment, one of the two reads again another time.
    """
    found: dict[str, str] = {}
    kept: Mapping[str, _Entry] | None = None
    lasting: dict[str, _Entry] = {}
    for file in files:
        name, state = str(file.absolute()), _state(file)
        entry = _READ_HERE.get(name)
        if entry is None or entry.state != state:
            kept = _read(kept_in) if kept is None else kept
            entry = kept.get(name)
        if entry is None or entry.state != state:
            entry = _Entry(state=state, sha256=sha256_file(file))
            if _is_settled(file, state):
                lasting[name] = entry
        _READ_HERE[name] = entry
        found[str(file)] = entry.sha256
    if lasting:
        _keep(lasting, path=kept_in)
    return found


def _is_settled(file: Path, state: _State) -> bool:
    """Return whether a file is as it was before it was read, and old enough that its times would tell a change."""
    age_s = time.time() - max(state.mtime_ns, state.ctime_ns) / 1e9
    return _state(file) == state and age_s > SETTLED_S


def _state(file: Path) -> _State:
    found = file.stat()
    return _State(size_bytes=found.st_size, mtime_ns=found.st_mtime_ns, ctime_ns=found.st_ctime_ns)


def _read(path: Path) -> Mapping[str, _Entry]:
    try:
        return _ENTRIES.validate_json(path.read_bytes())
    except (OSError, ValidationError):  # missing or damaged: the files are read again, and it is written anew
        return {}


def _keep(entries: Mapping[str, _Entry], *, path: Path) -> None:
    """Add entries to the file, and drop those whose own file is gone."""
    kept = {name: entry for name, entry in {**_read(path), **entries}.items() if Path(name).is_file()}
    with contextlib.suppress(OSError):  # a home that cannot be written costs a second reading, not the command
        write_atomically(path, _ENTRIES.dump_json(kept, indent=1))
