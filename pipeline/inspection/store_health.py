"""What is wrong with an artifact store: locks, unfinished or broken artifacts, and where the disk goes. Read only."""

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.artifacts import MANIFEST, MIN_FREE_BYTES
from pipeline.costs import MIB
from pipeline.errors import ArtifactError
from pipeline.execution import Workspace, has_saved_work
from pipeline.inspection.files import directory_bytes, lock_holder
from pipeline.inspection.findings import Finding
from pipeline.inspection.garbage import find_garbage
from pipeline.progress import format_duration
from pipeline.recipe import Recipe

GIB = 2**30


def examine_store(workspace: Workspace, *, recipes: Sequence[Recipe], verify: bool) -> tuple[Finding, ...]:
    """Return what an examination of the store found; with `verify` every byte is read and hashed again.

    Garbage is what none of `recipes` refers to.
    """
    root = workspace.store.root
    if not root.is_dir():
        return (Finding(severity="ok", subject="store", detail=f"{root} does not exist yet: nothing has been made"),)
    return (
        *_examine_space(root),
        *_examine_locks(root),
        *_examine_artifacts(workspace, verify=verify),
        *_examine_garbage(workspace, recipes=recipes),
    )


def _examine_space(root: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(root).free
    used = {asset.name: directory_bytes(asset) for asset in sorted(root.iterdir()) if asset.is_dir()}
    largest = sorted(used.items(), key=lambda item: -item[1])[:5]
    detail = ", ".join(f"{name} {size / MIB:,.0f} MiB" for name, size in largest if size >= MIB)
    yield Finding(
        severity="ok" if free >= MIN_FREE_BYTES else "problem",
        subject="disk",
        detail=f"{root} holds {sum(used.values()) / GIB:,.2f} GiB, {free / GIB:,.1f} GiB are free"
        + (f"; most in {detail}" if detail else ""),
        next_step="" if free >= MIN_FREE_BYTES else "free some space, or move the store with REFIT_HOME",
    )


def _examine_locks(root: Path) -> Iterator[Finding]:
    num_free = 0
    for path in sorted(root.glob("*/*.lock")):
        holder = lock_holder(path)
        if holder is None:
            num_free += 1
            continue
        held_s = max(0.0, time.time() - path.stat().st_mtime)
        yield Finding(
            severity="note",
            subject="lock",
            detail=f"{path.parent.name}/{path.stem} is being made by process {holder}, for {format_duration(held_s)}",
            next_step="wait for it, or end that process: the lock dies with it",
        )
    yield Finding(severity="ok", subject="locks", detail=f"{num_free} lock files are free; they need no removal")


def _examine_artifacts(workspace: Workspace, *, verify: bool) -> Iterator[Finding]:
    num_sound = 0
    for directory in sorted(path for path in workspace.store.root.glob("*/*") if path.is_dir()):
        if not (directory / MANIFEST).is_file():
            yield from _examine_unfinished(directory)
            continue
        try:
            artifact = workspace.store.find(directory.parent.name, directory.name)
            if artifact is not None and verify:
                artifact.verify_hashes()
            num_sound += 1
        except ArtifactError as err:
            yield Finding(severity="problem", subject="artifact", detail=str(err))
    checked = "every byte is that of its manifest" if verify else "sizes are right; --verify reads every byte"
    yield Finding(severity="ok", subject="artifacts", detail=f"{num_sound} are complete: {checked}")


def _examine_unfinished(directory: Path) -> Iterator[Finding]:
    lock = directory.with_name(directory.name + ".lock")
    if lock.is_file() and lock_holder(lock) is not None:
        return
    newest = max((file.lstat().st_mtime for file in directory.rglob("*")), default=directory.stat().st_mtime)
    name = f"{directory.parent.name}/{directory.name}"
    work = "with work to continue from" if has_saved_work(directory) else "with nothing to continue from"
    yield Finding(
        severity="note",
        subject="unfinished",
        detail=f"{name}, {work}, {directory_bytes(directory) / MIB:,.1f} MiB, last written "
        f"{format_duration(max(0.0, time.time() - newest))} ago",
        next_step=f"materialize {directory.parent.name} to finish it",
    )


def _examine_garbage(workspace: Workspace, *, recipes: Sequence[Recipe]) -> Iterator[Finding]:
    try:
        garbage = find_garbage(workspace, recipes=recipes)
    except ArtifactError:
        yield Finding(severity="note", subject="garbage", detail="cannot be told while an artifact is broken")
        return
    names = ", ".join(sorted({recipe.name for recipe in recipes}))
    if not garbage:
        yield Finding(severity="ok", subject="garbage", detail=f"none: every artifact belongs to a recipe of {names}")
        return
    size = sum(directory_bytes(path) for path in garbage)
    by_asset: dict[str, int] = {}
    for path in garbage:
        by_asset[path.parent.name] = by_asset.get(path.parent.name, 0) + 1
    listed = ", ".join(f"{count} of {asset}" for asset, count in sorted(by_asset.items()))
    yield Finding(
        severity="note",
        subject="garbage",
        detail=f"{len(garbage)} artifacts, {size / MIB:,.1f} MiB, belong to no recipe of {names}: {listed}",
        next_step="`python -m pipeline doctor --remove-garbage` deletes them; name recipes of your own with --recipe "
        "and --keep",
    )
