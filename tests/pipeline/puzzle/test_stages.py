"""The block library and its scores as stages, on a tiny parent."""

import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from pipeline.artifacts import ArtifactStore
from pipeline.data.benchmarks import MultipleChoiceItem
from pipeline.data.evaluation_sets import save_search_task
from pipeline.errors import ArtifactError
from pipeline.puzzle.known_scores import KNOWN
from pipeline.puzzle.library import BlockKey, load_block, read_index
from pipeline.puzzle.search import read_solution
from pipeline.puzzle.tables import LOSSES, SCORES, read_table
from pipeline.recipe import (
    BlockLibraryConfig,
    BlockScoresConfig,
    MultipleChoiceSet,
    SearchSpaceConfig,
)
from pipeline.stage import StageResult
from pipeline.stages import (
    block_library,
    block_scores,
    mip_solution,
    refined_solution,
)
from pipeline.stages.configs import (
    BlockLibraryStage,
    BlockScoresStage,
    MipStage,
    RefinedStage,
)
from tests.pipeline.puzzle.builders import limit
from tests.pipeline.puzzle.line import BLD, PROFILE, SEARCH, SPACE, Line, target
from tests.pipeline.puzzle.workplace import publish


def test_block_library_trains_each_variant_once_and_names_it_in_the_index(line: Line):
    assert line.library.metrics["num_blocks"] == line.library.metrics["num_trained_blocks"] == 6
    assert line.library.metrics["num_failed_blocks"] == 0
    index = json.loads((line.library_dir / "index.json").read_text())
    assert {key: entry["kind"] for key, entry in index["1"]["attention"].items()} == {
        "kv2": "parent",
        "kv1": "trained",
        "no_op": "no_op",
    }
    losses = read_table(line.library_dir, LOSSES)
    assert losses.shape == (6 * 3, 5)
    entry = index["2"]["ffn"]["ffn16"]
    artifact = ArtifactStore(line.workplace.store_root).open("bld_block", entry["fingerprint"])
    assert artifact.content_hash == entry["content_hash"]


def test_block_library_again_and_for_a_larger_space_trains_only_what_is_missing(line: Line, tmp_path: Path):
    again = block_library.run(
        BlockLibraryStage(search_space=SPACE, block_library=BLD), line.workplace.inputs(), tmp_path / "again"
    )
    assert again.metrics["num_trained_blocks"] == 0
    assert (tmp_path / "again/index.json").read_bytes() == (line.library_dir / "index.json").read_bytes()
    assert (tmp_path / "again/losses.parquet").read_bytes() == (line.library_dir / "losses.parquet").read_bytes()
    larger = SearchSpaceConfig.model_validate(SPACE.model_dump() | {"ffn": ("parent", 32, 16, "no_op")})
    more = block_library.run(
        BlockLibraryStage(search_space=larger, block_library=BLD), line.workplace.inputs(), tmp_path / "larger"
    )
    assert (more.metrics["num_blocks"], more.metrics["num_trained_blocks"]) == (9, 3)
    other = BlockLibraryConfig.model_validate(BLD.model_dump() | {"learning_rate": 1e-4})
    retrained = block_library.run(
        BlockLibraryStage(search_space=SPACE, block_library=other), line.workplace.inputs(), tmp_path / "other"
    )
    assert retrained.metrics["num_trained_blocks"] == 6


def test_load_block_that_was_replaced_is_refused(line: Line):
    index = read_index(line.library_dir)
    key = BlockKey(layer=0, subblock="ffn", variant="ffn16")
    other = index.layers["1"]["ffn"]["ffn16"]
    index.layers["0"]["ffn"]["ffn16"] = other.model_copy(
        update={"fingerprint": index.layers["0"]["ffn"]["ffn16"].fingerprint}
    )
    with pytest.raises(ArtifactError, match="the block library names"):
        load_block(ArtifactStore(line.workplace.store_root), index, key)


def test_load_block_that_was_deleted_names_it_and_what_to_delete(line: Line, tmp_path: Path):
    key = BlockKey(layer=0, subblock="ffn", variant="ffn16")
    with pytest.raises(ArtifactError, match=r"layer 0 ffn ffn16: delete .*block_library and materialize block_library"):
        load_block(ArtifactStore(tmp_path), read_index(line.library_dir), key)


def test_block_scores_table_holds_every_composed_block_and_the_parents(line: Line):
    table = read_table(line.scores_dir, SCORES)
    assert line.scores.metrics["num_candidates"] == 3 * 8
    assert line.scores.metrics["num_non_finite_scores"] == 0
    assert len(table) == 3 * 9
    parent = table.filter((table["attention"] == "kv2") & (table["ffn"] == "ffn48"))
    assert parent["kl"].to_list() == [0.0, 0.0, 0.0]
    assert parent["lm_loss"].to_list() == [line.scores.metrics["parent_lm_loss"]] * 3
    others = table.filter((table["attention"] != "kv2") | (table["ffn"] != "ffn48"))
    assert others["kl"].to_numpy().min() > 0


def test_block_scores_of_a_larger_space_score_only_what_no_search_scored_before(line: Line, tmp_path: Path):
    larger = SearchSpaceConfig.model_validate(SPACE.model_dump() | {"ffn": ("parent", 32, 16, "no_op")})
    mark = 123.0

    def score(name: str, *, known: bool, tokens: int = 32, **changes: float) -> tuple[float, list[float]]:
        """Score in a store of its own; what is known there is marked. Return how many were scored, and all KLs."""
        store = ArtifactStore(tmp_path / name)
        shutil.copytree(line.workplace.store_root, store.root)
        if known:
            path = store.directory("block_scores", "x") / KNOWN
            marked = {one: measures | {"kl": mark} for one, measures in json.loads(path.read_text()).items()}
            path.write_text(json.dumps(marked))
            publish(store, "block_scores", "x", line.scores)
        inputs = replace(line.workplace, store_root=store.root).inputs(block_library=store.root / "library")
        library = BlockLibraryStage(search_space=larger, block_library=BLD.model_copy(update=changes))
        block_library.run(library, inputs, store.root / "library")
        scores = BlockScoresConfig(tokens=tokens, depth_steps=1, task=None, precision="fp32")
        config = BlockScoresStage(search_space=larger, block_scores=scores)
        found = block_scores.run(config, inputs, store.root / "out")
        return found.metrics["num_scored_candidates"], read_table(store.root / "out", SCORES)["kl"].to_list()

    num_all, anew = score("anew", known=False)
    num_new, reused = score("reused", known=True)
    assert (num_all, num_new) == (3 * 11, 3 * 3)  # one width beside three kinds of attention, in three layers
    assert reused.count(mark) == num_all - num_new
    # Candidates run in batches: in other company the last bits of a sum may differ.
    assert [one for one in reused if one != mark] == pytest.approx(
        [one for one, other in zip(anew, reused, strict=True) if other != mark], rel=1e-4, abs=1e-7
    )
    num_scored, others = score("fewer tokens", known=True, tokens=16)
    assert (num_scored, others.count(mark)) == (num_all, 0)
    # Every trained block is another: what is left are the parent's halves and no-ops, put together in three ways.
    num_retrained, retrained = score("retrained", known=True, learning_rate=1e-4)
    assert (num_retrained, retrained.count(mark)) == (3 * (11 - 3), 3 * 3)


def test_block_scores_say_how_far_joint_scores_are_from_sums_of_single_ones(line: Line):
    table = read_table(line.scores_dir, SCORES)
    kl = {
        (layer, attention, ffn): value
        for layer, attention, ffn, value in table.select("layer", "attention", "ffn", "kl").rows()
    }
    ratios = sorted(
        joint / (kl[layer, attention, "ffn48"] + kl[layer, "kv2", ffn])
        for (layer, attention, ffn), joint in kl.items()
        if attention != "kv2" and ffn != "ffn48"
    )
    assert line.scores.metrics["num_joint_scores"] == len(ratios) == 3 * 4
    assert line.scores.metrics["joint_over_sum_median"] == pytest.approx((ratios[5] + ratios[6]) / 2)
    assert ratios[0] <= line.scores.metrics["joint_over_sum_p10"] <= ratios[2]
    rows = line.scores.tables["joint_against_sums"].rows
    assert {row[0]: row[1] for row in rows} == {
        f"{attention}+{ffn}": 3 for attention in ("kv1", "no_op") for ffn in ("ffn16", "no_op")
    }


def test_block_scores_with_a_task_can_be_minimised_and_refined(line: Line, tmp_path: Path):
    store = ArtifactStore(tmp_path)
    sets_dir = store.directory("evaluation_sets", "x")
    items = [
        MultipleChoiceItem(prompt=f"{a} and", choices=(b, "zzz", a), gold=a < b) for a, b in combinations("abcd", 2)
    ]
    save_search_task(sets_dir, items)
    publish(store, "evaluation_sets", "x", StageResult())
    task = MultipleChoiceSet(name="piqa", num_items=len(items))
    inputs = line.workplace.inputs(block_library=line.library_dir, evaluation_sets=sets_dir)
    config = BlockScoresConfig(tokens=32, depth_steps=2, task=task, precision="fp32")
    scores = block_scores.run(BlockScoresStage(search_space=SPACE, block_scores=config), inputs, tmp_path / "scores")
    table = read_table(tmp_path / "scores", SCORES)
    assert table.filter("is_base")["task_error"].unique().to_list() == [scores.metrics["parent_task_error"]]
    assert set(table["task_error"] * len(items)) <= set(map(float, range(len(items) + 1)))
    search = SEARCH.model_copy(update={"objective": "task_error"})
    wanted = target(limit("num_parameters", 0.8))
    inputs = line.workplace.inputs(block_scores=tmp_path / "scores", block_profile=line.profile_dir)
    mip = MipStage(target_name="t", requirements=wanted, search=search, profile=PROFILE)
    found = mip_solution.run(mip, inputs, tmp_path / "mip")
    errors = {
        (layer, f"{attention}+{ffn}"): error
        for layer, attention, ffn, error in table.select("layer", "attention", "ffn", "task_error").rows()
    }
    base = scores.metrics["parent_task_error"]
    blocks = read_solution(tmp_path / "mip").blocks
    expected = base + sum(errors[layer, block.key] - base for layer, block in enumerate(blocks))
    assert found.metrics["predicted_task_error"] == pytest.approx(expected)
    refined = refined_solution.run(
        RefinedStage(
            search_space=SPACE,
            target_name="t",
            requirements=wanted,
            search=search,
            profile=PROFILE,
            task=task,
            precision="fp32",
        ),
        line.workplace.inputs(
            mip_solution=tmp_path / "mip",
            block_scores=tmp_path / "scores",
            block_profile=line.profile_dir,
            block_library=line.library_dir,
            evaluation_sets=sets_dir,
        ),
        tmp_path / "refined",
    )
    assert refined.metrics["task_error_of_the_chosen"] <= refined.metrics["task_error_of_the_first_answer"]
