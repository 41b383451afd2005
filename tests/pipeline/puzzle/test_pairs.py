"""A library in which attention and FFN were trained together, as the search reads it."""

import shutil
import statistics
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from pipeline.artifacts import ArtifactStore
from pipeline.data.packed import PackedTokens
from pipeline.progress import SilentReporter
from pipeline.puzzle.initial import library_variants
from pipeline.puzzle.library import read_index
from pipeline.puzzle.score_functions import DivergenceScore
from pipeline.puzzle.scoring import score_blocks
from pipeline.puzzle.search_space import resolve
from pipeline.puzzle.tables import SCORES, read_table
from pipeline.recipe import BlockScoresConfig
from pipeline.stages import block_library, block_scores
from pipeline.stages.configs import BlockLibraryStage, BlockScoresStage
from pipeline.stages.score_inputs import SearchWindows
from tests.pipeline.puzzle.builders import limit
from tests.pipeline.puzzle.line import BLD, SEARCH, SPACE, Line, target


def test_rounds_over_a_library_with_pairs_measure_every_block(line: Line, tmp_path: Path):
    """What was trained as a pair is no sum of its halves."""
    store = ArtifactStore(tmp_path / "store")
    shutil.copytree(line.workplace.store_root, store.root)
    workplace = replace(line.workplace, store_root=store.root)
    coupled = BlockLibraryStage(search_space=SPACE, block_library=BLD.model_copy(update={"mode": "coupled"}))
    library = block_library.run(coupled, workplace.inputs(), tmp_path / "library")
    index = read_index(tmp_path / "library")
    assert library.metrics["num_trained_blocks"] > 0
    assert index.has_pairs
    scores = BlockScoresStage(
        search_space=SPACE, block_scores=BlockScoresConfig(tokens=32, depth_steps=1, task=None, precision="fp32")
    )
    block_scores.run(scores, workplace.inputs(block_library=tmp_path / "library"), tmp_path / "scores")
    with_pairs = replace(line, workplace=workplace, library_dir=tmp_path / "library", scores_dir=tmp_path / "scores")
    wanted = target(limit("num_parameters", 0.8))
    with_pairs.mip(wanted, tmp_path / "mip")
    with_pairs.refined(wanted, tmp_path / "mip", tmp_path / "refined")
    found = read_table(tmp_path / "refined", SCORES)
    space = resolve(SPACE, workplace.architecture)
    own = found.filter("is_base").sort("layer")
    base = [
        next(block for block in options.blocks if block.key == f"{row['attention']}+{row['ffn']}")
        for options, row in zip(space.layers, own.iter_rows(named=True), strict=True)
    ]
    rows = {
        (layer, attention, ffn): kl
        for layer, attention, ffn, kl in found.filter(~found["is_base"])
        .select("layer", "attention", "ffn", "kl")
        .rows()
    }

    def measured_on(part: PackedTokens) -> dict[tuple[int, str, str], float]:
        scores = score_blocks(
            workplace.model(),
            space,
            library_variants(
                workplace.architecture, index=index, store=store, dtype=torch.float32, device=torch.device("cpu")
            ),
            [DivergenceScore(packed=part)],
            work_dir=tmp_path / f"on-{part.tokens_NT.sum()}",
            max_activation_bytes=10**9,
            reporter=SilentReporter(),
            base=base,
        )
        return {(one.layer, one.block.attention.key, one.block.ffn.key): one.divergence.kl for one in scores.candidates}

    parts = [measured_on(one) for one in SearchWindows.of(workplace.packed("validation"), SEARCH.refinement).rounds]
    # Of rounds around this child there was one, or more, whose mean was kept.
    means = [
        {key: statistics.fmean(one[key] for one in group) for key in rows}
        for size in range(1, len(parts) + 1)
        for group in combinations(parts, size)
    ]
    assert any(rows == pytest.approx(mean, rel=1e-4) for mean in means)
