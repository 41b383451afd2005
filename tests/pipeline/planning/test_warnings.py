"""What a plan warns of: limits, pins, settings and data that a run would refuse."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.planning.devices import find_device
from pipeline.planning.plan import make_plan
from pipeline.recipe import CorporaConfig, Limit, Pin, RewardModelConfig
from pipeline.recipe_file import load_recipe
from tests.pipeline.data.builders import file_source
from tests.pipeline.planning.builders import with_target, workspace


@pytest.mark.parametrize(
    ("quantity", "scenario", "bound", "relative_to", "is_hopeless"),
    [
        ("num_parameters", None, 0.22, "parent", True),
        ("num_parameters", None, 0.23, "parent", False),
        ("kv_bytes_per_token", None, 255, "absolute", True),
        ("kv_bytes_per_token", None, 256, "absolute", False),
        ("memory_mib", "chat-1k", 20, "absolute", True),
        ("decode_speed", "chat-1k", 10.0, "parent", True),
        ("decode_speed", "chat-1k", 1.5, "parent", False),
        ("latency_ms", "chat-1k", 0.05, "parent", True),
    ],
)
def test_targets_that_no_choice_of_blocks_meets(
    quantity: Any, scenario: str | None, bound: float, relative_to: Any, is_hopeless: bool, tmp_path: Path
):
    # smol's smallest child: FFNs of 256 in the first and last layer and one attention of one KV head, in the first:
    # 29,935,872 of 134,515,008 parameters, 2 x 64 values of 2 bytes a token.
    limit = Limit(quantity=quantity, scenario=scenario, bound=bound, relative_to=relative_to)
    plan = make_plan(workspace(tmp_path, with_target(load_recipe("smol"), limit)), target_name="made", device=None)
    found = [warning for warning in plan.warnings if warning.startswith("target")]
    assert bool(found) == is_hopeless
    if is_hopeless:
        assert quantity in found[0]


@pytest.mark.parametrize(("bound", "is_hopeless"), [(156_000, False), (157_000, True)])
def test_cached_tokens_that_no_choice_leaves_room_for(bound: int, is_hopeless: bool, tmp_path: Path):
    # Beside the smallest child of above, 100 MB hold (100,000,000 - 2 x 29,935,872) / 256 = 156,751 tokens.
    limit = Limit(quantity="cached_tokens", scenario=None, bound=bound, relative_to="absolute", device_memory_gb=0.1)
    plan = make_plan(workspace(tmp_path, with_target(load_recipe("smol"), limit)), target_name="made", device=None)
    found = [warning for warning in plan.warnings if warning.startswith("target")]
    assert bool(found) == is_hopeless
    if is_hopeless:
        assert "the best is 156,751" in found[0]


@pytest.mark.parametrize(("num_devices", "is_hopeless"), [(1, False), (3, True)])
@pytest.mark.parametrize("quantity", ["decode_speed", "kv_bytes_per_token"])
def test_fewer_heads_than_devices_spare_nothing(quantity: Any, num_devices: int, is_hopeless: bool, tmp_path: Path):
    # smol's parent has three key/value heads; one of them would be held by each of three devices.
    is_speed = quantity == "decode_speed"
    limit = Limit(
        quantity=quantity,
        scenario="chat-1k" if is_speed else None,
        bound=1.01 if is_speed else 0.99,
        relative_to="parent",
    )
    recipe = with_target(load_recipe("smol"), limit)
    served = {"backend": "roofline", "device": "h100-80gb", "tensor_parallel_size": num_devices}
    recipe = recipe.model_copy(
        update={
            "block_profile": recipe.block_profile.model_copy(update=served),
            "search_space": recipe.search_space.model_copy(update={"attention": ("parent", 1), "ffn": ("parent",)}),
        }
    )
    plan = make_plan(workspace(tmp_path, recipe), target_name="made", device=None)
    assert bool([warning for warning in plan.warnings if warning.startswith("target")]) == is_hopeless


@pytest.mark.parametrize(
    ("layers", "least"),
    [
        # smol's space is portable: layer 0 keeps attention and the last layer an FFN, so both stay whole, or all layers
        # keep one head of keys and values beside FFNs of 256.
        ("depth_only", 28_312_128 + 2 * 3_540_096),
        ("homogeneous_attention", 28_312_128 + 30 * (2 * 576 * 576 + 2 * 576 * 64 + 3 * 576 * 256 + 2 * 576)),
    ],
)
def test_what_a_pattern_over_layers_cannot_reach_is_told(layers: Any, least: int, tmp_path: Path):
    limit = Limit(quantity="num_parameters", scenario=None, bound=0.2, relative_to="parent")
    recipe = with_target(load_recipe("smol"), limit)
    recipe = recipe.model_copy(
        update={
            "search": recipe.search.model_copy(update={"layers": layers}),
            "search_space": recipe.search_space.model_copy(
                update={"ffn": ("parent", 256, *(["no_op"] if layers == "depth_only" else []))}
            ),
        }
    )
    plan = make_plan(workspace(tmp_path, recipe), target_name="made", device=None)
    (found,) = [warning for warning in plan.warnings if warning.startswith("target")]
    assert (
        f"num_parameters <= 0.2 x parent cannot be met by any choice of blocks: the best is {least / 134_515_008:.6g}"
        in found
    )


def test_pins_that_leave_a_layer_without_a_block_are_refused(tmp_path: Path):
    recipe = with_target(load_recipe("smol"), pins=(Pin(layers=(3,), ffn=768),))
    with pytest.raises(RecipeError, match=r"pins of layer 3 .* leave none of its blocks"):
        make_plan(workspace(tmp_path, recipe), target_name="made", device=None)


def test_what_the_execution_settings_make_impossible_is_told(tmp_path: Path):
    recipe = load_recipe("super-49b")
    plan = make_plan(
        workspace(tmp_path, recipe, num_ranks=24, zero_stage=0),
        target_name=recipe.default_target,
        device=find_device("h100-80gb"),
    )
    text = "\n".join(plan.warnings)
    assert "kd.global_batch_size is 512, which 24 ranks do not divide: run with 8" in text
    assert "ZeRO stage 0 does wrongly" in text
    assert "memory: kd_checkpoint" in text
    assert "disk: artifacts of" in text


def test_a_zero_stage_that_sampling_refuses_is_told(tmp_path: Path):
    recipe = load_recipe("llama-8b")
    plan = make_plan(
        workspace(tmp_path, recipe, num_ranks=8, zero_stage=3), target_name=recipe.default_target, device=None
    )
    assert any("rl_checkpoint" in warning and "refuses execution.zero_stage 3" in warning for warning in plan.warnings)


def test_what_a_stage_runs_in_and_what_is_not_installed_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REFIT_RUNTIMES", str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where the extra is not installed
    recipe = load_recipe("smol-full")
    place = workspace(tmp_path, recipe, sampler="vllm")
    warnings = make_plan(place, target_name=recipe.default_target, device=None).warnings
    lm_eval, vllm = (warning for warning in warnings if warning.startswith("runtime: "))
    assert "parent_evaluation asks lm-eval" in lm_eval
    assert "rl_checkpoint samples with vllm" in vllm


@pytest.mark.parametrize(
    ("changes", "execution", "said"),
    [
        ({}, {"num_ranks": 64}, "cpt.long_context[1].global_batch_size is 32, which 64 ranks do not divide"),
        ({}, {"zero_stage": 0}, "rl trains in bf16, which ZeRO stage 0 does wrongly"),
        ({"kd": {"tokens": 4_194_303}}, {}, "kd.tokens is 4,194,303, less than one step of 4,194,304 tokens"),
        ({"rl": {"updates_per_rollout": 3}}, {}, "a rollout has 1024 samples per rank"),
    ],
)
def test_what_a_training_would_refuse_is_told(changes: Any, execution: Any, said: str, tmp_path: Path):
    shipped = load_recipe("super-49b")
    recipe = shipped.model_copy(
        update={key: getattr(shipped, key).model_copy(update=inner) for key, inner in changes.items()}
    )
    place = workspace(tmp_path, recipe, **execution)
    warnings = make_plan(place, target_name=recipe.default_target, device=None).warnings
    assert any(said in warning for warning in warnings)
    fine = make_plan(workspace(tmp_path, shipped), target_name=recipe.default_target, device=None).warnings
    assert not any(said in warning for warning in fine)


@pytest.mark.parametrize(
    ("licence", "num_samples", "is_told"), [("llama3.2", 192, False), ("mine", 192, True), ("mine", 0, False)]
)
def test_a_parent_whose_licence_the_filter_drops_is_told(licence: str, num_samples: int, is_told: bool, tmp_path: Path):
    recipe = load_recipe("smol")
    chat = recipe.reasoning_traces.chat.model_copy(update={"num_samples": num_samples})
    changes = {
        "parent": recipe.parent.model_copy(update={"licence": licence}),
        "reasoning_traces": recipe.reasoning_traces.model_copy(update={"chat": chat}),
    }
    place = workspace(tmp_path, recipe.model_copy(update=changes))
    warnings = make_plan(place, target_name=recipe.default_target, device=None).warnings
    said = "data: parent, whose chat is trained on, has the licence mine"
    assert any(warning.startswith(said) for warning in warnings) is is_told


def test_paths_with_nothing_behind_them_are_told_once(tmp_path: Path):
    recipe = load_recipe("smol-full")
    reward_model = RewardModelConfig(
        path=str(tmp_path / "judge"), weight=1, min_score=-1, max_score=1, precision="fp32"
    )
    assert recipe.evaluation.lm_eval is not None
    tasks = recipe.evaluation.lm_eval.model_copy(update={"include_path": str(tmp_path / "tasks")})
    documents = file_source(tmp_path / "*.jsonl")
    place = workspace(
        tmp_path,
        recipe.model_copy(
            update={
                "corpora": CorporaConfig(sources=(documents, *recipe.corpora.sources)),
                "rl": recipe.rl.model_copy(update={"reward_model": reward_model}),
                "evaluation": recipe.evaluation.model_copy(update={"lm_eval": tasks}),
            }
        ),
    )

    def told() -> list[str]:
        plan = make_plan(place, target_name=recipe.default_target, device=None)
        return [line.split(" names no file")[0] for line in plan.warnings if "names no file" in line]

    missing = [
        f"data: evaluation.lm_eval.include_path {tmp_path}/tasks",
        f"data: rl.reward_model.path {tmp_path}/judge",
    ]
    assert told() == [f"data: corpora.sources own, path {tmp_path}/*.jsonl", *missing]
    (tmp_path / "documents.jsonl").write_text('{"text": "one"}\n')
    assert told() == missing
