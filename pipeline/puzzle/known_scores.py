"""Scores by what decides them: a candidate that any finished block_scores of the store holds is not scored again.

    <block_scores artifact>/known.json    fingerprint of a candidate, or of a layer that goes after others -> measures

So one more width in the search space costs the scores of that width, and a block that was trained anew costs the
candidates that it is part of. Candidates run in batches: in other company the last bits of a score may differ.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.artifacts import ArtifactStore, read_json, write_atomically
from pipeline.fingerprint import fingerprint
from pipeline.puzzle.divergence import Divergence
from pipeline.puzzle.library import LibraryIndex
from pipeline.puzzle.scoring import LayerBlock
from pipeline.puzzle.search_space import SearchSpace, dropped
from pipeline.recipe import BlockScoresConfig

SCORES_ASSET = "block_scores"
KNOWN = "known.json"

# Raised by hand when scoring computes something else for the same inputs.
SCORES_VERSION = 1


def score_fingerprints(
    space: SearchSpace, index: LibraryIndex, *, upstream: Mapping[str, str], settings: BlockScoresConfig
) -> dict[LayerBlock, str]:
    """Return the hash of everything that decides a candidate's score, by layer and block.

    Args:
        space: the candidates.
        index: the library, whose entries name the weights of each by content.
        upstream: content hashes of the parent and of what is scored on, by asset name.
        settings: the scores' settings.
    """
    shared = _shared(upstream, settings.model_dump(mode="json", exclude={"depth_steps"}))
    return {
        (layer, block.key): fingerprint(
            {
                **shared,
                "layer": layer,
                "block": block.key,
                "weights": {
                    f"{key.subblock} {key.variant}": index.entry(key).content_hash
                    for key in index.parts(block, layer=layer, parent=space.parent)
                },
            }
        )
        for layer, options in enumerate(space.layers)
        for block in options.blocks
        if block.key != space.parent.key
    }


def depth_fingerprints(
    layers: Iterable[int], *, gone: Sequence[int], upstream: Mapping[str, str], settings: BlockScoresConfig
) -> dict[LayerBlock, str]:
    """Return the same of leaving out each of these layers where others are gone, in whichever order they went."""
    shared = _shared(upstream, settings.model_dump(mode="json", include={"tokens", "precision"}))
    return {
        (layer, dropped(layer).key): fingerprint({**shared, "gone": sorted(gone), "layer": layer}) for layer in layers
    }


def _shared(upstream: Mapping[str, str], settings: Mapping[str, object]) -> dict[str, object]:
    return {"version": SCORES_VERSION, "upstream": dict(upstream), "settings": dict(settings)}


def read_known(store: ArtifactStore) -> dict[str, Mapping[str, Any]]:
    """Return all measures that finished block_scores of the store hold, by fingerprint; those of any version.

    Raises:
        ArtifactError: for one that is broken, which says what to delete.
    """
    known: dict[str, Any] = {}
    for directory in store.finished(SCORES_ASSET):
        if (directory / KNOWN).is_file():
            store.open(SCORES_ASSET, directory.name)  # refuses one whose files are not of the size they had
            known |= read_json(directory / KNOWN)
    return known


def known_among(
    known: Mapping[str, Mapping[str, Any]], wanted: Mapping[LayerBlock, str]
) -> dict[LayerBlock, Divergence]:
    """Return the measures of those candidates that are known."""
    return {candidate: Divergence(**known[name]) for candidate, name in wanted.items() if name in known}


def write_known(directory: Path, found: Mapping[str, Divergence]) -> None:
    """Write known.json."""
    rows = {name: asdict(divergence) for name, divergence in found.items()}
    write_atomically(directory / KNOWN, (json.dumps(rows, indent=1) + "\n").encode())
