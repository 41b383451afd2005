"""bld_block: the block library seen block by block; nothing here runs, `block_library` reports to it."""

import dagster as dg

from resources.block_partitions import BLD_BLOCK, BLOCK_PARTITIONS

SPEC = dg.AssetSpec(
    BLD_BLOCK,
    deps=["block_library"],
    description="One trained subblock per layer and variant; partitions appear as the library is written.",
    group_name="puzzle",
    kinds={"safetensors"},
    partitions_def=BLOCK_PARTITIONS,
)
