"""The block library as a stage: pairs trained as one; rounds, ranks and kills at random change no bit of it."""

import multiprocessing
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.artifacts import ArtifactStore
from pipeline.model.checkpoint import TensorReader, load_model
from pipeline.processes import run_checked
from pipeline.progress import SilentReporter
from pipeline.puzzle.assemble import assemble_child
from pipeline.puzzle.bld_cost import HeldBytes, bounded_rounds
from pipeline.puzzle.block_keys import BlockKey, library_keys
from pipeline.puzzle.importance import load_importance
from pipeline.puzzle.initial import build_variant, library_variants
from pipeline.puzzle.library import block_fingerprint, load_block, read_index
from pipeline.puzzle.score_functions import DivergenceScore
from pipeline.puzzle.search_space import resolve
from pipeline.puzzle.whole_models import score_models
from pipeline.recipe import BlockLibraryConfig, SearchSpaceConfig
from pipeline.stage import ExecutionSettings, StageInputs, StageResult
from pipeline.stages import block_library
from pipeline.stages.configs import BlockLibraryStage
from tests.pipeline.puzzle.builders import make_architecture
from tests.pipeline.puzzle.line import BLD, SPACE
from tests.pipeline.puzzle.workplace import Workplace
from tests.pipeline.training import run_stages
from tests.pipeline.training.builders import write_spec

COUPLED = BLD.model_copy(update={"mode": "coupled", "closed_form_tokens": 64})
HYBRID = BlockLibraryConfig.model_validate(
    BLD.model_dump() | {"mode": "hybrid", "coupled_space": {"attention": ["no_op", 1], "ffn": ["parent", 16]}}
)
# Uneven over the layers, and with pairs: layers without anything to train, and a last layer that no rank needs.
UNEVEN = SearchSpaceConfig.model_validate(
    SPACE.model_dump()
    | {
        "overrides": [
            {"layers": [0], "attention": ["parent"], "ffn": ["parent", 16]},
            {"layers": [2], "attention": ["parent"], "ffn": ["parent"]},
        ]
    }
)


def inputs_of(workplace: Workplace, store_root: Path, **execution: object) -> StageInputs:
    settings = ExecutionSettings.model_validate({"num_threads": 1, "checkpoint_interval_steps": 1} | execution)
    return replace(workplace.inputs(), store_root=store_root, execution=settings)


def run(
    workplace: Workplace,
    root: Path,
    *,
    bld: BlockLibraryConfig = BLD,
    space: SearchSpaceConfig = SPACE,
    **execution: object,
) -> StageResult:
    """Make a library from nothing below `root`."""
    stage = BlockLibraryStage(search_space=space, block_library=bld)
    return block_library.run(stage, inputs_of(workplace, root / "store", **execution), root / "library")


def same_library(one: Path, other: Path) -> bool:
    """Whether two libraries have the same index, which names every block's content hash, and the same losses."""
    return all(
        (one / "library" / name).read_bytes() == (other / "library" / name).read_bytes()
        for name in ("index.json", "losses.parquet")
    )


def pair(layer: int, variant: str) -> BlockKey:
    return BlockKey(layer=layer, subblock="pair", variant=variant)


def test_library_keys_of_each_mode_are_singles_pairs_or_both(workplace: Workplace):
    space = resolve(SPACE, workplace.architecture)
    keys = {
        bld.mode: [str(key) for key in library_keys(space, bld) if key.layer == 1] for bld in (BLD, COUPLED, HYBRID)
    }
    assert keys["decoupled"] == ["layer 1 attention kv1", "layer 1 ffn ffn16"]
    assert keys["coupled"] == [
        f"layer 1 pair {variant}"
        for variant in (
            "kv2+ffn16",
            "kv2+no_op",
            "kv1+ffn48",
            "kv1+ffn16",
            "kv1+no_op",
            "no_op+ffn48",
            "no_op+ffn16",
        )
    ]
    assert keys["hybrid"] == keys["decoupled"] + [
        f"layer 1 pair {variant}" for variant in ("kv1+ffn48", "kv1+ffn16", "no_op+ffn48", "no_op+ffn16")
    ]


def test_fingerprint_of_a_block_holds_what_decides_its_weights_and_nothing_else():
    key = BlockKey(layer=0, subblock="ffn", variant="ffn16")

    def of(**changes: object) -> str:
        settings = BlockLibraryConfig.model_validate(BLD.model_dump() | changes)
        return block_fingerprint(key, upstream={}, settings=settings)

    other = {"subblock": "ffn", "variants": ["linear"], "learning_rate": 1.0}
    same = {"subblock": "attention", "variants": ["ffn16"], "learning_rate": 1.0}
    own = {"subblock": "ffn", "variants": ["ffn16"], "warmup_ratio": 0.5}
    assert of() == of(mode="coupled") == of(overrides=[other, same])
    assert len({of(), of(overrides=[own]), of(loss="token"), of(max_grad_norm=2.0)}) == 4
    assert of(overrides=[own]) == of(warmup_ratio=0.5)


def test_override_trains_its_variant_as_a_library_of_those_settings_does(workplace: Workplace, tmp_path: Path):
    own = {"subblock": "ffn", "variants": ["ffn16"], "learning_rate": 1e-4, "max_grad_norm": 0.1}
    overridden = BlockLibraryConfig.model_validate(BLD.model_dump() | {"overrides": [own]})
    slower = BLD.model_copy(update={"learning_rate": 1e-4, "max_grad_norm": 0.1})
    for name, bld in (("plain", BLD), ("overridden", overridden), ("slower", slower)):
        run(workplace, tmp_path / name, bld=bld)
    plain, found, wanted = (
        read_index(tmp_path / name / "library").layers["1"] for name in ("plain", "overridden", "slower")
    )
    assert found["ffn"] == wanted["ffn"] != plain["ffn"]
    assert found["attention"] == plain["attention"] != wanted["attention"]


def test_trained_pair_is_what_a_child_is_scored_and_assembled_from(workplace: Workplace, tmp_path: Path):
    bld = BlockLibraryConfig.model_validate(HYBRID.model_dump() | {"tokens": 192, "learning_rate": 1e-2})
    run(workplace, tmp_path, bld=bld)
    index, store = read_index(tmp_path / "library"), ArtifactStore(tmp_path / "store")
    entry = index.entry(pair(1, "no_op+ffn48"))
    assert entry.final_loss is not None
    assert entry.initial_loss is not None
    assert entry.final_loss < 0.95 * entry.initial_loss  # the parent's FFN makes up for the attention that is gone
    # Composed in memory and assembled on disk, a layer is the pair where there is one, else its halves.
    space = resolve(SPACE, workplace.architecture)
    by_key = {block.key: block for block in space.layers[0].blocks}
    blocks = [
        by_key[key].model_copy(update={"parent_layers": (layer,)})
        for layer, key in enumerate(("kv1+ffn16", "no_op+ffn48", "kv2+ffn16"))
    ]
    assemble_child(tmp_path / "child", blocks, parent_dir=workplace.parent_dir, index=index, store=store)
    child, parent = TensorReader(tmp_path / "child"), TensorReader(workplace.parent_dir)
    expected = {
        **{f"model.layers.0.{name}": tensor for name, tensor in load_block(store, index, pair(0, "kv1+ffn16")).items()},
        **{f"model.layers.1.{name}": value for name, value in load_block(store, index, pair(1, "no_op+ffn48")).items()},
        **{name: parent.read(name) for name in parent.names if name.startswith("model.layers.2.self_attn")},
    }
    single = load_block(store, index, BlockKey(layer=2, subblock="ffn", variant="ffn16"))
    expected |= {f"model.layers.2.{name}": tensor for name, tensor in single.items()}
    for name, tensor in expected.items():
        assert torch.equal(child.read(name), tensor), name
    packed = workplace.packed("validation").take(32)
    variants = library_variants(
        workplace.architecture, index=index, store=store, dtype=torch.float32, device=torch.device("cpu")
    )
    scored = score_models(
        workplace.model(),
        {"child": blocks},
        variants,
        [DivergenceScore(packed=packed)],
        work_dir=tmp_path / "scores",
        max_activation_bytes=2**20,
        reporter=SilentReporter(),
    )["child"]
    logits = [
        model(input_ids=packed.tokens_NT).logits.detach().double()
        for model in (workplace.model(), load_model(tmp_path / "child", dtype=torch.float32))
    ]
    apart = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=one) for one in logits)).mean()
    assert scored.kl == pytest.approx(apart.item(), rel=1e-4)


def test_initial_pair_is_the_two_subblocks_cut_apart(workplace: Workplace):
    importance, reader = load_importance(workplace.importance_dir), TensorReader(workplace.parent_dir)
    whole, *halves = (
        build_variant(key, workplace.architecture, reader, importance, dtype=torch.float32).state_dict()
        for key in (
            pair(1, "kv1+ffn16"),
            BlockKey(layer=1, subblock="attention", variant="kv1"),
            BlockKey(layer=1, subblock="ffn", variant="ffn16"),
        )
    )
    assert set(whole) == set(halves[0]) | set(halves[1])
    for half in halves:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in half.items())


@pytest.mark.parametrize("bld", [COUPLED, HYBRID], ids=lambda bld: bld.mode)
def test_library_in_rounds_that_fit_a_memory_is_the_same(workplace: Workplace, tmp_path: Path, bld: BlockLibraryConfig):
    run(workplace, tmp_path / "at-once", bld=bld)
    keys = library_keys(resolve(SPACE, workplace.architecture), bld)

    def held_bytes(keys: Sequence[BlockKey]) -> float:
        return HeldBytes.of(workplace.architecture, keys).most(has_closed_form=bld.closed_form_tokens > 0)

    bound = held_bytes(keys) / 5
    assert bound > max(held_bytes([key]) for key in keys)
    result = run(workplace, tmp_path / "rounds", bld=bld, block_memory_gib=bound / 2**30)
    assert same_library(tmp_path / "at-once", tmp_path / "rounds")
    assert result.metrics["num_trained_blocks"] == len(keys)
    assert not any((tmp_path / "rounds/library/_work").glob("bld-*"))


def test_rounds_leave_room_for_the_sums_and_the_solution_of_a_closed_form_start():
    # Wide FFNs of a narrow model: their sums outweigh weights and moments.
    architecture = make_architecture(hidden_size=8, intermediate_size=512, num_layers=3)
    widths = (256, 128, 64)
    keys = [BlockKey(layer=layer, subblock="ffn", variant=f"ffn{width}") for layer in range(3) for width in widths]
    sizes = {width: 3 * 8 * width + 8 for width in widths}
    # The wider of two: its sums in fp32; in fp64 the system and its factors, the right side and the solution.
    both = 4 * (sizes[256] + sizes[128]) + 20 * 256 * (256 + 8)
    assert HeldBytes.of(architecture, keys[:2]).most(has_closed_form=True) == both
    trained = 12 * 3 * sum(sizes.values()) + 4 * sizes[256]
    assert HeldBytes.of(architecture, keys).training == trained < both
    assert bounded_rounds(architecture, keys, max_bytes=trained, has_closed_form=False) == (tuple(keys),)
    rounds = bounded_rounds(architecture, keys, max_bytes=both, has_closed_form=True)
    assert [key for one in rounds for key in one] == keys
    assert len(rounds) > 1
    for number, one in enumerate(rounds):
        assert HeldBytes.of(architecture, one).most(has_closed_form=True) <= both
        if number:
            assert HeldBytes.of(architecture, [*rounds[number - 1], one[0]]).most(has_closed_form=True) > both


def test_cost_metrics_say_how_near_the_training_comes_to_matrix_products(workplace: Workplace, tmp_path: Path):
    metrics = run(workplace, tmp_path).metrics
    assert metrics["achieved_gflops_per_s"] > 0
    assert metrics["share_of_matmul_peak"] == pytest.approx(
        metrics["achieved_gflops_per_s"] / metrics["matmul_peak_gflops_per_s"], rel=1e-2
    )
    # Six blocks of two variants in three layers: the parent's pass is done twice, or once for each as far as its layer.
    assert 1 < metrics["flops_of_runs_per_variant_over_this"] < metrics["flops_of_runs_per_block_over_this"] < 6
    blocks = sum(path.stat().st_size for path in (tmp_path / "store/bld_block").glob("*/block.*"))
    assert metrics["blocks_mib"] == pytest.approx(blocks / 2**20, abs=0.05)
    assert "training_s" not in run(workplace, tmp_path).metrics  # nothing was trained


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_library_of_several_ranks_is_that_of_one(workplace: Workplace, tmp_path: Path, num_ranks: int):
    bld = HYBRID.model_copy(update={"closed_form_tokens": 64})
    # In rounds of which the ranks have different numbers; there may be more ranks than layers.
    specs = [
        write_spec(
            tmp_path / f"block_library-{name}.json",
            BlockLibraryStage(search_space=space, block_library=bld),
            inputs_of(workplace, tmp_path / name / "store", block_memory_gib=0.3 * 2**-10),
            out_dir=tmp_path / name / "library",
        )
        for name, space in (("even", SPACE), ("uneven", UNEVEN))
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    run_checked([*launcher, "-m", run_stages.__name__, *map(str, specs)], what=f"{num_ranks} ranks", timeout_s=240)
    for name, space in (("even", SPACE), ("uneven", UNEVEN)):
        run(workplace, tmp_path / f"{name}-one", bld=bld, space=space)
        assert same_library(tmp_path / f"{name}-one", tmp_path / name)


def make_library(stage: BlockLibraryStage, inputs: StageInputs, out_dir: Path) -> None:
    """Run the stage in a process of its own, to be killed."""
    torch.set_num_threads(1)
    block_library.run(stage, inputs, out_dir)


@pytest.mark.slow
def test_library_killed_at_random_moments_is_that_of_an_undisturbed_run(workplace: Workplace, tmp_path: Path):
    stage = BlockLibraryStage(
        search_space=SPACE, block_library=HYBRID.model_copy(update={"closed_form_tokens": 64, "batch_size": 1})
    )
    began = time.monotonic()
    run(workplace, tmp_path / "undisturbed", bld=stage.block_library)
    whole_s = time.monotonic() - began
    root, rng, num_killed = tmp_path / "killed", random.Random(5), 0
    inputs = inputs_of(workplace, root / "store", block_memory_gib=0.4 * 2**-10)
    # Forked from a process that has imported everything and computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([block_library.__name__])
    exit_code = None
    while exit_code != 0:
        process = context.Process(target=make_library, args=(stage, inputs, root / "library"))
        process.start()
        process.join(None if num_killed == 6 else rng.uniform(0, whole_s / 2))
        if process.is_alive():
            process.kill()
            process.join()
            num_killed += 1
        exit_code = process.exitcode
        assert exit_code in (0, -signal.SIGKILL)
    assert num_killed >= 3
    assert same_library(tmp_path / "undisturbed", root)
    for path in (tmp_path / "undisturbed/store/bld_block").glob("*/block.*"):
        assert path.read_bytes() == (root / "store" / path.relative_to(tmp_path / "undisturbed/store")).read_bytes()
