"""Recipes that say what cannot be, or try to do what a recipe must not."""

from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.command import CANARY, refused, write_recipe

EDITS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"kd.learning_rates": 1}, ["kd.learning_rates", "no such key"]),
    "missing key": ({"kd.tokens": ...}, ["kd.tokens", "this key is missing"]),
    "wrong type": ({"kd.tokens": "many"}, ["kd.tokens", "valid integer"]),
    "negative budget": ({"kd.tokens": -5}, ["kd.tokens", "greater than or equal to 1"]),
    "zero budget": ({"cpt.tokens": 0}, ["cpt.tokens", "greater than or equal to 1"]),
    "NaN learning rate": ({"cpt.optimizer.learning_rate": float("nan")}, ["cpt.optimizer.learning_rate", "finite"]),
    "infinite bound": ({"thresholds.max_rl_kl": float("inf")}, ["thresholds.max_rl_kl", "finite"]),
    "ratio above one": ({"kd.optimizer.warmup_ratio": 1.5}, ["kd.optimizer.warmup_ratio", "less than or equal to 1"]),
    "unknown kind of parent": ({"parent.kind": "pickle"}, ["parent", "'random', 'wheel', 'local', 'hub'"]),
    "path for a name": ({"name": "../../elsewhere"}, ["name", "pattern"]),
    "path for a source": ({"corpora.sources.0.name": "../../etc"}, ["name", "pattern"]),
    "default target that is none": ({"default_target": "fast"}, ["default_target is 'fast'", "fused"]),
    "no targets": ({"targets": {}}, ["targets", "at least 1"]),
    "mixture of an unknown source": ({"distillation_mix.entries.0.source": "web"}, ["'web'", "corpora.sources"]),
    "more tokens than its mixture": ({"kd.tokens": 10**9}, ["kd.tokens is 1,000,000,000 tokens", "holds 16,384"]),
    "a search of more tokens than there are": (
        {"search.refinement.rounds": 8},
        ["distillation_mix.validation_tokens is 2,048", "for each of 9 steps and rounds"],
    ),
    "scores on what is to choose nothing": (
        {"block_scores.tokens": 2048},
        ["block_scores.tokens is 2,048", "the last 512 of which are to choose nothing"],
    ),
    "windows that its mixture lacks": (
        {"kd.long_context": [{"sequence_length": 256, "tokens": 4096, "global_batch_size": 1, "learning_rate": 1e-4}]},
        ["kd.long_context asks for 4,096 tokens in windows of 256", "distillation_mix.long_context holds 0"],
    ),
    "windows that shrink": (
        {"pretraining_mix.long_context": [{"sequence_length": 64, "tokens": 128}]},
        ["long_context windows must grow", "[128, 64]"],
    ),
    "space without the parent": ({"search_space.ffn": [96]}, ["search_space.ffn must list 'parent'"]),
    "layers of an unknown pattern": ({"search.layers": "any"}, ["search.layers", "'depth_only'"]),
    "layers that cannot be left out": (
        {"search.layers": "depth_only", "search_space.attention": ["parent", 1]},
        ["search.layers is depth_only", "so no layer can be left out: add it to both"],
    ),
    "task that no solver writes steps for": (
        {"reasoning_tasks.0": {"name": "mini_sudoku", "config": {}}},
        ["reasoning_tasks names mini_sudoku, whose steps nothing can write", "gcd", "held_out_tasks takes any"],
    ),
    "limit without its scenario": (
        {"targets.light.limits": [{"quantity": "decode_speed", "scenario": None, "bound": 2, "relative_to": "parent"}]},
        ["limit decode_speed", "needs one"],
    ),
    "cached tokens without a memory": (
        {
            "targets.light.limits": [
                {"quantity": "cached_tokens", "scenario": None, "bound": 2, "relative_to": "absolute"}
            ]
        },
        ["limit cached_tokens has device_memory_gb None; it needs one"],
    ),
    "memory of a quantity that takes none": (
        {
            "targets.light.limits": [
                {
                    "quantity": "num_parameters",
                    "scenario": None,
                    "bound": 2,
                    "relative_to": "absolute",
                    "device_memory_gb": 80,
                }
            ]
        },
        ["limit num_parameters has device_memory_gb 80", "takes none"],
    ),
    "cached tokens in a scenario": (
        {
            "targets.light.limits": [
                {
                    "quantity": "cached_tokens",
                    "scenario": "chat",
                    "bound": 2,
                    "relative_to": "absolute",
                    "device_memory_gb": 80,
                }
            ]
        },
        ["limit cached_tokens has scenario 'chat'"],
    ),
    "cached tokens relative to the parent": (
        {
            "targets.light.limits": [
                {
                    "quantity": "cached_tokens",
                    "scenario": None,
                    "bound": 2,
                    "relative_to": "parent",
                    "device_memory_gb": 80,
                }
            ]
        },
        ["limit cached_tokens is relative to the parent", "relative_to: absolute"],
    ),
    "profile without a backend": (
        {"block_profile.backend": None},
        ["block_profile.backend", "'torch', 'llama_cpp', 'vllm' or 'roofline'"],
    ),
    "roofline of no device": (
        {"block_profile.backend": "roofline"},
        ["block_profile.device is None", "h100-80gb, h200-141gb"],
    ),
    "roofline of an unknown device": (
        {"block_profile.backend": "roofline", "block_profile.device": "h9000"},
        ["block_profile.device is 'h9000'", "h100-80gb, h200-141gb"],
    ),
    "roofline of a device without FP8": (
        {
            "block_profile.backend": "roofline",
            "block_profile.device": "a100-80gb",
            "block_profile.served_precision": "fp8",
        },
        ["a100-80gb does not compute in the served_precision fp8", "h100-80gb"],
    ),
    "device of a measured profile": (
        {"block_profile.device": "h100-80gb"},
        ["block_profile.device is 'h100-80gb' with backend 'torch'"],
    ),
    "devices of a measured profile": (
        {"block_profile.tensor_parallel_size": 8},
        ["block_profile.tensor_parallel_size is 8 with backend 'torch'"],
    ),
    "batch for llama-bench": (
        {
            "block_profile.backend": "llama_cpp",
            "block_profile.scenarios": [
                {"name": "chat", "batch_size": 8, "prompt_tokens": 64, "generation_tokens": 32}
            ],
        },
        ["chat has a batch_size above 1, and llama-bench times one sequence", "backend: torch"],
    ),
    "two swept scenarios in one target": (
        {
            "block_profile.scenarios": [
                {"name": name, "batch_size": [1, 2], "prompt_tokens": 64, "generation_tokens": 32}
                for name in ("chat", "talk")
            ],
            "targets.light.limits": [
                {"quantity": "decode_speed", "scenario": name, "bound": 2, "relative_to": "parent"}
                for name in ("chat", "talk")
            ],
        },
        ["target light names chat and talk, which have several batch sizes each"],
    ),
    "one batch of a swept scenario": (
        {
            "block_profile.scenarios": [
                {"name": "chat", "batch_size": [1, 2], "prompt_tokens": 64, "generation_tokens": 32}
            ],
            "targets.light.limits": [
                {"quantity": "decode_speed", "scenario": "chat-batch-2", "bound": 2, "relative_to": "parent"}
            ],
        },
        ["names scenario 'chat-batch-2'", "['chat']"],
    ),
    "a batch size given twice": (
        {
            "block_profile.scenarios": [
                {"name": "chat", "batch_size": [2, 2], "prompt_tokens": 64, "generation_tokens": 32}
            ]
        },
        ["chat has batch_size [2, 2]", "give one number, or two and more different ones"],
    ),
    "two scenarios of one name": (
        {
            "block_profile.scenarios": [{"name": "chat", "batch_size": 1, "prompt_tokens": 64, "generation_tokens": 32}]
            * 2
        },
        ["block_profile.scenarios has 'chat' twice"],
    ),
    "speed report without the profile's backend": (
        {"block_profile.backend": "vllm"},
        ["speed_report.backends is ['torch']", "measured in 'vllm'", "add it"],
    ),
    "batch for llama-bench in the speed report": (
        {
            "speed_report.backends": ["torch", "llama_cpp"],
            "block_profile.scenarios": [
                {"name": "chat", "batch_size": 8, "prompt_tokens": 64, "generation_tokens": 32}
            ],
        },
        ["speed_report.backends has 'llama_cpp'", "chat of block_profile has a batch_size above 1"],
    ),
    "speed report in one backend twice": (
        {"speed_report.backends": ["torch", "torch"]},
        ["speed_report.backends is ['torch', 'torch']: name each once"],
    ),
    "depth with a scenario's name": (
        {
            "speed_report.depths": [64],
            "block_profile.scenarios": [
                {"name": "depth-64", "batch_size": 1, "prompt_tokens": 64, "generation_tokens": 32}
            ],
        },
        ["block_profile has a scenario 'depth-64'", "rename it"],
    ),
    "limit in an unknown scenario": (
        {"targets.light.limits": [{"quantity": "memory_mib", "scenario": "x", "bound": 2, "relative_to": "parent"}]},
        ["scenario 'x'"],
    ),
    "two sources of one name": (
        {"corpora.sources": [{"kind": "embedded", "name": "chitchat", "domain": "a", "max_documents": 1}] * 2},
        ["two sources share a name"],
    ),
}

TEXTS: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["holds a NoneType", "mapping of sections"]),
    "list": (b"- a\n- b\n", ["holds a list", "mapping of sections"]),
    "not YAML": (b"name: [unclosed\n", ["not valid YAML"]),
    "key given twice": (b"name: a\nname: b\n", ["key 'name' is given twice"]),
    "tag that runs code": (
        f"name: !!python/object/apply:os.system ['touch {CANARY}']\n".encode(),
        ["not valid YAML", "python/object/apply"],
    ),
    "tag that imports": (b"name: !!python/name:os.system\n", ["not valid YAML"]),
    "not UTF-8": (b"name: caf\xe9\n", ["not UTF-8"]),
    "binary": (bytes(range(256)) * 8, ["recipe.yaml"]),
    "key that is no word": (b"? [a, b]\n: 1\n", ["not valid YAML"]),
}

FIT: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "heads that do not divide": ("plan", {"search_space.attention": ["parent", 3]}, ["does not divide the parent's 2"]),
    "FFN wider than the parent's": ("plan", {"search_space.ffn": ["parent", 999]}, ["wider than", "192"]),
    "override of a layer there is not": (
        "plan",
        {"search_space.overrides": [{"layers": [17], "ffn": ["parent"]}]},
        ["names layer 17", "layers 0 to 5"],
    ),
    "pin of a layer there is not": (
        "plan",
        {"targets.light.pins": [{"layers": [17], "ffn": "no_op"}]},
        ["target light", "a pin names layer 17", "layers 0 to 5"],
    ),
    "pin to what the space does not have": (
        "plan",
        {"targets.light.pins": [{"layers": [2], "ffn": 8}]},
        ["target light", "pins of layer 2", "add the option to search_space"],
    ),
    "space that is not portable": ("plan", {"search_space.portable": True}, ["layer 0", "portable: false"]),
    "space that its runtime does not have": (
        "plan",
        {"block_profile.backend": "llama_cpp", "speed_report.backends": ["torch", "llama_cpp"]},
        ["search_space.ffn", "'linear'", "llama.cpp does not have"],
    ),
    "parent whose heads do not fit": (
        "plan",
        {"parent.num_attention_heads": 5},
        ["hidden_size 64", "num_attention_heads 5"],
    ),
    "architecture that is not shipped": (
        "plan",
        {
            "parent": {
                "kind": "hub",
                "architecture": "llama-9",
                "repo_id": "a/b",
                "revision": "0" * 40,
                "licence": "none",
            }
        },
        ["no architecture 'llama-9'", "llama-3.1-8b-instruct"],
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_recipe_is_refused_with_the_key_at_fault(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    changes, wanted = EDITS[name]
    path = write_recipe(tmp_path, changes)
    message = refused(["plan", "--recipe", str(path)], tmp_path=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert all(text in message for text in wanted), message


@pytest.mark.parametrize("name", TEXTS)
def test_file_that_is_no_recipe_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    data, wanted = TEXTS[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    message = refused(["plan", "--recipe", str(path)], tmp_path=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert all(text in message for text in wanted), message


@pytest.mark.parametrize("name", FIT)
def test_recipe_that_does_not_fit_its_parent_is_refused_before_anything_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command, changes, wanted = FIT[name]
    path = write_recipe(tmp_path, changes)
    message = refused([command, "--recipe", str(path)], tmp_path=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert all(text in message for text in wanted), message


def test_recipe_that_cannot_be_searched_stops_data_stages_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = write_recipe(tmp_path, {"targets.light.pins": [{"layers": [17], "ffn": "no_op"}]})
    arguments = ["materialize", "corpora", "--recipe", str(path), "--target", "fused"]
    message = refused(arguments, tmp_path=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert "target light: a pin names layer 17" in message


def test_unknown_target_lists_the_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = ["explain", "--recipe", "tiny", "--target", "fast"]
    message = refused(arguments, tmp_path=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert "no target 'fast'; it has fused, light" in message
