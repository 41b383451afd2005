"""Scores as the Parquet table that the search reads, and back."""

from pathlib import Path

import polars as pl

from pipeline.puzzle.scoring import Scores
from pipeline.puzzle.search_space import SearchSpace
from pipeline.puzzle.tables import MEASURES, SCHEMAS, SCORES, read_table, write_table


def score_table(scores: Scores, space: SearchSpace) -> pl.DataFrame:
    """Return one row per layer and composed block, in the order of the space, the base's own blocks included."""
    scored = {(one.layer, one.block.key): one.divergence for one in scores.candidates}
    rows = []
    for layer, options in enumerate(space.layers):
        for block in options.blocks:
            divergence = scored.get((layer, block.key))
            found = scores.base if divergence is None else divergence
            measures = (getattr(found, name) for name in MEASURES)
            rows.append((layer, block.attention.key, block.ffn.key, divergence is None, *measures, found.num_tokens))
    return pl.DataFrame(rows, schema=SCHEMAS[SCORES], orient="row")


def joint_against_sums(table: pl.DataFrame, space: SearchSpace) -> pl.DataFrame:
    """Return the KL of blocks with both halves replaced beside the sum of either half replaced alone.

    Columns layer, attention, ffn, joint, sum; a block of which a half was not scored alone is left out. What composes
    by adding has joint = sum. (Puzzle scores joint blocks, section 4.2; sums would need far fewer scores.)
    """
    kl = {(row["layer"], row["attention"], row["ffn"]): row["kl"] for row in table.iter_rows(named=True)}
    own_attention, own_ffn = space.parent.attention.key, space.parent.ffn.key
    rows = []
    for (layer, attention, ffn), joint in kl.items():
        if attention == own_attention or ffn == own_ffn:
            continue
        halves = [key for key in ((layer, attention, own_ffn), (layer, own_attention, ffn)) if key in kl]
        if len(halves) == 2:
            rows.append((layer, attention, ffn, joint, sum(kl[key] for key in halves)))
    schema = {"layer": pl.Int64, "attention": pl.String, "ffn": pl.String, "joint": pl.Float64, "sum": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def write_scores(directory: Path, table: pl.DataFrame) -> None:
    """Write scores.parquet."""
    write_table(directory, SCORES, table)


def read_scores(directory: Path) -> pl.DataFrame:
    """Read scores.parquet of a block_scores or refined_solution artifact."""
    return read_table(directory, SCORES)
