"""Scores of whole blocks from those of their halves, for the rounds of refinement, which take half as long so.

With x a model, d(a, f) what its measure becomes above its own with attention a and FFN f in one layer, and (a_0, f_0)
what stands there,

    d(a, f) ~ d(a, f_0) + d(a_0, f)

Where one of the two is no candidate, d(a, f) is measured, and so is the parent's own block: what it is worth to have a
layer back whole, its halves say badly. On SmolLM2 joint scores are 0.96 of the sums (80% between 0.89 and 1.01), and
what is proposed by them is scored as a whole model before it is believed. (Puzzle scores joint blocks, section 4.2.)
"""

from collections.abc import Sequence
from dataclasses import replace

import polars as pl

from pipeline.architecture import BlockSpec
from pipeline.puzzle.score_table import MEASURES
from pipeline.puzzle.search_space import LayerOptions, SearchSpace
from pipeline.puzzle.tables import SCHEMAS, SCORES


def measured_around(space: SearchSpace, base: Sequence[BlockSpec]) -> SearchSpace:
    """Return the candidates that are to be measured around a model; the sums of `with_sums` stand for the others."""
    return replace(
        space,
        layers=tuple(
            replace(
                options,
                blocks=tuple(
                    block
                    for block in options.blocks
                    if block.key == space.parent.key
                    or not all(half in _keys(options) for half in _halves(block, own))
                    # A half of itself is what differs from the model in one thing.
                    or block.key in _halves(block, own)
                ),
            )
            for options, own in zip(space.layers, base, strict=True)
        ),
    )


def with_sums(table: pl.DataFrame, space: SearchSpace, base: Sequence[BlockSpec]) -> pl.DataFrame:
    """Return the scores of every candidate of the space, from a table of those that `measured_around` gave."""
    measured = {(row["layer"], f"{row['attention']}+{row['ffn']}"): row for row in table.iter_rows(named=True)}
    rows = []
    for layer, (options, own) in enumerate(zip(space.layers, base, strict=True)):
        for block in options.blocks:
            row = measured.get((layer, block.key))
            if row is None:
                one, other = (measured[layer, half] for half in _halves(block, own))
                start = measured[layer, own.key]
                sums = {
                    name: None if start[name] is None else one[name] + other[name] - start[name] for name in MEASURES
                }
                row = {**start, "attention": block.attention.key, "ffn": block.ffn.key, "is_base": False, **sums}
            rows.append(row)
    return pl.DataFrame(rows, schema=SCHEMAS[SCORES], orient="row")


def _halves(block: BlockSpec, own: BlockSpec) -> tuple[str, str]:
    """Return the keys of the two blocks that have one half of `block` and the other of `own`."""
    with_attention, with_ffn = (own.model_copy(update={half: getattr(block, half)}) for half in ("attention", "ffn"))
    return with_attention.key, with_ffn.key


def _keys(options: LayerOptions) -> set[str]:
    return {block.key for block in options.blocks}
