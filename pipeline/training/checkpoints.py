"""Checkpoints to resume from: written by DeepSpeed, completed by a manifest with a hash of every file.

    directory/step-00000050/state/...       what DeepSpeed writes, pickles included
    directory/step-00000050/manifest.json   written last, by rename; without it the checkpoint is half-written

DeepSpeed's files are the one place where this project reads pickles: only its own, and only when their hashes are
those of the manifest.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.architecture import Frozen
from pipeline.artifacts import sha256_file, sha256_on_disk, write_atomically
from pipeline.errors import ArtifactError, CheckpointError
from pipeline.training.distributed import LONGEST_CACHE_S, barrier, gather_across_ranks, told_by_rank_0

TAG = "state"
_MANIFEST = "manifest.json"
_NUM_KEPT = 2


class Layout(Frozen):
    """What must be the same for a training to continue: DeepSpeed shards by it, and sums round by it."""

    world_size: int
    zero_stage: int
    micro_batch_size: int
    global_batch_size: int
    precision: str


class CheckpointManifest(Frozen):
    """A complete checkpoint: after which step, under which layout, its files' sha256, the loop's own state."""

    step: int
    layout: Layout
    files: dict[str, str]
    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundCheckpoint:
    """A complete checkpoint whose bytes have been checked, and why newer ones were passed over."""

    path: Path
    manifest: CheckpointManifest
    passed_over: tuple[str, ...]


def save(
    directory: Path,
    *,
    step: int,
    layout: Layout,
    state: dict[str, Any],
    needed_bytes: int,
    write: Callable[[Path], object],
) -> None:
    """Write one checkpoint through `write`, which every rank calls with its directory, and drop the oldest.

    Raises:
        ArtifactError: when the disk cannot hold it; the checkpoints already there stay.
    """
    path = directory / f"step-{step:08d}"
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        # Before writing, so that the disk never holds more than _NUM_KEPT.
        _remove_all_but(directory, _complete(directory)[-(_NUM_KEPT - 1) :])
        _require_free_space(directory, needed_bytes=needed_bytes)
    barrier()
    write(path)
    barrier()
    files = _hash_together(path)
    if dist.get_rank() == 0:
        manifest = CheckpointManifest(step=step, layout=layout, files=files, state=state)
        write_atomically(path / _MANIFEST, manifest.model_dump_json().encode())
    barrier()


def newest(directory: Path, *, layout: Layout) -> FoundCheckpoint | None:
    """Return the newest complete checkpoint whose bytes are those of its manifest; half-written ones are removed.

    One that is not whole, as a power cut may leave it, is removed where there is an older one to go on from.

    Raises:
        CheckpointError: when it was written under another layout, or when none is whole.
    """
    if dist.get_rank() == 0 and directory.is_dir():
        _remove_all_but(directory, _complete(directory))
    barrier()
    names: list[str] = json.loads(told_by_rank_0(json.dumps([path.name for path in _complete(directory)])))
    passed_over: list[str] = []
    while names:
        path = directory / names.pop()
        manifest = CheckpointManifest.model_validate_json(_read_manifest(path))
        _require_same_layout(path, got=layout, written=manifest.layout)
        differing = _differing_files(path, manifest=manifest)
        if not differing:
            return FoundCheckpoint(path=path, manifest=manifest, passed_over=tuple(passed_over))
        told = f"{path} does not hold the bytes its manifest names ({'; '.join(differing)})"
        if not names:
            raise CheckpointError(f"{told}, and no checkpoint is before it: delete {directory} to train from the start")
        passed_over.append(told)
        barrier()
        if dist.get_rank() == 0:
            _remove(path)
        barrier()
    return None


def newest_path(directory: Path) -> Path | None:
    """Return where the newest complete checkpoint is, for messages."""
    complete = _complete(directory)
    return complete[-1] if complete else None


def _complete(directory: Path) -> list[Path]:
    return sorted(path.parent for path in directory.glob(f"step-*/{_MANIFEST}"))


def _remove_all_but(directory: Path, kept: list[Path]) -> None:
    for path in sorted(directory.glob("step-*")):
        if path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    # The manifest goes first: a removal that is cut short must not leave a checkpoint that looks complete.
    (path / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def _read_manifest(path: Path) -> str:
    """Return a manifest that rank 0 sees; another node may see it later, by as long as its cache of the disk is old."""
    ends_at = time.monotonic() + LONGEST_CACHE_S
    while not (path / _MANIFEST).is_file():
        if time.monotonic() > ends_at:
            raise CheckpointError(
                f"{path / _MANIFEST} is seen by rank 0 and not by rank {dist.get_rank()}: put the store on a disk that "
                "all nodes share"
            )
        time.sleep(1.0)
    return (path / _MANIFEST).read_text(encoding="utf-8")


def _hash_together(path: Path) -> dict[str, str]:
    """Return the hash of every file; each rank reads its share, of those that rank 0 sees."""
    seen: list[str] = []
    if dist.get_rank() == 0:
        seen = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    names = json.loads(gather_across_ranks(json.dumps(seen))[0])
    own = {name: sha256_on_disk(path / name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    return {name: found for told in gather_across_ranks(json.dumps(own)) for name, found in json.loads(told).items()}


def _require_free_space(directory: Path, *, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise ArtifactError(
            f"{directory} has {free_bytes / 2**20:,.0f} MiB free, a checkpoint of this training needs "
            f"{needed_bytes / 2**20:,.0f} MiB: free some space and materialize again; the training continues from the "
            "newest checkpoint"
        )


def _require_same_layout(path: Path, *, got: Layout, written: Layout) -> None:
    differing = [name for name in Layout.model_fields if getattr(got, name) != getattr(written, name)]
    if differing:
        changes = ", ".join(f"{name} {getattr(written, name)} (now {getattr(got, name)})" for name in differing)
        raise CheckpointError(
            f"{path} was written with {changes}: run with the settings it was written with to continue, "
            f"or delete {path.parent} to train from the start"
        )


def _differing_files(path: Path, *, manifest: CheckpointManifest) -> list[str]:
    """Return the files that differ from the manifest; each rank reads its share, and all return the same."""
    names = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
    broken = [name for name in names if not _is_intact(path / name, sha256=manifest.files[name])]
    return [name for told in gather_across_ranks(json.dumps(broken)) for name in json.loads(told)]


def _is_intact(path: Path, *, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256
