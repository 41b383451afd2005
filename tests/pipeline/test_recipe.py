"""Recipes: the shipped ones are valid, and whatever is wrong with another is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import costs
from pipeline.errors import RecipeError
from pipeline.model.architecture_files import load_architecture
from pipeline.recipe import Limit, Recipe
from pipeline.recipe_file import RECIPES_DIR, find_recipe, load_recipe, parse_recipe

SHIPPED = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def _tiny() -> dict[str, Any]:
    return yaml.safe_load((RECIPES_DIR / "tiny.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SHIPPED)
def test_recipe_shipped_is_valid_and_named_as_its_file(name: str):
    assert load_recipe(name).name == name


def _limit(recipe: Recipe, quantity: str) -> Limit:
    found = [limit for limit in recipe.targets[recipe.default_target].limits if limit.quantity == quantity]
    assert len(found) == 1
    return found[0]


def _held_mib(recipe: Recipe, architecture: str) -> float:
    """Weights and cached tokens of the scenario that the recipe's memory limit names, a byte each."""
    name = _limit(recipe, "weights_and_cache_mib").scenario
    scenario = next(scenario for scenario in recipe.block_profile.scenarios if scenario.name == name)
    tokens = scenario.batch_size * (scenario.prompt_tokens + scenario.generation_tokens)
    model = load_architecture(architecture)
    return (costs.num_parameters(model) + tokens * costs.kv_bytes_per_token(model, bytes_per_value=1.0)) / costs.MIB


@pytest.mark.parametrize(
    ("name", "tokens", "parent", "child", "limit_bytes"),
    [
        ("super-49b", 300_000, "llama-3.3-70b-instruct", "llama-3.3-nemotron-super-49b", 80 * 10**9),
        ("ultra-253b", 3_000_000, "llama-3.1-405b-instruct", "llama-3.1-nemotron-ultra-253b", 8 * 80 * 2**30),
    ],
)
def test_memory_limit_holds_the_published_child_and_its_cache_but_not_the_parent(
    name: str, tokens: int, parent: str, child: str, limit_bytes: int
):
    recipe = load_recipe(name)
    limit = _limit(recipe, "weights_and_cache_mib")
    scenario = next(scenario for scenario in recipe.block_profile.scenarios if scenario.name == limit.scenario)
    assert scenario.batch_size * (scenario.prompt_tokens + scenario.generation_tokens) == tokens
    assert recipe.block_profile.served_precision == "fp8"
    assert (limit.bound, limit.relative_to) == (limit_bytes // 2**20, "absolute")
    assert _held_mib(recipe, child) < limit.bound < _held_mib(recipe, parent)


def test_super_answers_6000_tokens_a_second_at_batch_256_and_ultra_is_1_5_times_as_quick():
    recipe = load_recipe("super-49b")
    limit = _limit(recipe, "latency_ms")
    scenario = next(scenario for scenario in recipe.block_profile.scenarios if scenario.name == limit.scenario)
    assert (scenario.batch_size, scenario.prompt_tokens + scenario.generation_tokens) == (256, 1200)
    assert 256 * 1200 / (limit.bound / 1000) == 6000
    limit = _limit(load_recipe("ultra-253b"), "latency_ms")
    assert limit.relative_to == "parent"
    assert round(1 / limit.bound, 5) == 1.5


def test_training_of_the_large_recipes_is_the_published_one():
    large, ultra = load_recipe("super-49b"), load_recipe("ultra-253b")
    assert [(phase.sequence_length, phase.tokens) for phase in ultra.distillation_mix.long_context] == [
        (16_384, 5_000_000_000),
        (32_768, 5_000_000_000),
        (131_072, 800_000_000),
    ]
    assert (ultra.distillation_mix.sequence_length, ultra.kd.tokens) == (8192, 54_000_000_000)
    assert (ultra.pretraining_mix.sequence_length, ultra.cpt.tokens) == (8192, 73_000_000_000)
    assert [phase.tokens for phase in ultra.cpt.long_context] == [15_000_000_000]
    assert (ultra.fusion.max_run_layers, ultra.fusion.keep_last_ffn) == (15, True)
    # A device may hold an eighth of the widest published FFN in FP8, and not of one with 26,624 channels more.
    slice_gb = [3 * 16384 * width / 8 / 1e9 for width in (425_984, 425_984 + 4 * 6656)]
    assert slice_gb[0] <= ultra.fusion.max_ffn_gb_per_device <= slice_gb[1]
    assert (ultra.rl.prompts_per_step, ultra.rl.samples_per_prompt, ultra.rl.temperature) == (72, 16, 1.0)
    for recipe, window in ((large, 16_384), (ultra, 24_576)):
        assert (recipe.sft.stages[0].global_batch_size, recipe.reasoning_toggle_dataset.sequence_length) == (
            256,
            window,
        )
        assert (recipe.kd.cosine_weight, recipe.kd.kl_weight) == (1.0, 1.0)
    constant = large.sft.stages[0].optimizer
    assert (constant.schedule, constant.learning_rate, constant.warmup_ratio) == ("constant", 5e-6, 0.0)
    assert large.sft.stages[0].tokens % (256 * 16_384) == ultra.sft.stages[0].tokens % (256 * 24_576) == 0
    cosine = ultra.sft.stages[0].optimizer
    assert (cosine.schedule, cosine.learning_rate, cosine.warmup_ratio) == ("cosine", 1e-5, 0.1)
    assert cosine.learning_rate * cosine.min_learning_rate_ratio == pytest.approx(1e-6)


def test_recipe_by_path_equals_recipe_by_name():
    assert load_recipe(str(RECIPES_DIR / "tiny.yaml")) == load_recipe("tiny")


def test_recipe_that_is_a_changed_copy_of_a_shipped_one_must_have_a_name_of_its_own(tmp_path: Path):
    mine, text = tmp_path / "my.yaml", (RECIPES_DIR / "tiny.yaml").read_text(encoding="utf-8")
    mine.write_text(f"# mine\n{text}")
    assert load_recipe(str(mine)) == load_recipe("tiny")

    data = _tiny()
    data["kd"]["tokens"] *= 2
    mine.write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError, match=r"my\.yaml says `name: tiny`.*doctor --remove-garbage.*`name: my-tiny`"):
        load_recipe(str(mine))

    mine.write_text(yaml.safe_dump({**data, "name": "my-tiny"}))
    assert load_recipe(str(mine)).kd.tokens == data["kd"]["tokens"]


def test_recipe_survives_a_round_trip_through_json():
    recipe = load_recipe("tiny")

    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_recipe_cannot_be_changed_once_read():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("tiny").kd.tokens = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_recipe_unknown_name_lists_the_shipped_ones():
    with pytest.raises(RecipeError, match=r"no recipe 'nope'.*smol.*tiny"):
        load_recipe("nope")


@pytest.mark.parametrize("name", ["../recipe", "/etc/passwd-not-there", "", "a/b"])
def test_recipe_name_that_is_a_path_to_nothing_is_refused(name: str):
    with pytest.raises(RecipeError, match="no recipe"):
        find_recipe(name)


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    *parents, last = path.split(".")

    def change(data: dict[str, Any]) -> None:
        for parent in parents:
            data = data[parent]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("kd.token", 5), r"kd\.token: no such key"),
        (_set("learning_rate", 5), r"learning_rate: no such key"),
        (_set("kd.tokens", 0), r"kd\.tokens: .*greater than or equal to 1"),
        (_set("kd.tokens", "many"), r"kd\.tokens: .*integer"),
        (_set("kd.tokens", 1.5), r"kd\.tokens: .*integer"),
        (_set("kd.optimizer.learning_rate", float("nan")), r"kd\.optimizer\.learning_rate"),
        (_set("kd.optimizer.learning_rate", float("inf")), r"kd\.optimizer\.learning_rate"),
        (_set("kd.precision", "fp8"), r"kd\.precision: .*'fp32' or 'bf16'"),
        (_set("parent.kind", "pickle"), r"parent: .*does not match any of the expected tags"),
        (_set("search.objective", "task_error"), r"block_scores\.task is null"),
        (_set("search_space.ffn", [96]), r"search_space\.ffn must list 'parent'"),
        (_set("default_target", "nope"), r"default_target is 'nope'; the targets are \['fused', 'light'\]"),
        (_set("targets", {}), r"targets: .*at least 1 item"),
        (_set("targets", {"a/b": {}}), r"targets\.a/b"),
        (_set("kd.tokens", 10**9), r"kd\.tokens is 1,000,000,000 tokens, its mixture holds 16,384"),
        (_set("rl.samples_per_prompt", 1), r"rl\.samples_per_prompt"),
        (_set("kd.kl_weight", float("inf")), r"kd\.kl_weight"),
    ],
)
def test_recipe_with_one_wrong_value_names_its_key(change: Callable[[dict[str, Any]], None], message: str):
    data = _tiny()
    change(data)

    with pytest.raises(RecipeError, match=message):
        parse_recipe(data, origin="test")


def _lm_eval(*tasks: dict[str, Any]) -> dict[str, Any]:
    return {"tasks": list(tasks), "include_path": None, "max_items": None, "seed": 1, "checkpoints": "last"}


def _task(name: str, *prompts: str) -> dict[str, Any]:
    return {"name": name, "prompts": list(prompts), "num_fewshot": None}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (_lm_eval(), r"evaluation\.lm_eval\.tasks: .*at least 1 item"),
        (_lm_eval(_task("piqa")), r"lm_eval\.tasks\.0\.prompts: .*at least 1 item"),
        (_lm_eval(_task("piqa", "chat")), r"prompts\.0: .*'plain', 'on' or 'off'"),
        (_lm_eval(_task("piqa", "on", "on")), r"task piqa names a prompt twice"),
        (_lm_eval(_task("piqa", "on"), _task("piqa", "off")), r"a task is named twice"),
        (_lm_eval(_task("refit_reasoning", "plain")), r"its prompts are on and off, got plain"),
        (_lm_eval(_task("refit_hellaswag", "plain")), r"names refit_hellaswag, but .* there are \['refit_piqa'"),
    ],
)
def test_recipe_with_an_lm_eval_task_that_cannot_be_asked_says_why(section: dict[str, Any], message: str):
    data = yaml.safe_load((RECIPES_DIR / "smol.yaml").read_text(encoding="utf-8"))
    data["evaluation"]["lm_eval"] = section

    with pytest.raises(RecipeError, match=message):
        parse_recipe(data, origin="test")


def _lines(change: Callable[[dict[str, Any]], None]) -> list[str]:
    data = _tiny()
    change(data)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, origin="test")
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_misspelt_key_is_told_once_with_the_key_that_was_meant():
    def change(data: dict[str, Any]) -> None:
        data["block_score"] = data.pop("block_scores")
        data["kd"]["token"] = data["kd"].pop("tokens")

    assert sorted(_lines(change)) == [
        "block_score: no such key; did you mean block_scores?",
        "kd.token: no such key; did you mean tokens?",
    ]


def test_wrong_value_is_told_with_what_was_got_and_all_that_was_wanted():
    assert _lines(_set("kd.tokens", "1e5")) == [
        "kd.tokens: want a valid integer, unable to parse string as an integer; got '1e5'"
    ]
    (line,) = _lines(_set("search_space.attention", ["parent", "noop"]))
    assert line.startswith("search_space.attention.1: want 'parent', 'linear' or 'no_op' or want a valid integer")
    assert line.endswith("; got 'noop'")


def test_key_of_a_chosen_kind_is_named_as_the_file_has_it():
    hub = {"kind": "hub", "repo_id": "a/b", "revision": "main", "licence": "MIT"}
    assert _lines(_set("parent", hub)) == [
        "parent.architecture: this key is missing",
        "parent.revision: String should match pattern '^[0-9a-f]{40}$'; got 'main'",
    ]


def test_words_of_yaml_stay_words(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    text = (RECIPES_DIR / "smol.yaml").read_text(encoding="utf-8").replace("name: smol\n", "name: trueish\n")
    assert "lm_eval: null" in text
    path.write_text(
        text.replace(
            "lm_eval: null",
            "lm_eval: {tasks: [{name: refit_reasoning, prompts: [on, off], num_fewshot: null}], include_path: null, "
            "max_items: null, seed: 1, checkpoints: last}",
        ),
        encoding="utf-8",
    )
    lm_eval = load_recipe(str(path)).evaluation.lm_eval
    assert lm_eval is not None
    assert lm_eval.tasks[0].prompts == ("on", "off")


@pytest.mark.parametrize("key", sorted(Recipe.model_fields))
def test_recipe_without_a_key_names_it(key: str):
    data = _tiny()
    del data[key]

    with pytest.raises(RecipeError, match=rf"{key}: this key is missing"):
        parse_recipe(data, origin="test")


def test_recipe_source_that_is_not_in_the_corpora_is_named():
    data = _tiny()
    data["distillation_mix"]["entries"] = [{"source": "nowhere", "weight": 1.0}]

    with pytest.raises(RecipeError, match=r"distillation_mix\.entries names 'nowhere'"):
        parse_recipe(data, origin="test")


def test_recipe_limit_with_unknown_scenario_is_named():
    data = _tiny()
    data["targets"]["light"]["limits"] = [
        {"quantity": "decode_speed", "scenario": "batch", "bound": 1.2, "relative_to": "parent"}
    ]

    with pytest.raises(RecipeError, match=r"target light names scenario 'batch'; block_profile has \['chat'\]"):
        parse_recipe(data, origin="test")


def test_recipe_that_replays_windows_of_another_length_is_refused():
    data = _tiny()
    data["sft"]["stages"][0]["replay_share"] = 0.1
    assert data["pretraining_mix"]["sequence_length"] != data["reasoning_toggle_dataset"]["sequence_length"]

    with pytest.raises(RecipeError, match=r"sft\.stages replays text .* make them equal, or replay_share 0"):
        parse_recipe(data, origin="test")


def test_recipe_several_mistakes_are_all_listed():
    data = _tiny()
    data["kd"]["tokens"] = -1
    data["sft"]["token"] = 3

    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, origin="my.yaml")

    assert "my.yaml" in str(caught.value)
    assert "kd.tokens" in str(caught.value)
    assert "sft.token" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "key 'name' is given twice"),
        ("kd: {tokens: 1, tokens: 2}\n", "key 'tokens' is given twice"),
        ("- just\n- a list\n", "holds a list"),
        ("", "holds a NoneType"),
        ("name: [unclosed\n", "not valid YAML"),
        ("name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_recipe_file_that_is_broken_or_hostile_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)

    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))
