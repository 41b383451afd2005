"""The block library: every trained subblock as an artifact of its own, named by everything that decided its weights.

    <store>/bld_block/<fingerprint>/block.safetensors  tensors relative to the layer (self_attn.q_proj.weight), float32
    <store>/bld_block/<fingerprint>/block.json         what it is, its losses on the validation batch, its loss curve
    <block_library artifact>/index.json                layer -> subblock -> variant -> entry; refers to blocks by hash

So a block is trained once for every search space that asks for it, and the library's own content hash covers weights
it does not hold. Parent and no-op variants have an entry and no artifact.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.architecture import AttentionSpec, FFNSpec, Frozen
from pipeline.artifacts import MANIFEST, Artifact, ArtifactStore, Manifest, write_atomically
from pipeline.errors import ArtifactError, MissingInputError
from pipeline.fingerprint import fingerprint
from pipeline.puzzle.search_space import SearchSpace, attention_from_key, ffn_from_key
from pipeline.recipe import BlockLibraryConfig
from pipeline.stage import StageResult

BLOCK_ASSET = "bld_block"
BLOCK_WEIGHTS = "block.safetensors"
BLOCK_RECORD = "block.json"
INDEX = "index.json"

# Raised by hand when block distillation computes something else for the same inputs.
BLD_VERSION = 1

Subblock = Literal["attention", "ffn"]


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class BlockKey:
    """One variant of one layer's attention or FFN."""

    layer: int
    subblock: Subblock
    variant: str

    @property
    def spec(self) -> AttentionSpec | FFNSpec:
        """What the variant is."""
        return attention_from_key(self.variant) if self.subblock == "attention" else ffn_from_key(self.variant)

    def __str__(self) -> str:
        return f"layer {self.layer} {self.subblock} {self.variant}"


class LossPoint(Frozen):
    """The training loss of one step."""

    step: int
    loss: float


class BlockRecord(Frozen):
    """What one trained block is and how its training went; losses are normalised MSE of the whole layer's output."""

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


def trainable_keys(space: SearchSpace) -> tuple[BlockKey, ...]:
    """Return every variant of the space that has weights of its own: neither the parent's nor a no-op."""
    return tuple(
        key
        for layer, options in enumerate(space.layers)
        for key, spec in (
            *((BlockKey(layer=layer, subblock="attention", variant=one.key), one) for one in options.attention),
            *((BlockKey(layer=layer, subblock="ffn", variant=one.key), one) for one in options.ffn),
        )
        if spec.kind != "no_op" and spec not in (space.parent.attention, space.parent.ffn)
    )


def block_fingerprint(key: BlockKey, *, upstream: Mapping[str, str], settings: BlockLibraryConfig) -> str:
    """Return the hash of everything that decides a block's weights.

    Args:
        key: the variant.
        upstream: content hashes of the parent, the mixture and the channel importance, by asset name.
        settings: the distillation's settings.
    """
    return fingerprint(
        {
            "version": BLD_VERSION,
            "layer": key.layer,
            "subblock": key.subblock,
            "variant": key.variant,
            "upstream": dict(upstream),
            "settings": settings,
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


def build_index(space: SearchSpace, *, trained: Mapping[BlockKey, LibraryEntry]) -> LibraryIndex:
    """Return the index over every variant of the space; a trainable variant without an entry is one that failed."""
    layers: dict[str, dict[Subblock, dict[str, LibraryEntry]]] = {}
    for layer, options in enumerate(space.layers):
        specs: dict[Subblock, Sequence[AttentionSpec | FFNSpec]] = {
            "attention": options.attention,
            "ffn": options.ffn,
        }
        layers[str(layer)] = {
            subblock: {
                spec.key: _entry(BlockKey(layer=layer, subblock=subblock, variant=spec.key), space, trained)
                for spec in variants
            }
            for subblock, variants in specs.items()
        }
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


def _entry(key: BlockKey, space: SearchSpace, trained: Mapping[BlockKey, LibraryEntry]) -> LibraryEntry:
    if key in trained:
        return trained[key]
    kind: Literal["parent", "no_op", "failed"] = "failed"
    if key.spec.kind == "no_op":
        kind = "no_op"
    elif key.spec in (space.parent.attention, space.parent.ffn):
        kind = "parent"
    return LibraryEntry(kind=kind, fingerprint=None, content_hash=None, initial_loss=None, final_loss=None)
