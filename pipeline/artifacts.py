"""Artifacts on disk: a directory per fingerprint, finished by an atomically renamed manifest, guarded by a lock.

    <root>/<asset>/<fingerprint>/...            the files
    <root>/<asset>/<fingerprint>/manifest.json  written last; without it the directory is an unfinished run to resume
    <root>/<asset>/<fingerprint>/identity.json  written first: what the fingerprint is the hash of
    <root>/<asset>/<fingerprint>.lock           held by the process that is making it

`content_hash` is computed from names and bytes alone, free of clocks and paths, so that equal artifacts are equal.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from pydantic import ConfigDict, ValidationError

from pipeline.architecture import Frozen
from pipeline.errors import ArtifactError, MissingInputError
from pipeline.fingerprint import fingerprint
from pipeline.stage import VIEW_DIR, WORK_DIR, StageResult

MANIFEST = "manifest.json"
RESULT = "result.json"
PROGRESS = "progress.jsonl"
IDENTITY = "identity.json"
STAGE_LOG = "stage.log"
MIN_FREE_BYTES = 512 * 2**20
LOCK_POLL_S = 0.5

_Record = TypeVar("_Record", bound=Frozen)


class FileEntry(Frozen):
    """One file of an artifact: its size and the sha256 of its bytes."""

    size_bytes: int
    sha256: str


class Manifest(Frozen):
    """What a finished artifact is."""

    asset: str
    fingerprint: str
    content_hash: str
    files: dict[str, FileEntry]
    provenance: dict[str, str | int | float]


class RunRecord(Frozen):
    """What a stage reported and how long it ran; kept beside the manifest and outside the content hash."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # pydantic asks the outermost model

    result: StageResult
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A finished artifact that has been opened and whose sizes have been checked."""

    path: Path
    manifest: Manifest
    record: RunRecord

    @property
    def content_hash(self) -> str:
        """The hash that downstream fingerprints read; Dagster's data version."""
        return self.manifest.content_hash

    def verify_hashes(self) -> None:
        """Read every byte and compare it with the manifest.

        Raises:
            ArtifactError: naming the first file that differs.
        """
        for name, entry in self.manifest.files.items():
            got = sha256_file(self.path / name)
            if got != entry.sha256:
                raise ArtifactError(
                    f"{self.path / name} has sha256 {got[:12]}..., its manifest says {entry.sha256[:12]}...: "
                    f"the file was changed after it was published; delete {self.path} and materialize "
                    f"{self.manifest.asset} again"
                )


class ArtifactStore:
    """The directory that holds every artifact of every recipe."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def directory(self, asset: str, artifact_fingerprint: str) -> Path:
        """Return where the artifact of that fingerprint is, or will be."""
        return self.root / asset / artifact_fingerprint

    def find(self, asset: str, artifact_fingerprint: str) -> Artifact | None:
        """Return the finished artifact, or None when there is none yet.

        Raises:
            ArtifactError: when there is a manifest that cannot be read, or a file of it is missing or has another size.
        """
        path = self.directory(asset, artifact_fingerprint)
        if not (path / MANIFEST).is_file():
            return None
        manifest = _read_record(path / MANIFEST, Manifest, asset=asset)
        for name, entry in manifest.files.items():
            file = path / name
            size_bytes = file.stat().st_size if file.is_file() else None
            if size_bytes != entry.size_bytes:
                got = "missing" if size_bytes is None else f"{size_bytes:,} bytes"
                raise ArtifactError(
                    f"{file} is {got}, its manifest says {entry.size_bytes:,} bytes: delete {path} and materialize "
                    f"{asset} again"
                )
        record = _read_record(path / RESULT, RunRecord, asset=asset)
        return Artifact(path=path, manifest=manifest, record=record)

    def open(self, asset: str, artifact_fingerprint: str) -> Artifact:
        """Return the finished artifact.

        Raises:
            MissingInputError: when it has not been materialized.
        """
        artifact = self.find(asset, artifact_fingerprint)
        if artifact is None:
            raise MissingInputError(
                f"{asset} {artifact_fingerprint} is not in {self.root}: materialize {asset} for this recipe first"
            )
        return artifact

    def finished(self, asset: str) -> list[Path]:
        """Return the directories of an asset's finished artifacts, sorted by fingerprint."""
        return [path for path in sorted((self.root / asset).glob("*")) if (path / MANIFEST).is_file()]

    @contextlib.contextmanager
    def locked(
        self, asset: str, artifact_fingerprint: str, *, on_wait: Callable[[str], None] = lambda _: None
    ) -> Iterator[Path]:
        """Hold the artifact's lock and give its directory; the lock dies with the process.

        Waits while another process makes the artifact, as happens when two targets are materialized at once and share
        their first stages; `on_wait` is told once who that is.
        """
        path = self.directory(asset, artifact_fingerprint)
        path.mkdir(parents=True, exist_ok=True)
        lock_path = path.with_name(path.name + ".lock")
        with lock_path.open("a+", encoding="utf-8") as lock:
            _acquire(lock, asset=asset, on_wait=on_wait)
            yield path

    def publish(
        self,
        asset: str,
        artifact_fingerprint: str,
        *,
        result: StageResult,
        wall_s: float,
        provenance: dict[str, str | int | float],
    ) -> Artifact:
        """Hash the files of a finished stage and write its manifest by rename; `_work/` is removed.

        `provenance` is kept in the manifest (code version, ranks, hardware); it is not part of the content hash.
        """
        path = self.directory(asset, artifact_fingerprint)
        files = {
            file.relative_to(path).as_posix(): FileEntry(size_bytes=file.stat().st_size, sha256=sha256_on_disk(file))
            for file in sorted(path.rglob("*"))
            if file.is_file() and _is_published(file.relative_to(path))
        }
        content = {name: entry.sha256 for name, entry in files.items() if Path(name).parts[0] != VIEW_DIR}
        manifest = Manifest(
            asset=asset,
            fingerprint=artifact_fingerprint,
            content_hash=fingerprint(content),
            files=files,
            provenance=provenance,
        )
        record = RunRecord(result=result, wall_s=wall_s)
        write_atomically(path / RESULT, record.model_dump_json(indent=1).encode())
        write_atomically(path / MANIFEST, manifest.model_dump_json(indent=1).encode())
        shutil.rmtree(path / WORK_DIR, ignore_errors=True)
        return Artifact(path=path, manifest=manifest, record=record)

    def require_free_space(self, needed_bytes: int = MIN_FREE_BYTES) -> None:
        """Refuse to begin when the disk cannot hold what is about to be written.

        Raises:
            ArtifactError: with the free and the needed space.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(self.root).free
        if free_bytes < needed_bytes:
            raise ArtifactError(
                f"{self.root} has {free_bytes / 2**20:,.0f} MiB free, this stage wants at least "
                f"{needed_bytes / 2**20:,.0f} MiB: free some space or move the store with REFIT_HOME"
            )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, even across a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}


def disk_error(err: BaseException, *, path: Path) -> ArtifactError | None:
    """Return an error of ours for one that the disk made while `path` was written, or None for any other.

    Libraries written in Rust put the system's number into the text of an error of their own.
    """
    number = err.errno if isinstance(err, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(err))):
        number = int(found.group(1))
    if number not in _DISK_ERRORS:
        return None
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free_mib = shutil.disk_usage(existing).free / 2**20
    named = getattr(err, "filename", None) or path
    return ArtifactError(
        f"{named} cannot be written: {os.strerror(number)}; {existing} has {free_mib:,.1f} MiB free: free some space, "
        "mend the permissions, or move the store with REFIT_HOME, and run again: what was saved is continued from"
    )


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_on_disk(path: Path) -> str:
    """Return the sha256 of a file once its bytes are on the disk, for a manifest that may outlive a power cut.

    Writers of safetensors, parquet and pickles leave them to the system, which may take half a minute.
    """
    _sync(path)
    return sha256_file(path)


def read_json(path: Path) -> dict[str, object]:
    """Return the JSON object in a file of an artifact."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def _read_record(path: Path, kind: type[_Record], *, asset: str) -> _Record:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as err:
        first = err.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'its JSON'}: {first['msg']}"
    except OSError as err:
        reason = str(err)
    raise ArtifactError(f"{path} cannot be read ({reason}): delete {path.parent} and materialize {asset} again")


def _is_published(relative: Path) -> bool:
    return (
        relative.parts[0] != WORK_DIR
        and relative.as_posix() not in (MANIFEST, RESULT, PROGRESS, STAGE_LOG, IDENTITY)
        and (not relative.name.startswith("."))
    )


def _acquire(lock: IO[str], *, asset: str, on_wait: Callable[[str], None]) -> None:
    told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not told:
                lock.seek(0)
                on_wait(f"waiting for process {lock.read().strip() or 'unknown'}, which is making {asset}")
                told = True
            time.sleep(LOCK_POLL_S)  # polled, so that a cancelled run stops waiting
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()
