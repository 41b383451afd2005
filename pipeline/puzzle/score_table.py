"""Scores as the Parquet table that the search reads, and back."""

from pathlib import Path

import polars as pl

from pipeline.puzzle.scoring import Scores
from pipeline.puzzle.search_space import SearchSpace
from pipeline.puzzle.tables import SCHEMAS, SCORES, read_table, write_table

MEASURES = ("kl", "lm_loss", "hidden_cosine", "top1_error")


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


def write_scores(directory: Path, table: pl.DataFrame) -> None:
    """Write scores.parquet."""
    write_table(directory, SCORES, table)


def read_scores(directory: Path) -> pl.DataFrame:
    """Read scores.parquet of a block_scores or refined_solution artifact."""
    return read_table(directory, SCORES)
