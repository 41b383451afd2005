"""Scores of whole blocks from those of their halves, for the rounds of refinement, which take half as long so.

With x a model, d(a, f) what its measure becomes above its own with attention a and FFN f in one layer, and (a_0, f_0)
what stands there,

    d(a, f) ~ d(a, f_0) + d(a_0, f)

Where one of the two is no candidate, d(a, f) is measured. So is what halves say badly: the layer gone whole, the
parent's own block, and everything where the layer is gone. Of pairs of real halves on SmolLM2 joint scores are 0.96 of
the sums (80% between 0.89 and 1.01). What rounds propose by them is scored as a whole model before it is believed.
(Puzzle scores joint blocks, section 4.2.)
"""

from collections.abc import Sequence
from dataclasses import replace

import polars as pl

from pipeline.architecture import BlockSpec
from pipeline.puzzle.search_space import LayerOptions, SearchSpace, dropped
from pipeline.puzzle.tables import MEASURES, SCHEMAS, SCORES

EMPTY = dropped(0).key


def measured_around(space: SearchSpace, base: Sequence[BlockSpec]) -> SearchSpace:
    """Return the candidates that are to be measured around a model; the sums of `with_sums` stand for the others."""
    return replace(
        space,
        layers=tuple(
            replace(options, blocks=_measured(options, own, parent=space.parent))
            for options, own in zip(space.layers, base, strict=True)
        ),
    )


def _measured(options: LayerOptions, own: BlockSpec, *, parent: BlockSpec) -> tuple[BlockSpec, ...]:
    if own.key == EMPTY:
        return options.blocks
    there = {block.key for block in options.blocks}
    return tuple(
        block
        for block in options.blocks
        # A block that is one of its own halves differs from the model in one thing.
        if block.key in (EMPTY, parent.key, *(halves := _halves(block, own))) or not there.issuperset(halves)
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
    return f"{block.attention.key}+{own.ffn.key}", f"{own.attention.key}+{block.ffn.key}"
