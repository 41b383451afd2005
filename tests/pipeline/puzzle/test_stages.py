"""The Puzzle stages one after another on a tiny parent, as the graph runs them."""

import json
import statistics
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from pipeline.architecture import Architecture
from pipeline.artifacts import ArtifactStore
from pipeline.costs import num_parameters
from pipeline.data.benchmarks import MultipleChoiceItem
from pipeline.data.evaluation_sets import save_search_task
from pipeline.errors import ArtifactError, InfeasibleError, RecipeError
from pipeline.model.checkpoint import TensorReader, load_model, read_architecture
from pipeline.puzzle.library import BlockKey, load_block, read_index
from pipeline.puzzle.search import read_pool, read_solution
from pipeline.puzzle.tables import CHILDREN, LOSSES, SCORES, read_table
from pipeline.recipe import (
    BaselinesConfig,
    BlockLibraryConfig,
    BlockScoresConfig,
    Limit,
    MultipleChoiceSet,
    PoolConfig,
    ProfileConfig,
    RefinementConfig,
    Requirements,
    Scenario,
    SearchConfig,
    SearchSpaceConfig,
    SpeedReportConfig,
)
from pipeline.stage import StageResult
from pipeline.stages import (
    baselines,
    block_library,
    block_profile,
    block_scores,
    child_checkpoint,
    mip_solution,
    refined_solution,
    speed_report,
)
from pipeline.stages.configs import (
    BaselinesStage,
    BlockLibraryStage,
    BlockProfileStage,
    BlockScoresStage,
    ChildStage,
    MipStage,
    RefinedStage,
    SpeedStage,
)
from tests.pipeline.puzzle.builders import limit
from tests.pipeline.puzzle.conftest import Workplace, publish

SPACE = SearchSpaceConfig(attention=("parent", 1, "no_op"), ffn=("parent", 16, "no_op"), overrides=(), portable=False)
BLD = BlockLibraryConfig(
    mode="decoupled",
    coupled_space=None,
    tokens=96,
    closed_form_tokens=0,
    loss="tensor",
    batch_size=2,
    learning_rate=3e-3,
    min_learning_rate_ratio=0.1,
    warmup_ratio=0.0,
    schedule="cosine",
    weight_decay=0.0,
    betas=(0.9, 0.95),
    max_grad_norm=1.0,
    overrides=(),
    precision="fp32",
)
PROFILE = ProfileConfig(
    backend="torch",
    scenarios=(Scenario(name="chat", batch_size=1, prompt_tokens=12, generation_tokens=4),),
    precision="fp32",
    served_precision="fp32",
    num_threads=1,
    warmups=1,
    repeats=5,
)
SEARCH = SearchConfig(
    objective="kl",
    pool=PoolConfig(num_solutions=3, max_overlap=0.7),
    refinement=RefinementConfig(tokens=32, rounds=2, max_changed_layers=2),
    time_limit_s=10,
    relative_gap=0.0,
    max_recalibrations=2,
    speed_margin=0.0,
    speed_tolerance=0.05,
)
SPEED = SpeedReportConfig(rounds=3, warmups=1, device_memory_gib=0.5)


def target(*limits: Limit) -> Requirements:
    return Requirements(limits=limits, pins=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """The artifacts of the stages before the search."""

    workplace: Workplace
    library_dir: Path
    library: StageResult
    scores_dir: Path
    scores: StageResult
    profile_dir: Path
    profile: StageResult

    def mip(self, wanted: Requirements, out_dir: Path) -> StageResult:
        """Solve for a target."""
        config = MipStage(target_name="t", requirements=wanted, search=SEARCH, profile=PROFILE)
        inputs = self.workplace.inputs(block_scores=self.scores_dir, block_profile=self.profile_dir)
        return mip_solution.run(config, inputs, out_dir)

    def refined(self, wanted: Requirements, mip_dir: Path, out_dir: Path) -> StageResult:
        """Score the pool as whole models and improve the best."""
        config = RefinedStage(
            search_space=SPACE,
            target_name="t",
            requirements=wanted,
            search=SEARCH,
            profile=PROFILE,
            task=None,
            precision="fp32",
        )
        inputs = self.workplace.inputs(
            mip_solution=mip_dir,
            block_scores=self.scores_dir,
            block_profile=self.profile_dir,
            block_library=self.library_dir,
        )
        return refined_solution.run(config, inputs, out_dir)

    def child(self, wanted: Requirements, mip_dir: Path, out_dir: Path) -> StageResult:
        """Refine, assemble and measure."""
        refined_dir = out_dir.parent / f"{out_dir.name}-refined"
        self.refined(wanted, mip_dir, refined_dir)
        config = ChildStage(
            target_name="t", requirements=wanted, search=SEARCH, profile=PROFILE, measurement=SPEED.measurement
        )
        inputs = self.workplace.inputs(
            refined_solution=refined_dir, block_profile=self.profile_dir, block_library=self.library_dir
        )
        return child_checkpoint.run(config, inputs, out_dir)


@pytest.fixture(scope="module")
def line(workplace: Workplace) -> Line:
    store = ArtifactStore(workplace.store_root)
    library_dir, scores_dir, profile_dir = (
        store.directory(asset, "x") for asset in ("block_library", "block_scores", "block_profile")
    )
    library = block_library.run(
        BlockLibraryStage(search_space=SPACE, block_library=BLD), workplace.inputs(), library_dir
    )
    publish(store, "block_library", "x", library)
    scores = block_scores.run(
        BlockScoresStage(search_space=SPACE, block_scores=BlockScoresConfig(tokens=32, task=None, precision="fp32")),
        workplace.inputs(block_library=library_dir),
        scores_dir,
    )
    profile = block_profile.run(BlockProfileStage(search_space=SPACE, profile=PROFILE), workplace.inputs(), profile_dir)
    return Line(
        workplace=workplace,
        library_dir=library_dir,
        library=library,
        scores_dir=scores_dir,
        scores=scores,
        profile_dir=profile_dir,
        profile=profile,
    )


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


def test_mip_solution_meets_its_limits_with_answers_that_differ(line: Line, tmp_path: Path):
    result = line.mip(target(limit("num_parameters", 0.85), limit("decode_speed", 1.1)), tmp_path)
    assert result.metrics["num_violated_limits"] == 0
    assert result.metrics["predicted_decode_speedup"] >= 1.1 - 1e-6
    record = read_solution(tmp_path)
    assert result.metrics["num_parameters"] == num_parameters(record.architecture)
    assert len(result.tables["layers"].rows) == 3
    pool = read_pool(tmp_path).solutions
    assert pool[0] == record
    assert len(pool) == result.metrics["num_solutions"] == 3
    assert [one.objective for one in pool] == sorted(one.objective for one in pool)
    choices = [{(layer, block.key) for layer, block in enumerate(one.blocks)} for one in pool]
    assert all(len(ours & theirs) <= 0.7 * 3 for ours, theirs in combinations(choices, 2))


def test_refined_solution_scores_whole_models_and_is_no_worse_than_the_pool(line: Line, tmp_path: Path):
    wanted = target(limit("num_parameters", 0.7))
    line.mip(wanted, tmp_path / "mip")
    result = line.refined(wanted, tmp_path / "mip", tmp_path / "refined")
    table = result.tables["whole_models"]
    kl = [row[table.columns.index("kl")] for row in table.rows]
    assert result.metrics["kl_of_the_chosen"] == pytest.approx(min(kl), abs=1e-5)
    assert result.metrics["kl_of_the_first_answer"] == pytest.approx(kl[0], abs=1e-5)
    sums = dict(
        zip(
            (row[0] for row in table.rows),
            (row[table.columns.index("sum_over_whole")] for row in table.rows),
            strict=True,
        )
    )
    assert result.metrics["sum_of_scores_over_whole"] == pytest.approx(
        statistics.median([ratio for name, ratio in sums.items() if name.startswith("pool")]), abs=1e-4
    )
    changed = [row[table.columns.index("num_changed_layers")] for row in table.rows]
    assert all(1 <= count <= 3 for count in changed)
    assert result.metrics["num_violated_limits"] == 0
    assert result.metrics["num_parameters"] <= 0.7 * num_parameters(line.workplace.architecture)
    # The chosen child, assembled, is as far from the parent as was promised.
    child = line.child(wanted, tmp_path / "mip", tmp_path / "child")
    assert child.metrics["num_parameters"] == result.metrics["num_parameters"]
    packed = line.workplace.packed("validation").take(32)
    parent, assembled = (
        model(input_ids=packed.tokens_NT).logits.detach().double()
        for model in (line.workplace.model(), load_model(tmp_path / "child", dtype=torch.float32))
    )
    apart = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=parent), torch.distributions.Categorical(logits=assembled)
    ).mean()
    assert result.metrics["kl_of_the_chosen"] == pytest.approx(apart.item(), rel=1e-4)


def test_baselines_meet_the_limits_and_stand_beside_the_refined_solution(line: Line, tmp_path: Path):
    wanted = target(limit("num_parameters", 0.8), limit("decode_speed", 1.05))
    line.mip(wanted, tmp_path / "mip")
    refined = line.refined(wanted, tmp_path / "mip", tmp_path / "refined")
    config = BaselinesStage(
        search_space=SPACE,
        requirements=wanted,
        search=SEARCH,
        profile=PROFILE,
        task=None,
        precision="fp32",
        baselines=BaselinesConfig(rounds=1, warmups=1, num_random=2),
    )
    inputs = line.workplace.inputs(
        refined_solution=tmp_path / "refined",
        block_scores=line.scores_dir,
        block_profile=line.profile_dir,
        block_library=line.library_dir,
    )
    result = baselines.run(config, inputs, tmp_path / "baselines")
    table = read_table(tmp_path / "baselines", CHILDREN)
    methods = set(table["method"])
    assert methods >= {baselines.PUZZLE, baselines.WITHOUT_BLD, "max_parameters", "random 0", "random 1", "drop_last"}
    assert result.metrics["num_children"] == len(table) == len(methods)
    puzzle = table.filter(table["method"] == baselines.PUZZLE)
    assert puzzle["kl"][0] == pytest.approx(refined.metrics["kl_of_the_chosen"], rel=1e-6)
    assert puzzle["weights"][0] == "library"
    size = num_parameters(line.workplace.architecture)
    assert max(table["num_parameters"]) <= 0.8 * size
    assert min(table["predicted_speedup"]) >= 1.05 - 1e-6
    most = table.filter(table["method"] == "max_parameters")["num_parameters"][0]
    chosen_from_library = table.filter(table["weights"] == "library")["num_parameters"]
    assert most == max(chosen_from_library)
    architectures = json.loads((tmp_path / "baselines/architectures.json").read_text())
    for method, count in table.select("method", "num_parameters").rows():
        assert num_parameters(Architecture.model_validate(architectures[method])) == count
    kl = dict(table.select("method", "kl").rows())
    others = [value for name, value in kl.items() if name not in (baselines.PUZZLE, baselines.WITHOUT_BLD)]
    assert result.metrics["kl_over_best_baseline"] == pytest.approx(kl[baselines.PUZZLE] / min(others))


def test_mip_solution_pins_force_blocks_and_unknown_pins_are_refused(line: Line, tmp_path: Path):
    pin = {"layers": (1,), "attention": "no_op", "ffn": 16}
    line.mip(Requirements.model_validate({"limits": (), "pins": (pin,)}), tmp_path)
    blocks = read_solution(tmp_path).blocks
    assert [block.key for block in blocks] == ["kv2+ffn48", "no_op+ffn16", "kv2+ffn48"]
    with pytest.raises(RecipeError, match="leave none of its scored blocks"):
        line.mip(Requirements.model_validate({"limits": (), "pins": (pin | {"ffn": 8},)}), tmp_path)


def test_mip_solution_impossible_target_says_what_is_reachable(line: Line, tmp_path: Path):
    with pytest.raises(InfeasibleError, match="the best of all candidates is"):
        line.mip(target(limit("num_parameters", 0.01)), tmp_path)


def test_child_checkpoint_holds_the_chosen_blocks_tensor_by_tensor(line: Line, tmp_path: Path):
    pins = (
        {"layers": (0,), "attention": 1, "ffn": "parent"},
        {"layers": (1,), "attention": "parent", "ffn": 16},
        {"layers": (2,), "attention": "no_op", "ffn": "no_op"},
    )
    wanted = Requirements.model_validate({"limits": (), "pins": pins})
    line.mip(wanted, tmp_path / "mip")
    result = line.child(wanted, tmp_path / "mip", tmp_path / "child")
    assert result.metrics["num_missed_limits"] == result.metrics["num_recalibrations"] == 0
    child, parent = TensorReader(tmp_path / "child"), TensorReader(line.workplace.parent_dir)
    store, index = ArtifactStore(line.workplace.store_root), read_index(line.library_dir)
    expected = {name: parent.read(name) for name in parent.names if not name.startswith("model.layers.")}
    for key in (
        BlockKey(layer=0, subblock="attention", variant="kv1"),
        BlockKey(layer=1, subblock="ffn", variant="ffn16"),
    ):
        block = load_block(store, index, key)
        expected |= {f"model.layers.{key.layer}.{name}": tensor for name, tensor in block.items()}
    for layer, starts in ((0, ("mlp.", "post_attention_layernorm.")), (1, ("self_attn.", "input_layernorm."))):
        tensors = parent.read_prefix(f"model.layers.{layer}.")
        expected |= {
            f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items() if name.startswith(starts)
        }
    assert set(child.names) == set(expected)
    assert all(torch.equal(child.read(name), tensor) for name, tensor in expected.items())
    model = load_model(tmp_path / "child", dtype=torch.float32)
    assert result.metrics["num_parameters"] == sum(weight.numel() for weight in model.parameters())
    assert read_architecture(tmp_path / "child") == read_solution(tmp_path / "child").architecture


def told_a_faster_machine(line: Line, directory: Path, *, times: float) -> Line:
    """The same line with a profile that predicts everything `times` as fast as it was measured."""
    directory.mkdir()
    for name in ("profile.parquet", "memory.parquet", "architecture.json"):
        (directory / name).write_bytes((line.profile_dir / name).read_bytes())
    calibration = json.loads((line.profile_dir / "calibration.json").read_text())
    for entry in calibration["entries"]:
        entry["factor"] /= times
    (directory / "calibration.json").write_text(json.dumps(calibration))
    return replace(line, profile_dir=directory)


def test_child_checkpoint_short_of_its_speed_calibrates_and_searches_again(line: Line, tmp_path: Path):
    wanted = target(limit("decode_speed", 1.3))
    hopeful = told_a_faster_machine(line, tmp_path / "profile", times=10)
    hopeful.mip(wanted, tmp_path / "mip")
    assert [block.key for block in read_solution(tmp_path / "mip").blocks] == ["kv2+ffn48"] * 3
    result = hopeful.child(wanted, tmp_path / "mip", tmp_path / "child")
    log = json.loads((tmp_path / "child/view/search_log.json").read_text())
    assert log[0]["limits"][0]["predicted"] > 5
    assert not log[0]["limits"][0]["is_met"]
    assert result.metrics["num_recalibrations"] >= 1
    assert set(log[1]["blocks"]) != {"kv2+ffn48"}
    assert read_architecture(tmp_path / "child") == read_solution(tmp_path / "child").architecture


def test_child_checkpoint_out_of_reach_once_measured_keeps_its_child_and_counts_the_miss(line: Line, tmp_path: Path):
    wanted = target(limit("decode_speed", 50_000.0, relative=False))
    hopeful = told_a_faster_machine(line, tmp_path / "profile", times=1000)
    hopeful.mip(wanted, tmp_path / "mip")
    result = hopeful.child(wanted, tmp_path / "mip", tmp_path / "child")
    log = json.loads((tmp_path / "child/view/search_log.json").read_text())
    assert "the best of all candidates is" in log[1]["infeasible"]
    assert (result.metrics["num_missed_limits"], result.metrics["num_recalibrations"]) == (1, 0)
    assert (
        load_model(tmp_path / "child", dtype=torch.float32).architecture == read_solution(tmp_path / "mip").architecture
    )


def test_speed_report_measures_three_models_and_counts_their_memory(line: Line, tmp_path: Path):
    wanted = target(limit("num_parameters", 0.8))
    line.mip(wanted, tmp_path / "mip")
    line.child(wanted, tmp_path / "mip", tmp_path / "child")
    inputs = line.workplace.inputs(child_checkpoint=tmp_path / "child", rl_checkpoint=tmp_path / "child")
    limits = (
        limit("num_parameters", 0.8),
        limit("kv_bytes_per_token", 0.01),
        limit("decode_speed", 0.001),
        limit("prefill_speed", 1e9, relative=False),
    )
    config = SpeedStage(profile=PROFILE, speed=SPEED, limits=limits, speed_tolerance=0.05)
    result = speed_report.run(config, inputs, tmp_path / "speed")
    assert [row[3] for row in result.tables["limits"].rows] == [True, False, True, False]
    final = read_architecture(tmp_path / "child")
    assert result.tables["limits"].rows[0][2] == round(
        num_parameters(final) / num_parameters(line.workplace.architecture), 4
    )
    assert (result.metrics["num_limits"], result.metrics["num_missed_limits"]) == (4, 2)
    assert result.metrics["num_limits_within_tolerance"] == 0
    assert result.metrics["decode_speedup"] > 0
    assert result.metrics["decode_speedup_low"] <= result.metrics["decode_speedup"]
    parent = line.workplace.architecture
    weights_bytes = 4 * num_parameters(parent)
    assert result.metrics["parent_weights_mib"] == pytest.approx(weights_bytes / 2**20, abs=1e-3)
    # 3 layers x 2 heads x 8 values for keys and for values, 4 bytes each.
    assert result.metrics["parent_cached_tokens"] == (2**29 - weights_bytes) // (3 * 2 * 8 * 2 * 4)
    assert len(result.tables["speed"].rows) == 3 * 2


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
    sets_dir = tmp_path / "sets"
    items = [
        MultipleChoiceItem(prompt=f"{a} and", choices=(b, "zzz", a), gold=a < b) for a, b in combinations("abcd", 2)
    ]
    save_search_task(sets_dir, items)
    task = MultipleChoiceSet(name="piqa", num_items=len(items))
    inputs = line.workplace.inputs(block_library=line.library_dir, evaluation_sets=sets_dir)
    config = BlockScoresConfig(tokens=32, task=task, precision="fp32")
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
