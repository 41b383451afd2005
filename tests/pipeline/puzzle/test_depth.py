"""In which order layers are left out, against whole models without them."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.artifacts import ArtifactStore
from pipeline.progress import SilentReporter
from pipeline.puzzle.depth import DepthStep, depth_table, measure_depth, read_depth_order
from pipeline.puzzle.divergence import Divergence
from pipeline.puzzle.score_functions import DivergenceScore
from pipeline.puzzle.scoring import LayerBlock
from pipeline.puzzle.search_space import dropped
from pipeline.puzzle.tables import DEPTH, read_table
from pipeline.recipe import BlockScoresConfig, SearchSpaceConfig
from pipeline.stages import block_scores
from pipeline.stages.configs import BlockScoresStage
from tests.pipeline.puzzle.line import SPACE, Line
from tests.pipeline.puzzle.workplace import Workplace, publish

NUM_TOKENS = 48


def kl_without(workplace: Workplace, gone: Sequence[int], *, num_tokens: int = NUM_TOKENS) -> float:
    """KL to the parent of a model whose list of layers lacks these."""
    parent, child = workplace.model(), workplace.model()
    child.model.layers = torch.nn.ModuleList(one for layer, one in enumerate(child.model.layers) if layer not in gone)
    tokens_BT = workplace.packed("validation").take(num_tokens).tokens_NT
    with torch.no_grad():
        p, q = (
            torch.distributions.Categorical(logits=model(input_ids=tokens_BT, use_cache=False).logits.double())
            for model in (parent, child)
        )
    return torch.distributions.kl_divergence(p, q).mean().item()


def measure(
    workplace: Workplace,
    work_dir: Path,
    *,
    num_steps: int,
    known: Mapping[tuple[int, ...], Mapping[LayerBlock, Divergence]] | None = None,
) -> list[DepthStep]:
    return measure_depth(
        workplace.model(),
        workplace.architecture.homogeneous_block(),
        [DivergenceScore(packed=workplace.packed("validation").take(NUM_TOKENS))],
        num_steps=num_steps,
        known=lambda gone: (known or {}).get(tuple(gone), {}),
        work_dir=work_dir,
        max_activation_bytes=10**9,
        reporter=SilentReporter(),
    )


def test_each_step_leaves_out_the_layer_without_which_the_whole_model_is_closest(workplace: Workplace, tmp_path: Path):
    steps = measure(workplace, tmp_path, num_steps=9)  # no more than there are layers
    gone: list[int] = []
    for step in steps:
        expected = {layer: kl_without(workplace, [*gone, layer]) for layer in range(3) if layer not in gone}
        assert step.gone == tuple(gone)
        assert {layer: one.kl for layer, one in step.found.items()} == pytest.approx(expected, rel=1e-4)
        gone.append(min(expected, key=lambda layer: expected[layer]))
    assert len(steps) == 3
    table = depth_table(steps)
    assert table["layer"].to_list() == gone
    assert table["num_gone"].to_list() == [0, 1, 2]
    assert table["kl"].to_list() == pytest.approx([kl_without(workplace, gone[: n + 1]) for n in range(3)], rel=1e-4)


def test_after_the_last_step_layers_go_as_it_measured_them(workplace: Workplace, tmp_path: Path):
    alone = {layer: kl_without(workplace, [layer]) for layer in range(3)}
    table = depth_table(measure(workplace, tmp_path, num_steps=1))
    assert table["layer"].to_list() == sorted(alone, key=lambda layer: alone[layer])
    assert table["num_gone"].to_list() == [0, 0, 0]


def test_what_is_known_is_not_measured_again_and_what_is_not_finite_goes_last(workplace: Workplace, tmp_path: Path):
    (first,) = measure(workplace, tmp_path / "one", num_steps=1)
    mark = dict(zip(range(3), (math.nan, 2.0, 1.0), strict=True))
    marked = {(layer, dropped(layer).key): replace(first.found[layer], kl=kl) for layer, kl in mark.items()}
    steps = measure(workplace, tmp_path / "two", num_steps=2, known={(): marked})
    assert steps[0].order == [2, 1, 0]
    assert not list((tmp_path / "two").glob("depth-0-*"))
    assert steps[1].found[0].kl == pytest.approx(kl_without(workplace, [2, 0]), rel=1e-4)


def test_a_run_that_goes_on_with_another_layer_gone_reads_no_sums_of_the_one_before(
    workplace: Workplace, tmp_path: Path
):
    first, second = measure(workplace, tmp_path, num_steps=2)
    taken, other = first.order[:2]
    swapped = {(layer, dropped(layer).key): one for layer, one in first.found.items()}
    swapped[other, dropped(other).key] = replace(first.found[other], kl=0.0)
    again = measure(workplace, tmp_path, num_steps=2, known={(): swapped})
    assert (second.gone, again[1].gone) == ((taken,), (other,))
    (last,) = {0, 1, 2} - {taken, other}
    assert again[1].found[last].kl == pytest.approx(kl_without(workplace, [other, last]), rel=1e-4)


def test_block_scores_measures_layers_that_the_space_does_not_let_go(line: Line, tmp_path: Path):
    overrides = [{"layers": [0], "attention": ["parent"]}, {"layers": [2], "ffn": ["parent"]}]
    space = SearchSpaceConfig.model_validate(SPACE.model_dump() | {"overrides": overrides})
    inputs = line.workplace.inputs(block_library=line.library_dir)
    config = BlockScoresConfig(tokens=32, depth_steps=1, task=None, precision="fp32")
    block_scores.run(BlockScoresStage(search_space=space, block_scores=config), inputs, tmp_path)
    # That the one between them goes is a candidate.
    assert {path.name for path in (tmp_path / "_work").glob("depth-0-*/layer-*")} == {
        "layer-000.json",
        "layer-002.json",
    }
    alone = {layer: kl_without(line.workplace, [layer], num_tokens=32) for layer in range(3)}
    order = read_depth_order(tmp_path)
    assert order == sorted(alone, key=lambda layer: alone[layer])
    found = dict(read_table(tmp_path, DEPTH).select("layer", "kl").rows())
    assert found == pytest.approx(alone, rel=1e-4)


def test_block_scores_measures_only_the_steps_that_no_search_of_the_store_measured(line: Line, tmp_path: Path):
    store = ArtifactStore(tmp_path / "store")
    shutil.copytree(line.workplace.store_root, store.root)
    publish(store, "block_scores", "x", line.scores)  # of two steps
    inputs = replace(line.workplace, store_root=store.root).inputs(block_library=line.library_dir)
    config = BlockScoresConfig(tokens=32, depth_steps=3, task=None, precision="fp32")
    block_scores.run(BlockScoresStage(search_space=SPACE, block_scores=config), inputs, tmp_path / "out")
    (measured,) = {path.parent.name for path in (tmp_path / "out/_work").glob("depth-*/layer-*")}
    assert measured.startswith("depth-2-")
    order = read_depth_order(tmp_path / "out")
    assert order[:2] == read_depth_order(line.scores_dir)[:2]
    assert read_table(tmp_path / "out", DEPTH)["kl"].to_list() == pytest.approx(
        [kl_without(line.workplace, order[: n + 1], num_tokens=32) for n in range(3)], rel=1e-4
    )
