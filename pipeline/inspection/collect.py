"""Blocks of a library that no solution uses: trained to be compared, worth their disk while a search goes on."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.architecture import Architecture
from pipeline.artifacts import IDENTITY, MANIFEST, ArtifactStore, Manifest, read_json
from pipeline.costs import MIB
from pipeline.inspection.files import directory_bytes, lock_holder
from pipeline.inspection.findings import Finding
from pipeline.puzzle.known_scores import SCORES_ASSET
from pipeline.puzzle.library import BLOCK_ASSET, LibraryIndex, read_index
from pipeline.puzzle.search import POOL_FILE, SOLUTION_FILE

LIBRARY = "block_library"
SOLUTIONS = ("mip_solution", "refined_solution", "child_checkpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class Collection:
    """The blocks of a store that may go, how many stay, and why nothing may go where that is so."""

    unused: tuple[Path, ...]
    num_kept: int
    obstacle: str


def find_unused_blocks(store: ArtifactStore) -> Collection:
    """Return the blocks that no solution in the store uses, answers that were only scored included.

    A library that no solution was chosen from yet keeps all its blocks, and every block stays while a library is
    unfinished, since its index is not written.
    """
    blocks = store.finished(BLOCK_ASSET)
    directories = [path for path in (store.root / LIBRARY).glob("*") if path.is_dir()]
    unfinished = [path for path in directories if not (path / MANIFEST).is_file()]
    if unfinished:
        return Collection(unused=(), num_kept=len(blocks), obstacle=f"{unfinished[0]} is unfinished: finish it first")
    libraries = {_content_hash(path): read_index(path) for path in directories}
    used: set[str] = set()
    chosen_from: set[str] = set()
    for library_hash, architecture in _solutions(store):
        if library_hash in libraries:
            chosen_from.add(library_hash)
            used |= set(_fingerprints(libraries[library_hash], architecture))
    for library_hash, index in libraries.items():
        if library_hash not in chosen_from:
            used |= {
                entry.fingerprint
                for layer in index.layers.values()
                for variants in layer.values()
                for entry in variants.values()
                if entry.fingerprint
            }
    unused = tuple(path for path in blocks if path.name not in used)
    return Collection(unused=unused, num_kept=len(blocks) - len(unused), obstacle="")


def collect_blocks(store: ArtifactStore, *, remove: bool) -> tuple[Finding, ...]:
    """Say what find_unused_blocks returns and, if asked, delete it; what a process is making is left alone.

    A library whose blocks are gone still stands for its scores and solutions. Whoever reads a missing block is told how
    to have it trained again.
    """
    collection = find_unused_blocks(store)
    if collection.obstacle:
        return (Finding(severity="note", subject="blocks", detail=collection.obstacle),)
    freed, removed, findings = 0, 0, []
    for path in collection.unused:
        lock = path.with_name(path.name + ".lock")
        holder = lock_holder(lock) if lock.is_file() else None
        if holder is not None:
            detail = f"{path} is held by process {holder} and was left alone"
            findings.append(Finding(severity="note", subject="blocks", detail=detail))
            continue
        freed, removed = freed + directory_bytes(path), removed + 1
        if remove:
            shutil.rmtree(path)
            lock.unlink(missing_ok=True)
    verb = "removed" if remove else "would remove"
    detail = f"{verb} {removed} blocks that no solution uses, {freed / MIB:,.1f} MiB; {collection.num_kept} stay"
    step = "" if remove or not removed else "run `python -m pipeline collect --remove` to remove them"
    return (Finding(severity="ok", subject="blocks", detail=detail, next_step=step), *findings)


def _solutions(store: ArtifactStore) -> Iterator[tuple[str, Architecture]]:
    """Give every solution's architecture with the content hash of the library that it was chosen from."""
    scored = {_content_hash(path): _inputs(path).get(LIBRARY, "") for path in store.finished(SCORES_ASSET)}
    for asset in SOLUTIONS:
        for path in store.finished(asset):
            inputs = _inputs(path)
            library_hash = inputs.get(LIBRARY) or scored.get(inputs.get(SCORES_ASSET, ""), "")
            for record in _records(path):
                yield library_hash, Architecture.model_validate(record["architecture"])


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if (path / SOLUTION_FILE).is_file():
        yield read_json(path / SOLUTION_FILE)
    if (path / POOL_FILE).is_file():
        solutions: Any = read_json(path / POOL_FILE)["solutions"]
        yield from solutions


def _fingerprints(index: LibraryIndex, architecture: Architecture) -> Iterator[str]:
    """Give the blocks that a child's layers take from a library."""
    for layer, block in enumerate(architecture.blocks):
        variants = index.layers.get(str(layer), {})
        pair = variants.get("pair", {}).get(block.key)
        entries = (
            (pair,)
            if pair
            else (
                variants.get("attention", {}).get(block.attention.key),
                variants.get("ffn", {}).get(block.ffn.key),
            )
        )
        yield from (entry.fingerprint for entry in entries if entry and entry.fingerprint)


def _inputs(path: Path) -> dict[str, str]:
    """Return the content hashes of an artifact's inputs, as written down beside it."""
    if not (path / IDENTITY).is_file():
        return {}
    return json.loads((path / IDENTITY).read_bytes())["identity"].get("inputs", {})


def _content_hash(path: Path) -> str:
    return Manifest.model_validate_json((path / MANIFEST).read_bytes()).content_hash
