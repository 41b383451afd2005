"""Sizes and locks of a store's files. Read only."""

import fcntl
from pathlib import Path


def directory_bytes(path: Path) -> int:
    """Return the bytes of all files below a directory; links are not followed."""
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def lock_holder(lock_path: Path) -> str | None:
    """Return the process that holds a lock file, or None when nobody does."""
    with lock_path.open(encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read().strip() or "unknown"
        fcntl.flock(lock, fcntl.LOCK_UN)
    return None
