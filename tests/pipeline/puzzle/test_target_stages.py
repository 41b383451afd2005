"""The stages of one target, one after another on a tiny parent, as the graph runs them."""

import json
import statistics
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch

from pipeline.architecture import Architecture
from pipeline.artifacts import ArtifactStore
from pipeline.costs import num_parameters
from pipeline.errors import InfeasibleError, RecipeError
from pipeline.model.checkpoint import TensorReader, load_model, read_architecture
from pipeline.model.repacking import portable
from pipeline.puzzle.depth import read_depth_order
from pipeline.puzzle.library import BlockKey, load_block, read_index
from pipeline.puzzle.limits import memory_of
from pipeline.puzzle.search import read_pool, read_solution
from pipeline.puzzle.tables import CHILDREN, read_table
from pipeline.recipe import (
    BaselinesConfig,
    ProfileConfig,
    Requirements,
)
from pipeline.stages import (
    baselines,
    block_profile,
    speed_report,
)
from pipeline.stages.configs import (
    BaselinesStage,
    BlockProfileStage,
    SpeedStage,
)
from tests.pipeline.puzzle.builders import limit
from tests.pipeline.puzzle.fake_runtimes import install_llama_bench, install_vllm
from tests.pipeline.puzzle.line import PROFILE, SEARCH, SPACE, SPEED, Line, target


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
    line.refined(wanted, tmp_path / "mip", tmp_path / "refined")
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
    # Dropped layers meet any of these limits; narrower ones may all be too slow, and then that is said.
    left_out = set(filter(None, result.facts.get("do not meet the limits", "").split(", ")))
    assert left_out <= {"uniform"}
    assert methods == {baselines.PUZZLE, baselines.WITHOUT_BLD} | (
        {
            "greedy",
            "max_parameters",
            "random 0",
            "random 1",
            "drop_by_influence",
            "drop_by_score",
            "drop_last",
            "uniform",
        }
        - left_out
    )
    assert result.metrics["num_children"] == len(table) == len(methods)
    puzzle = table.filter(table["method"] == baselines.PUZZLE)
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
    # The layers that turn the hidden states least go first; the last norm's weights are ones, so it turns none.
    with torch.no_grad():
        tokens_BT = line.workplace.packed("validation").take(32).tokens_NT
        states = line.workplace.model()(input_ids=tokens_BT, output_hidden_states=True).hidden_states
    alike = [torch.nn.functional.cosine_similarity(*pair, dim=-1).mean().item() for pair in pairwise(states)]
    for method, order in (
        ("drop_by_influence", sorted(range(3), key=lambda layer: -alike[layer])),
        ("drop_by_score", read_depth_order(line.scores_dir)),
        ("drop_last", [1, 0, 2]),
    ):
        blocks = Architecture.model_validate(architectures[method]).blocks
        kept = [layer for layer, block in enumerate(blocks) if block.key == "kv2+ffn48"]
        assert len(kept) < 3
        assert kept == sorted(order[len(order) - len(kept) :])
    kl = dict(table.select("method", "kl").rows())
    # Judged on the last two windows; what was chosen, and which layers go first, was decided on the first two.
    unseen_BT = line.workplace.packed("validation").tokens_NT[-2:]
    parent, without = line.workplace.model(), line.workplace.model()
    dropped = Architecture.model_validate(architectures["drop_by_influence"]).blocks
    without.model.layers = torch.nn.ModuleList(
        layer for layer, block in zip(without.model.layers, dropped, strict=True) if block.key == "kv2+ffn48"
    )
    p, q = (
        torch.distributions.Categorical(logits=model(input_ids=unseen_BT, use_cache=False).logits.detach().double())
        for model in (parent, without)
    )
    assert kl["drop_by_influence"] == pytest.approx(torch.distributions.kl_divergence(p, q).mean().item(), rel=1e-4)
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


def test_a_swept_batch_is_chosen_once_and_kept_by_all_later_stages(line: Line, tmp_path: Path):
    chat = PROFILE.scenarios[0].model_dump(exclude={"sweep"}) | {"batch_size": [1, 3]}
    swept = ProfileConfig.model_validate(PROFILE.model_dump() | {"scenarios": [chat]})
    block_profile.run(
        BlockProfileStage(search_space=SPACE, profile=swept), line.workplace.inputs(), tmp_path / "profile"
    )
    sweeping = replace(line, profile_dir=tmp_path / "profile", profile_config=swept)
    # One prompt almost fits beside the whole parent; three ask for a smaller child.
    parent = line.workplace.architecture
    one = memory_of(parent, scenario=swept.sweeps["chat"][0], profile=swept).total_mib
    wanted = target(limit("memory_mib", one * 0.999, relative=False), limit("decode_speed", 0.001))
    result = sweeping.mip(wanted, tmp_path / "mip")
    batches = [dict(zip(result.tables["batches"].columns, row, strict=True)) for row in result.tables["batches"].rows]
    assert [row["batch_size"] for row in batches] == [1, 3]
    assert [row["is_chosen"] for row in batches] == [True, False]
    assert batches[0]["memory_mib"] <= one
    assert batches[0]["cached_tokens"] == 16
    assert result.metrics["batch_size"] == 1
    sweeping.child(wanted, tmp_path / "mip", tmp_path / "child")
    record = read_solution(tmp_path / "child")
    assert {one.limit.scenario for one in record.limits} == {"chat-batch-1"}
    assert "chat-batch-3_decode_ms" not in record.predicted
    inputs = line.workplace.inputs(child_checkpoint=tmp_path / "child", rl_checkpoint=tmp_path / "child")
    config = SpeedStage(profile=swept, speed=SPEED, limits=wanted.limits, speed_tolerance=0.05)
    speed = speed_report.run(config, inputs, tmp_path / "speed")
    assert {row[1] for row in speed.tables["speed"].rows} == {"chat-batch-1", "depth-5"}
    assert speed.metrics["num_missed_limits"] == 0


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
    wanted = target(limit("decode_speed", 1.8))
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


def test_child_checkpoint_of_a_roofline_measures_here_and_believes_the_named_device(line: Line, tmp_path: Path):
    wanted = target(limit("decode_speed", 4.0))
    hopeful = told_a_faster_machine(line, tmp_path / "profile", times=10)
    named = ProfileConfig.model_validate(PROFILE.model_dump() | {"backend": "roofline", "device": "h100-80gb"})
    hopeful = replace(hopeful, profile_config=named)
    hopeful.mip(wanted, tmp_path / "mip")
    result = hopeful.child(wanted, tmp_path / "mip", tmp_path / "child")
    assert (result.metrics["num_missed_limits"], result.metrics["num_recalibrations"]) == (1, 0)
    assert read_solution(tmp_path / "child").blocks == read_solution(tmp_path / "mip").blocks


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
    memory = dict(zip(result.tables["memory"].columns, result.tables["memory"].rows[0], strict=True))
    held_mib = (weights_bytes + 16 * 3 * 2 * 8 * 2 * 4) / 2**20
    assert memory["chat_weights_and_cache_mib"] == pytest.approx(held_mib, abs=0.01)
    # The head's logits aside: embedding, input, what attention returned and the normed one, and three of the FFN's 48.
    activation_bytes = 4 * 12 * (4 * parent.hidden_size + 3 * 48) + 2 * 4 * 8 * 12
    assert memory["chat_activations_mib"] == pytest.approx(activation_bytes / 2**20, abs=0.01)
    assert memory["chat_memory_mib"] == pytest.approx(held_mib + activation_bytes / 2**20, abs=0.02)
    assert memory["chat_cached_tokens_that_fit"] == (2**29 - weights_bytes - activation_bytes) // (3 * 2 * 8 * 2 * 4)
    rows = json.loads((tmp_path / "speed/speed.json").read_text())["speed"]
    assert len(result.tables["speed"].rows) == len(rows) == 2 * 3 * 2
    assert {(row["backend"], row["scenario"]) for row in rows} == {("torch", "chat"), ("torch", "depth-5")}
    cache = dict((row[1], row[2:4]) for row in result.tables["cache"].rows)
    assert cache["parent"] == (3 * 2 * 8 * 2 * 4, 2**30 // (3 * 2 * 8 * 2 * 4))
    assert cache["final"][0] == 2 * 8 * 4 * sum(block.attention.num_key_value_heads or 0 for block in final.blocks)


def test_speed_report_times_the_same_models_in_every_backend(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install_llama_bench(tmp_path / "runtimes", monkeypatch)
    install_vllm(tmp_path / "runtimes", monkeypatch)
    wanted = target(limit("num_parameters", 0.8))
    line.mip(wanted, tmp_path / "mip")
    line.child(wanted, tmp_path / "mip", tmp_path / "child")
    inputs = line.workplace.inputs(child_checkpoint=tmp_path / "child", rl_checkpoint=tmp_path / "child")
    speed = SPEED.model_copy(update={"backends": ("torch", "llama_cpp", "vllm")})
    config = SpeedStage(profile=PROFILE, speed=speed, limits=(), speed_tolerance=0.05)
    result = speed_report.run(config, inputs, tmp_path / "speed")
    report = json.loads((tmp_path / "speed/speed.json").read_text())
    assert report["backend_of_limits"] == "torch"
    served = portable(read_architecture(tmp_path / "child")).architecture
    for backend in ("llama_cpp", "vllm"):
        decode = {
            (row["scenario"], row["model"]): row
            for row in report["speed"]
            if (row["backend"], row["phase"]) == (backend, "decode")
        }
        assert decode["depth-5", "child"]["speedup"] == decode["chat", "final"]["speedup"] > 1
        bytes_per_value = {"llama_cpp": 2, "vllm": 4}[backend]
        cache = {row["model"]: row["kv_bytes_per_token"] for row in report["cache"] if row["backend"] == backend}
        assert cache["parent"] == 3 * 2 * 8 * 2 * bytes_per_value
        assert cache["final"] == 2 * 8 * bytes_per_value * sum(
            block.attention.num_key_value_heads or 0 for block in served.blocks
        )
    assert result.facts["measured in"] == "torch eager; llama.cpp, random weights; vLLM, random weights"


def test_depth_beyond_the_parents_positions_is_refused_before_anything_is_timed(line: Line, tmp_path: Path):
    inputs = line.workplace.inputs(child_checkpoint=line.workplace.parent_dir, rl_checkpoint=line.workplace.parent_dir)
    positions = line.workplace.architecture.max_position_embeddings
    speed = SPEED.model_copy(update={"depths": (positions,)})
    with pytest.raises(RecipeError, match=f"{positions + 8:,} positions, and the parent has {positions:,}"):
        speed_report.run(
            SpeedStage(profile=PROFILE, speed=speed, limits=(), speed_tolerance=0.05), inputs, tmp_path / "speed"
        )
