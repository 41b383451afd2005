"""The block library: every trained subblock as an artifact of its own, named by everything that decided its weights.

    <store>/bld_block/<fingerprint>/block.safetensors  tensors relative to the layer (self_attn.q_proj.weight), float32
    <store>/bld_block/<fingerprint>/block.json         what it is, its losses on the validation batch, its loss curve
    <block_library artifact>/index.json                layer -> subblock -> variant -> entry; refers to blocks by hash

A block is a subblock, or the pair of both that was trained as one; where a layer's pair is there, it is what the pair
stands for, and its two subblocks by themselves are not used for it.
So a block is trained once for every search space that asks for it, and the library's own content hash covers weights
it does not hold. Parent and no-op variants have an entry and no artifact.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.architecture import BlockSpec, Frozen
from pipeline.artifacts import MANIFEST, Artifact, ArtifactStore, Manifest, write_atomically
from pipeline.errors import ArtifactError, MissingInputError
from pipeline.fingerprint import fingerprint
from pipeline.puzzle.block_keys import BlockKey, library_keys, single_keys, why_untrained
from pipeline.puzzle.search_space import SearchSpace
from pipeline.recipe import BlockLibraryConfig, Subblock
from pipeline.stage import StageResult

BLOCK_ASSET = "bld_block"
BLOCK_WEIGHTS = "block.safetensors"
BLOCK_RECORD = "block.json"
INDEX = "index.json"

# Raised by hand when block distillation computes something else for the same inputs.
BLD_VERSION = 2


class LossPoint(Frozen):
    """The training loss of one step."""

    step: int
    loss: float


class BlockRecord(Frozen):
    """What one trained block is and how its training went; losses are as the recipe's `loss` defines them."""

    layer: int
    subblock: Subblock
    variant: str
    initial_loss: float
    final_loss: float
    curve: tuple[LossPoint, ...]


class LibraryEntry(Frozen):
    """One variant in the library's index; a trained one names its artifact."""

    kind: Literal["trained", "parent", "no_op", "failed"]
    fingerprint: str | None
    content_hash: str | None
    initial_loss: float | None
    final_loss: float | None


class LibraryIndex(Frozen):
    """Layer (as text) -> subblock -> variant -> entry."""

    layers: dict[str, dict[Subblock, dict[str, LibraryEntry]]] = Field(min_length=1)

    @property
    def has_pairs(self) -> bool:
        """Whether any layer's halves were trained as one."""
        return any("pair" in subblocks for subblocks in self.layers.values())

    def parts(self, block: BlockSpec, *, layer: int, parent: BlockSpec) -> tuple[BlockKey, ...]:
        """Return which blocks of the library a layer of the child is made of; none where the parent's own stay."""
        pair = BlockKey(layer=layer, subblock="pair", variant=block.key)
        if pair.variant in self.layers.get(str(layer), {}).get("pair", {}):
            return (pair,)
        singles: list[BlockKey] = []
        if block.attention.kind != "no_op" and block.attention != parent.attention:
            singles.append(BlockKey(layer=layer, subblock="attention", variant=block.attention.key))
        if block.ffn.kind != "no_op" and block.ffn != parent.ffn:
            singles.append(BlockKey(layer=layer, subblock="ffn", variant=block.ffn.key))
        return tuple(singles)

    def keys_of(self, layer: int) -> tuple[BlockKey, ...]:
        """Return everything of one layer that was to be trained."""
        return tuple(
            BlockKey(layer=layer, subblock=subblock, variant=variant)
            for subblock, variants in self.layers.get(str(layer), {}).items()
            for variant, entry in variants.items()
            if entry.kind in ("trained", "failed")
        )

    def entry(self, key: BlockKey) -> LibraryEntry:
        """Return the entry of one variant.

        Raises:
            MissingInputError: when the library was made for another search space.
        """
        entry = self.layers.get(str(key.layer), {}).get(key.subblock, {}).get(key.variant)
        if entry is None:
            raise MissingInputError(f"the block library has no {key}: materialize block_library for this recipe again")
        return entry


def content_hash_of(artifact_dir: Path) -> str:
    """Return the content hash in an upstream artifact's manifest."""
    return Manifest.model_validate_json((artifact_dir / MANIFEST).read_bytes()).content_hash


def block_fingerprint(key: BlockKey, *, upstream: Mapping[str, str], settings: BlockLibraryConfig) -> str:
    """Return the hash of everything that decides a block's weights; what else the library trains does not.

    Args:
        key: the variant.
        upstream: content hashes of the parent, the mixture and the channel importance, by asset name.
        settings: the distillation's settings.
    """
    shared = settings.model_dump(exclude={"mode", "coupled_space", "overrides"}, mode="json")
    return fingerprint(
        {
            "version": BLD_VERSION,
            "layer": key.layer,
            "subblock": key.subblock,
            "variant": key.variant,
            "upstream": dict(upstream),
            "settings": shared | settings.optimizer(key.subblock, key.variant).model_dump(mode="json"),
        }
    )


def publish_block(
    store: ArtifactStore, block_id: str, *, tensors: Mapping[str, Tensor], record: BlockRecord, wall_s: float
) -> Artifact:
    """Write a trained block as an artifact, or return the one that another run has written meanwhile."""
    with store.locked(BLOCK_ASSET, block_id) as directory:
        found = store.find(BLOCK_ASSET, block_id)
        if found is not None:
            return found
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / BLOCK_WEIGHTS
        )
        write_atomically(directory / BLOCK_RECORD, record.model_dump_json(indent=1).encode())
        result = StageResult(metrics={"initial_loss": record.initial_loss, "final_loss": record.final_loss})
        return store.publish(BLOCK_ASSET, block_id, result=result, wall_s=wall_s, provenance={})


def read_record(artifact: Artifact) -> BlockRecord:
    """Return what a block's artifact says of it."""
    return BlockRecord.model_validate_json((artifact.path / BLOCK_RECORD).read_bytes())


def trained_entry(artifact: Artifact) -> LibraryEntry:
    """Return the index entry of a published block."""
    record = read_record(artifact)
    return LibraryEntry(
        kind="trained",
        fingerprint=artifact.manifest.fingerprint,
        content_hash=artifact.content_hash,
        initial_loss=record.initial_loss,
        final_loss=record.final_loss,
    )


def build_index(
    space: SearchSpace, settings: BlockLibraryConfig, *, trained: Mapping[BlockKey, LibraryEntry]
) -> LibraryIndex:
    """Return the index over every variant of the space; a trainable variant without an entry is one that failed."""
    layers: dict[str, dict[Subblock, dict[str, LibraryEntry]]] = {str(layer): {} for layer in range(len(space.layers))}
    singles = single_keys(space) if settings.mode != "coupled" else ()
    for key in dict.fromkeys((*singles, *library_keys(space, settings))):
        layers[str(key.layer)].setdefault(key.subblock, {})[key.variant] = trained.get(key) or LibraryEntry(
            kind=why_untrained(key, space) or "failed",
            fingerprint=None,
            content_hash=None,
            initial_loss=None,
            final_loss=None,
        )
    return LibraryIndex(layers=layers)


def write_index(directory: Path, index: LibraryIndex) -> None:
    """Write index.json."""
    text = json.dumps(index.model_dump(mode="json")["layers"], indent=1)
    write_atomically(directory / INDEX, (text + "\n").encode())


def read_index(directory: Path) -> LibraryIndex:
    """Read index.json of a block_library artifact."""
    layers: Any = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    return LibraryIndex.model_validate({"layers": layers})


def load_block(store: ArtifactStore, index: LibraryIndex, key: BlockKey) -> dict[str, Tensor]:
    """Return the trained tensors of one variant, relative to its layer.

    Raises:
        ArtifactError: as `block_weights` does.
    """
    return load_file(block_weights(store, index, key))


def block_weights(store: ArtifactStore, index: LibraryIndex, key: BlockKey) -> Path:
    """Return the file that holds the trained tensors of one variant.

    Raises:
        ArtifactError: when the block failed to train, or the store no longer holds the weights that the index names.
    """
    entry = index.entry(key)
    if entry.fingerprint is None:
        raise ArtifactError(f"{key} is {entry.kind} in the block library and has no weights: make the library again")
    artifact = store.find(BLOCK_ASSET, entry.fingerprint)
    if artifact is None:
        raise ArtifactError(
            f"{store.directory(BLOCK_ASSET, entry.fingerprint)} is missing, which the block library names as the "
            f"weights of {key}: delete the block_library artifact's directory below {store.root / 'block_library'} and "
            "materialize block_library again; it trains only the blocks that are missing"
        )
    if artifact.content_hash != entry.content_hash:
        raise ArtifactError(
            f"{artifact.path} has content {artifact.content_hash}, the block library names {entry.content_hash}: "
            "materialize block_library again"
        )
    return artifact.path / BLOCK_WEIGHTS
