"""Shows the block library in Dagster: one partition of `bld_block` per trained block, added as the library grows."""

import dagster as dg

from pipeline.artifacts import Artifact, read_json

BLD_BLOCK = dg.AssetKey("bld_block")
LAYERS = dg.DynamicPartitionsDefinition(name="bld_layer")
VARIANTS = dg.DynamicPartitionsDefinition(name="bld_variant")
BLOCK_PARTITIONS = dg.MultiPartitionsDefinition({"layer": LAYERS, "variant": VARIANTS})

_DATA_VERSION_TAG = "dagster/data_version"


def report_blocks(context: dg.AssetExecutionContext, library: Artifact) -> int:
    """Record every block of the library that Dagster has not seen at this content; return how many were new."""
    blocks = _read_blocks(library)
    instance = context.instance
    instance.add_dynamic_partitions("bld_layer", sorted({layer for layer, _ in blocks}))
    instance.add_dynamic_partitions("bld_variant", sorted({variant for _, variant in blocks}))
    seen = instance.event_log_storage.get_latest_tags_by_partition(
        BLD_BLOCK, dg.DagsterEventType.ASSET_MATERIALIZATION, [_DATA_VERSION_TAG]
    )
    num_new = 0
    for (layer, variant), block in blocks.items():
        partition = dg.MultiPartitionKey({"layer": layer, "variant": variant})
        content_hash = str(block["content_hash"])
        if seen.get(partition, {}).get(_DATA_VERSION_TAG) == content_hash:
            continue
        context.log_event(
            dg.AssetMaterialization(
                asset_key=BLD_BLOCK,
                partition=partition,
                tags={_DATA_VERSION_TAG: content_hash},
                metadata={name: value for name, value in block.items() if isinstance(value, str | int | float)},
            )
        )
        num_new += 1
    return num_new


def _read_blocks(library: Artifact) -> dict[tuple[str, str], dict[str, object]]:
    """Return the trained blocks of the library by (layer, variant); layers are padded to sort as numbers.

    The parent's own subblocks, no-ops and blocks that failed are in the index too, and have no weights to show.
    """
    found: dict[tuple[str, str], dict[str, object]] = {}
    for layer, subblocks in read_json(library.path / "index.json").items():
        assert isinstance(subblocks, dict)
        for subblock, variants in subblocks.items():
            for variant, block in variants.items():
                if block["kind"] == "trained":
                    found[f"{int(layer):03d}", f"{subblock}.{variant}"] = block
    return found
