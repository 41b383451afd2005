"""Artifacts that no recipe refers to: found by walking the chain of fingerprints of every target of every recipe."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.artifacts import IDENTITY, MANIFEST, read_json
from pipeline.costs import MIB
from pipeline.errors import MissingInputError
from pipeline.execution import Workspace, stage_fingerprint
from pipeline.inspection.files import directory_bytes, lock_holder
from pipeline.inspection.findings import Finding
from pipeline.puzzle.library import BLOCK_ASSET, INDEX
from pipeline.recipe import Recipe
from pipeline.runtimes import RuntimeMissingError
from pipeline.stages.registry import BY_NAME, STAGES

LIBRARY = "block_library"


def find_garbage(workspace: Workspace, *, recipes: Sequence[Recipe]) -> tuple[Path, ...]:
    """Return the artifact directories, finished or not, that none of the recipes' targets asks for.

    What was made for a recipe of a name that is not among them is kept: its file lies somewhere else. Where an input is
    missing, or the runtime that a stage measures in, its fingerprint cannot be told: whatever the recipe made of that
    asset is kept, and of those that read it of every target.
    Blocks of the library are kept while any kept library names them, and all of them while a library is unfinished.
    What is shared below other names (evaluations, a few KiB each) is never garbage.

    Raises:
        ArtifactError: when an artifact is broken, since what follows it cannot be told then.
    """
    root = workspace.store.root
    kept: dict[str, set[str]] = {stage.name: set() for stage in STAGES}
    unknown: set[tuple[str, str]] = set()
    known = {"", *(recipe.name for recipe in recipes)}
    for recipe in recipes:
        at = replace(workspace, recipe=recipe)
        for target in recipe.targets:
            for stage in STAGES:
                try:
                    key = stage_fingerprint(at, stage, target)
                except (MissingInputError, RuntimeMissingError):
                    unknown.add((stage.name, recipe.name))
                    continue
                kept[stage.name].add(key)
        unknown |= {
            (stage.name, recipe.name)
            for stage in STAGES
            if any((name, recipe.name) in unknown for name in stage.over_targets)
        }
    found = [
        path
        for asset in sorted(root.iterdir() if root.is_dir() else [])
        if asset.name in BY_NAME
        for path in sorted(asset.iterdir())
        if _is_directory(path)
        and path.name not in kept[asset.name]
        and _maker(path) in known
        and (asset.name, _maker(path)) not in unknown
    ]
    libraries = [path for path in (root / LIBRARY).glob("*") if _is_directory(path) and path not in found]
    if all((path / MANIFEST).is_file() for path in libraries):
        named = {block for path in libraries for block in _named_blocks(path)}
        found += [
            path for path in sorted((root / BLOCK_ASSET).glob("*")) if _is_directory(path) and path.name not in named
        ]
    return tuple(found)


def remove_garbage(workspace: Workspace, *, recipes: Sequence[Recipe]) -> tuple[Finding, ...]:
    """Delete what find_garbage returns; what a process is making is left alone.

    Raises:
        ArtifactError: see find_garbage.
    """
    freed, num_removed = 0, 0
    findings: list[Finding] = []
    for path in find_garbage(workspace, recipes=recipes):
        lock = path.with_name(path.name + ".lock")
        holder = lock_holder(lock) if lock.is_file() else None
        if holder is not None:
            detail = f"{path} is being made by process {holder} and was left alone"
            findings.append(Finding(severity="note", subject="garbage", detail=detail))
            continue
        freed += directory_bytes(path)
        shutil.rmtree(path)
        lock.unlink(missing_ok=True)
        num_removed += 1
    detail = f"removed {num_removed} artifacts that no recipe refers to, {freed / MIB:,.1f} MiB"
    return (Finding(severity="ok", subject="garbage", detail=detail), *findings)


def _named_blocks(library_dir: Path) -> Iterator[str]:
    """Give the fingerprints of the trained blocks that a library refers to."""
    for subblocks in read_json(library_dir / INDEX).values():
        assert isinstance(subblocks, dict)
        for variants in subblocks.values():
            for entry in variants.values():
                if entry.get("fingerprint"):
                    yield entry["fingerprint"]


def _maker(path: Path) -> str:
    """Return the recipe that an artifact was made for, as written down beside it."""
    try:
        return str(json.loads((path / IDENTITY).read_bytes())["recipe"])
    except (OSError, ValueError, KeyError):
        return ""


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
