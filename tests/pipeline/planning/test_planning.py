"""The plan against hand-made arithmetic, published figures, and the stages' registry."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.execution import materialize
from pipeline.model.architecture_files import parent_architecture
from pipeline.planning.command import plan_text
from pipeline.planning.devices import DEVICES, find_device
from pipeline.planning.estimates import estimate, has_estimate
from pipeline.planning.memory import activation_bytes, training_state_bytes
from pipeline.planning.plan import make_plan
from pipeline.planning.ranges import Range
from pipeline.planning.render import binary, seconds, short
from pipeline.planning.training_estimates import micro_batch_rows
from pipeline.planning.warnings import fitting_settings
from pipeline.recipe import DifficultyConfig
from pipeline.recipe_file import load_recipe
from pipeline.stages.registry import STAGES
from pipeline.training.engine import choose_micro_batch_size
from tests.pipeline.planning.builders import case, workspace

RECIPES = ("tiny", "smol", "smol-full", "llama-8b", "super-49b", "ultra-253b")


@pytest.mark.parametrize("recipe_name", RECIPES)
def test_every_stage_of_every_recipe_is_planned(recipe_name: str, tmp_path: Path):
    recipe = load_recipe(recipe_name)
    for target_name in recipe.targets:
        plan = make_plan(workspace(tmp_path, recipe), target_name=target_name, device=find_device("h100-80gb"))
        assert [stage.name for stage in plan.stages] == [stage.name for stage in STAGES]
        assert plan.total_time_s is not None
        assert not [warning for warning in plan.warnings if warning.startswith("target")]
    assert not (tmp_path / "store").exists()  # a plan writes nothing


def test_planning_loads_no_torch(tmp_path: Path):
    code = "import sys; from pipeline.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    arguments = ["plan", "--recipe", "ultra-253b", "--device", "h100-80gb"]
    printed = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "REFIT_HOME": str(tmp_path)},
    ).stdout
    assert printed.splitlines()[-1] == "False"
    assert "kd_checkpoint" in printed


def test_distillation_of_super_costs_what_six_and_two_flops_per_parameter_and_token_say():
    estimated = estimate("kd_checkpoint", case(load_recipe("super-49b")))
    # 6 N D for a child of half the parent's weights beyond 49 B, 2 N D for the parent; attention comes on top.
    assert estimated.tokens == Range.of(40e9)
    teacher = 2 * 70.55e9 * 40e9
    assert estimated.flops.high == pytest.approx(4 * teacher, rel=0.15)
    assert estimated.flops.high >= 4 * teacher * 0.97  # the embedding table is looked up, not multiplied


def test_flops_of_a_training_by_hand():
    recipe = load_recipe("tiny")
    parent = parent_architecture(recipe.parent)
    block = parent.homogeneous_block()
    hidden, width, heads = parent.hidden_size, block.ffn.intermediate_size, block.attention.num_key_value_heads
    assert width is not None
    assert heads is not None
    length = recipe.pretraining_mix.sequence_length
    per_layer = 2 * (2 * hidden * hidden + 2 * hidden * heads * parent.head_dim + 3 * hidden * width)
    per_token = parent.num_hidden_layers * (per_layer + 4 * hidden * length) + 2 * parent.vocab_size * hidden
    assert estimate("cpt_checkpoint", case(recipe)).flops.high == 3 * recipe.cpt.tokens * per_token


@pytest.mark.parametrize(
    ("zero_stage", "num_ranks", "bytes_per_parameter"),
    [(0, 1, 20), (1, 1, 20), (1, 4, 2 + 6 + 3), (2, 4, 2 + 1 + 3), (3, 4, 0.5 + 1 + 3), (3, 64, 18 / 64)],
)
def test_training_state_per_parameter(zero_stage: int, num_ranks: int, bytes_per_parameter: float):
    state = training_state_bytes(1000, precision="bf16", zero_stage=zero_stage, num_ranks=num_ranks)
    assert sum(state.values()) == pytest.approx(1000 * bytes_per_parameter)


def test_memory_falls_with_ranks_and_stages():
    recipe = load_recipe("super-49b")

    def peak(zero_stage: int, num_ranks: int) -> float:
        settings = case(recipe, zero_stage=zero_stage, num_ranks=num_ranks, micro_batch_size=1)
        return estimate("cpt_checkpoint", settings).memory.expected

    assert peak(1, 1) > peak(1, 8) > peak(2, 8) > peak(3, 8) > peak(3, 64)


@pytest.mark.parametrize(("zero_stage", "bytes_per_parameter"), [(0, 16), (1, 20), (2, 20), (3, 20)])
def test_fp32_keeps_masters_of_its_own_from_stage_1(zero_stage: int, bytes_per_parameter: int):
    state = training_state_bytes(1000, precision="fp32", zero_stage=zero_stage, num_ranks=1)
    assert sum(state.values()) == 1000 * bytes_per_parameter


@pytest.mark.parametrize("wanted", [1, 3, 4, 100])
@pytest.mark.parametrize(("global_batch_size", "num_ranks"), [(4, 1), (12, 2), (512, 8), (512, 512), (30, 5)])
def test_rows_of_a_micro_batch_are_the_engines(wanted: int, global_batch_size: int, num_ranks: int):
    rows = micro_batch_rows(wanted, global_batch_size=global_batch_size, num_ranks=num_ranks)
    assert rows == choose_micro_batch_size(wanted, global_batch_size=global_batch_size, world_size=num_ranks)


def test_a_teacher_is_split_at_zero_3_alone():
    recipe = load_recipe("super-49b")

    def teacher(zero_stage: int) -> float:
        settings = case(recipe, zero_stage=zero_stage, num_ranks=8)
        return estimate("kd_checkpoint", settings).memory_parts["teacher"]

    assert teacher(2) == 2 * 70_553_706_496
    assert teacher(3) == teacher(2) / 8


def test_activations_of_one_layer_by_hand():
    parent = parent_architecture(load_recipe("tiny").parent)
    block = parent.homogeneous_block()
    one_layer = parent.with_blocks([block])
    heads, width = block.attention.num_key_value_heads, block.ffn.intermediate_size
    assert heads is not None
    assert width is not None
    # Two norms of three vectors each, queries and attention output, keys and values, four FFN-wide vectors.
    values = 6 * parent.hidden_size + 2 * parent.hidden_size + 2 * heads * parent.head_dim + 4 * width
    assert activation_bytes(one_layer, num_tokens=10, precision="fp32") == 4 * 10 * values


@pytest.mark.parametrize("stage_name", ["kd_checkpoint", "cpt_checkpoint", "rl_checkpoint"])
def test_settings_that_are_said_to_fit_do(stage_name: str):
    recipe, memory_bytes = load_recipe("llama-8b"), find_device("a100-80gb").memory_bytes
    assert memory_bytes is not None
    said = fitting_settings(stage_name, memory_bytes=memory_bytes, case=case(recipe))
    pattern = r"it fits with num_ranks (\d+), zero_stage (\d), micro_batch_size (\d+)(, recompute_activations true)?"
    found = re.fullmatch(pattern, said)
    assert found is not None, said
    ranks, zero, rows = map(int, found.groups()[:3])
    recomputes = found.group(4) is not None
    settings = {"num_ranks": ranks, "zero_stage": zero, "micro_batch_size": rows}
    fits = estimate(stage_name, case(recipe, **settings, recompute_activations=recomputes))
    assert fits.memory.expected <= memory_bytes
    if recomputes:
        assert estimate(stage_name, case(recipe, **settings)).memory.expected > memory_bytes
    assert ranks > 1
    for any_stage in (1, 2, 3):
        fewer = case(recipe, num_ranks=ranks // 2, zero_stage=any_stage, micro_batch_size=1, recompute_activations=True)
        if stage_name != "rl_checkpoint" or any_stage < 3:
            assert estimate(stage_name, fewer).memory.expected > memory_bytes


def test_activations_that_are_made_again_cost_a_pass_and_keep_inputs():
    recipe = load_recipe("llama-8b")
    kept, again = (
        estimate("cpt_checkpoint", case(recipe, micro_batch_size=1, recompute_activations=recomputes))
        for recomputes in (False, True)
    )
    assert again.work[0][0].expected == pytest.approx(kept.work[0][0].expected * 4 / 3)
    assert again.memory_parts["activations"] < 0.2 * kept.memory_parts["activations"]
    others = [name for name in kept.memory_parts if name != "activations"]
    assert [again.memory_parts[name] for name in others] == [kept.memory_parts[name] for name in others]


def test_a_window_that_fits_nowhere_is_said_to(tmp_path: Path):
    recipe = load_recipe("super-49b")
    plan = make_plan(workspace(tmp_path, recipe), target_name=recipe.default_target, device=find_device("h100-80gb"))
    (warning,) = [text for text in plan.warnings if text.startswith("memory: cpt_checkpoint")]
    assert (
        "does not even fit with num_ranks 32, zero_stage 3, micro_batch_size 1, recompute_activations true" in warning
    )
    assert "shorten the windows" in warning


def test_a_parent_larger_than_a_device_fits_once_its_layers_are_split():
    memory_bytes = find_device("h100-80gb").memory_bytes
    assert memory_bytes is not None
    split = case(load_recipe("super-49b"))
    assert estimate("block_library", split).memory_parts["parent"] > memory_bytes
    assert "it fits with num_ranks" in fitting_settings("block_library", memory_bytes=memory_bytes, case=split)


def test_blocks_trained_in_rounds_hold_less_and_pass_the_parent_more_often():
    recipe = load_recipe("super-49b")
    at_once, in_rounds = (
        estimate("block_library", case(recipe, num_ranks=8, block_memory_gib=bound)) for bound in (None, 60.0)
    )
    assert (
        in_rounds.memory_parts["blocks and their AdamW"] <= 60 * 2**30 < at_once.memory_parts["blocks and their AdamW"]
    )
    assert in_rounds.memory_parts["parent"] == at_once.memory_parts["parent"]
    assert in_rounds.flops.expected > at_once.flops.expected


@pytest.mark.parametrize("max_activation_mib", [0, 4096])
def test_a_closed_form_start_that_is_the_peak_is_planned(max_activation_mib: int):
    recipe = load_recipe("llama-8b")
    narrow = {"attention": ("parent",), "ffn": ("parent", 12544, 10752)}
    space = recipe.search_space.model_copy(update=narrow)

    def planned(closed_form_tokens: int) -> dict[str, float]:
        library = recipe.block_library.model_copy(update={"closed_form_tokens": closed_form_tokens})
        changed = recipe.model_copy(update={"search_space": space, "block_library": library})
        one = estimate(
            "block_library", case(changed, num_ranks=32, block_memory_gib=1.0, max_activation_mib=max_activation_mib)
        )
        assert sum(one.memory_parts.values()) == one.memory.expected
        return one.memory_parts

    without, parts = planned(0), planned(recipe.block_library.closed_form_tokens)
    assert set(without) == {"parent", "blocks and their AdamW", "activations"}
    # One block a round, the wider one's. Its system, factors, right side and solution are fp64, its sums fp32.
    assert parts["blocks"] == 4 * (3 * 4096 * 12544 + 4096)
    assert parts["sums and solution of the closed-form start"] == 20 * 12544 * (12544 + 4096)
    # 2^20 tokens of 4,096 bf16 values are 8 GiB, of which the bound stays and the rest lies in files.
    assert parts["hidden states of the closed-form start"] == max_activation_mib * 2**20
    assert (parts["parent"], parts["activations"]) == (without["parent"], without["activations"])


def test_hidden_states_of_a_closed_form_start_in_files_count_as_working_disk():
    recipe = load_recipe("super-49b")
    files = 2 * recipe.block_library.closed_form_tokens * 8192 - 2**30
    settings = case(recipe, num_ranks=8, block_memory_gib=1e-3, max_activation_mib=1024)
    assert estimate("block_library", settings).working_disk.expected == 2 * files  # of the sender and the receiver


def test_pairs_are_planned_as_blocks_of_their_own():
    recipe = load_recipe("super-49b")
    coupled = recipe.model_copy(update={"block_library": recipe.block_library.model_copy(update={"mode": "coupled"})})
    parent, hidden = case(recipe).sizes.parent, case(recipe).sizes.parent.hidden_size
    attention = 2 * hidden * hidden + 2 * hidden * 1024
    widths = (21504, 17920, 14336, 7168, 5632, 2816)
    norm = hidden
    with_attention = 7 * (attention + norm) + sum(3 * hidden * width + norm for width in widths)
    without = sum(3 * hidden * width + norm for width in (28672, *widths))
    planned = estimate("block_library", case(coupled)).disk
    assert planned.expected == 4 * parent.num_hidden_layers * (with_attention + without)


def test_the_parent_is_evaluated_alone_and_a_child_beside_it():
    settings = case(load_recipe("super-49b"))
    parent = 2 * 70_553_706_496
    assert estimate("parent_evaluation", settings).memory_parts["models"] == parent
    child = settings.sizes.child_parameters.expected
    assert estimate("evaluation", settings).memory_parts["models"] == pytest.approx(parent + 2 * child)


def test_tokens_of_lm_eval_are_those_of_its_tasks():
    recipe = load_recipe("smol-full")
    without = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"lm_eval": None})})

    def added(stage_name: str, **changes: Any) -> float:
        assert recipe.evaluation.lm_eval is not None
        asked = recipe.evaluation.lm_eval.model_copy(update=changes)
        other = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"lm_eval": asked})})
        return estimate(stage_name, case(other)).tokens.expected - estimate(stage_name, case(without)).tokens.expected

    once = 2 * 200 * 2 * 64  # two sets of 200 items, two choices of 64 tokens
    assert added("parent_evaluation") == pytest.approx(once)
    assert added("evaluation") == pytest.approx(once)
    assert added("evaluation", checkpoints="all") == pytest.approx(6 * once)
    assert added("evaluation", max_items=20) == pytest.approx(once / 10)


def test_trial_of_prompts_counts():
    recipe = load_recipe("smol")
    tried = DifficultyConfig(num_samples=8, min_pass_rate=0.0, max_pass_rate=0.75, curriculum=None)
    without, with_trial = (
        estimate("rl_checkpoint", case(recipe.model_copy(update={"rl": recipe.rl.model_copy(update=update)})))
        for update in ({"difficulty": None}, {"difficulty": tried})
    )
    prompts = 5 * recipe.rl_prompts.items_per_task + recipe.rl_prompts.instructions.num_prompts
    num_tried = prompts - recipe.rl.held_out.num_prompts
    most = num_tried * (128 + 8 * recipe.rl.max_new_tokens)
    assert with_trial.tokens.high - without.tokens.high == pytest.approx(most)


def test_logits_of_sampled_replies_count():
    # llama-8b trains on one reply of up to 1,024 tokens at once: 12 bytes besides the bf16 logits, for 128,256 words.
    parts = estimate("rl_checkpoint", case(load_recipe("llama-8b"), micro_batch_size=1)).memory_parts
    assert parts["logits"] == 14 * 1024 * 128_256


def test_flops_that_need_no_head_leave_it_out():
    recipe = load_recipe("tiny")
    tiny = case(recipe)
    parent, length = tiny.sizes.parent, recipe.distillation_mix.sequence_length
    block = parent.homogeneous_block()
    heads, width = block.attention.num_key_value_heads, block.ffn.intermediate_size
    assert heads is not None
    assert width is not None
    hidden = parent.hidden_size
    matrices = 2 * (2 * hidden * hidden + 2 * hidden * heads * parent.head_dim + 3 * hidden * width)
    per_token = parent.num_hidden_layers * (matrices + 4 * hidden * length)
    estimated = estimate("channel_importance", tiny)
    assert estimated.flops == Range.of(recipe.channel_importance.tokens * per_token)
    assert estimated.disk == Range.of(4 * parent.num_hidden_layers * (3 * width + heads))


def test_after_a_run_the_plan_stands_beside_what_happened(tmp_path: Path):
    recipe = load_recipe("tiny")
    place = workspace(tmp_path, recipe)
    for stage_name in ("parent_checkpoint", "corpora"):
        materialize(place, stage_name, recipe.default_target)
    plan = make_plan(place, target_name=recipe.default_target, device=find_device("a100-80gb"))
    made = {stage.name: stage.actual for stage in plan.stages if stage.actual is not None}
    assert set(made) == {"parent_checkpoint", "corpora"}
    assert made["parent_checkpoint"].disk_bytes == pytest.approx(plan.stages[0].estimate.disk.expected, rel=0.1)
    text = plan_text(place, target=recipe.default_target, device=None, peak_tflops=0.1, measure=False)
    header = next(line for line in text.splitlines() if line.startswith("stage"))
    assert header.endswith("disk taken")


def test_unknown_device_lists_the_known_ones(tmp_path: Path):
    place = workspace(tmp_path, load_recipe("tiny"))
    with pytest.raises(RecipeError, match=f"no device 'tpu'.*{next(iter(DEVICES))}"):
        plan_text(place, target="fused", device="tpu", peak_tflops=None, measure=False)
    with pytest.raises(RecipeError, match="wanted a peak above 0"):
        plan_text(place, target="fused", device=None, peak_tflops=-1.0, measure=False)


def test_without_a_device_no_time_is_guessed(tmp_path: Path):
    text = plan_text(
        workspace(tmp_path, load_recipe("tiny")), target="fused", device=None, peak_tflops=None, measure=False
    )
    assert "no device given" in text
    assert next(line for line in text.splitlines() if line.startswith("kd_checkpoint")).endswith("-")


def test_quantities_are_spelled_in_units_that_suit_them():
    assert [short(value) for value in (49.87e9, 1.5e3, 12)] == ["49.9 B", "1.5 K", "12"]
    assert [binary(value) for value in (0, 999, 1024, 3 * 2**30)] == ["0 B", "999 B", "1 KiB", "3 GiB"]
    assert [seconds(value) for value in (12, 7200, 30 * 86_400)] == ["12s", "2h00m", "30 days"]


def test_a_range_that_falls_is_refused():
    with pytest.raises(ValueError, match="must rise"):
        Range(low=2, expected=1, high=3)


def test_every_stage_has_an_estimate():
    assert [stage.name for stage in STAGES if not has_estimate(stage.name)] == []
