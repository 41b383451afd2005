"""lm-eval's library against our own scorers, item by item, on a model whose layers differ."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from pipeline.architecture import NO_ATTENTION, NO_FFN, BlockSpec, gqa, swiglu
from pipeline.data.benchmarks import MultipleChoiceItem
from pipeline.data.chat import generation_prompt_ids, reasoning_messages, stop_token_ids
from pipeline.data.choice_texts import scored_text
from pipeline.data.evaluation_sets import (
    load_multiple_choice,
    load_reasoning_items,
    save_multiple_choice,
    save_reasoning_items,
)
from pipeline.data.reasoning_items import ReasoningItem, generate_items
from pipeline.errors import DataError
from pipeline.evaluation.generation import complete_greedily
from pipeline.evaluation.lm_eval_results import read_lm_eval
from pipeline.evaluation.lm_eval_runner import TaskRun, harness_model, load_inline, load_task, run_task
from pipeline.evaluation.lm_eval_store import ASSET, own_task
from pipeline.evaluation.multiple_choice import choice_log_likelihoods, multiple_choice_quality
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, build_model
from pipeline.recipe import LmEvalConfig, LmEvalPrompt, LmEvalTask
from tests.pipeline.evaluation.stages import CONFIG, TASK, FinishedMeanwhile, run_both

pytestmark = [pytest.mark.lm_eval, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

WORDS = ["ice", "café", "two", "four,", "five?", "yes", "no", "雪", "bark", "fly", "seven-eight", "nine"]


@pytest.fixture(scope="module")
def model(parent: HeterogeneousLlamaForCausalLM) -> HeterogeneousLlamaForCausalLM:
    """A model that begins without attention, ends without an FFN, and has two widths between."""
    blocks = (
        BlockSpec(attention=NO_ATTENTION, ffn=swiglu(64), parent_layers=(0,)),
        BlockSpec(attention=gqa(1), ffn=swiglu(16), parent_layers=(1,)),
        BlockSpec(attention=gqa(4), ffn=NO_FFN, parent_layers=(1,)),
    )
    architecture = parent.architecture.with_blocks(blocks)
    return build_model(architecture, dtype=torch.float32, seed=3, initializer_range=0.3)


@pytest.fixture(scope="module")
def sets_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sets")
    items = [
        MultipleChoiceItem(
            prompt=f"Question {number}: {' '.join(WORDS[number % 5 : number % 5 + 3])}?\nAnswer:",
            choices=tuple(WORDS[(number * 7 + step * 3) % len(WORDS)] + "!" * step for step in range(2 + number % 3)),
            gold=number % 2,
        )
        for number in range(30)
    ]
    save_multiple_choice(directory, "quiz", items)
    save_reasoning_items(directory, generate_items(TASK, num_items=7, seed=5, exclude_questions=frozenset()))
    return directory


def _run(
    name: str, *, sets_dir: Path, lm: Any, prompt: LmEvalPrompt = "plain", max_items: int | None = None
) -> TaskRun:
    stop_texts = ["<|im_end|>"]
    with own_task(name, sets_dir=sets_dir, stop_texts=stop_texts, max_new_tokens=12) as config:
        loaded = load_inline(config)
        return run_task(loaded, lm=lm, prompt=prompt, num_fewshot=None, max_items=max_items, seed=1)


def _value(run: TaskRun, metric: str, filter_name: str = "none") -> float:
    (score,) = [one for one in run.scores if (one.metric, one.filter) == (metric, filter_name)]
    return score.value


def test_multiple_choice_agrees_with_our_scorer_item_by_item(
    model: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sets_dir: Path
) -> None:
    items = load_multiple_choice(sets_dir)["quiz"]
    run = _run("refit_quiz", sets_dir=sets_dir, lm=harness_model(model, tokenizer=tokenizer, batch_size=4))

    texts = [
        scored_text(item.prompt, choice=choice, tokenizer=tokenizer, max_tokens=512)
        for item in items
        for choice in item.choices
    ]
    ours = iter(choice_log_likelihoods(model, texts=texts, batch_size=3))
    logged = sorted(run.items["refit_quiz"], key=lambda one: one["doc_id"])
    rights, rights_normalised = 0, 0
    for item, found in zip(items, logged, strict=True):
        scores = [next(ours) for _ in item.choices]
        assert [float(pair[0]) for pair in found["filtered_resps"]] == pytest.approx(scores, abs=1e-4)
        per_character = [score / len(choice) for score, choice in zip(scores, item.choices, strict=True)]
        right = scores.index(max(scores)) == item.gold
        right_normalised = per_character.index(max(per_character)) == item.gold
        assert (found["acc"], found["acc_norm"]) == (right, right_normalised)
        rights, rights_normalised = rights + right, rights_normalised + right_normalised
    quality = multiple_choice_quality(model, items=items, tokenizer=tokenizer, max_tokens=512, batch_size=4)
    assert _value(run, "acc") == pytest.approx(quality.accuracy.value) == pytest.approx(rights / 30)
    assert _value(run, "acc_norm") == pytest.approx(quality.accuracy_normalised.value)
    assert 0 < rights < 30
    assert rights != rights_normalised, "a set on which both ways agree would not tell them apart"
    # The standard error of a mean of zeros and ones, by the textbook.
    acc = next(score for score in run.scores if score.metric == "acc")
    assert acc.stderr == pytest.approx((acc.value * (1 - acc.value) / 29) ** 0.5)
    assert acc.num_items == 30


@pytest.mark.parametrize("prompt", ["on", "off"])
def test_replies_under_the_chat_template_are_those_of_our_own_generation(
    model: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sets_dir: Path, prompt: Any
) -> None:
    items = load_reasoning_items(sets_dir)
    ours = complete_greedily(
        model,
        prompts=[
            generation_prompt_ids(tokenizer, reasoning_messages(item.question, thinking=prompt == "on"))
            for item in items
        ],
        stop_ids=stop_token_ids(tokenizer, model.architecture.eos_token_ids),
        max_new_tokens=12,
        batch_size=3,
    )
    run = _run(
        "refit_reasoning",
        sets_dir=sets_dir,
        lm=harness_model(model, tokenizer=tokenizer, batch_size=4),
        prompt=prompt,
    )
    logged = [one for one in run.items["refit_reasoning"] if one["filter"] == "exact-reply"]
    replies = [one["resps"][0][0] for one in sorted(logged, key=lambda one: one["doc_id"])]
    wanted = [tokenizer.decode(list(completion.ids), skip_special_tokens=True) for completion in ours]
    assert replies == wanted
    assert len(set(replies)) > 1
    assert f"detailed thinking {prompt}" in logged[0]["arguments"][0][0]


def test_scores_of_replies_are_those_counted_by_hand(
    model: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    said = {  # reply: exact reply, last word
        "<think>\n6 * 7\n</think>\n\n42": (True, True),
        " 42\n": (True, True),
        "It is **42**.": (False, True),
        "<think>\n6 * 7 = 42": (False, False),
        "-42": (False, False),
        "41": (False, False),
        "": (False, False),
    }
    items = [
        ReasoningItem(task="chain_sum", config={}, seed=0, index=0, question=f"{reply!r}?", answer="42")
        for reply in said
    ]
    save_reasoning_items(tmp_path, items)
    lm = harness_model(model, tokenizer=tokenizer, batch_size=1)
    stop = stop_token_ids(tokenizer, model.architecture.eos_token_ids)[0]

    def write(context: torch.Tensor, **_: object) -> torch.Tensor:
        text = tokenizer.decode(context[0].tolist())
        (reply,) = [one for one in said if f"{one!r}?" in text]
        ids = [*tokenizer.encode(reply, add_special_tokens=False), stop]
        return torch.cat([context, torch.tensor([ids])], dim=1)

    lm._model_generate = write  # the one place where lm-eval asks the model for text
    run = _run("refit_reasoning", sets_dir=tmp_path, lm=lm, prompt="on")

    for index, name in enumerate(("exact-reply", "last-word")):
        logged = [one for one in run.items["refit_reasoning"] if one["filter"] == name]
        found = {one["doc"]["question"]: one["exact_match"] for one in logged}
        assert found == {f"{reply!r}?": float(right[index]) for reply, right in said.items()}
    assert _value(run, "exact_match", "exact-reply") == pytest.approx(2 / 7)


def test_items_are_drawn_and_not_the_first(
    model: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sets_dir: Path
) -> None:
    lm = harness_model(model, tokenizer=tokenizer, batch_size=4)
    ids = [
        [one["doc_id"] for one in _run("refit_quiz", sets_dir=sets_dir, lm=lm, max_items=6).items["refit_quiz"]]
        for _ in range(2)
    ]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 6
    assert ids[0] != list(range(6))


def _write_task(directory: Path, *, name: str = "mine", **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    data = directory / "items.jsonl"
    data.write_text('{"q": "1 + 1 =", "options": ["2", "three"], "right": 0}\n' * 3)
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _task(name: str, *prompts: LmEvalPrompt) -> LmEvalTask:
    return LmEvalTask(name=name, prompts=prompts or ("plain",), num_fewshot=None)


def test_task_file_runs_without_a_network(
    model: HeterogeneousLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a local task reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    _write_task(tmp_path / "tasks")
    loaded = load_task(_task("mine"), include_path=str(tmp_path / "tasks"))
    lm = harness_model(model, tokenizer=tokenizer, batch_size=4)
    run = run_task(loaded, lm=lm, prompt="on", num_fewshot=None, max_items=None, seed=1)
    assert [score.num_items for score in run.scores] == [3]
    assert "detailed thinking on" in run.items["mine"][0]["arguments"][0][0]


def test_unknown_task_names_the_closest(tmp_path: Path) -> None:
    _write_task(tmp_path / "tasks", name="my_quiz")
    with pytest.raises(DataError, match=r"no task 'arc_esy'; the closest are .*arc_easy.*; include_path has my_quiz"):
        load_task(_task("arc_esy"), include_path=str(tmp_path / "tasks"))


def test_task_of_the_hub_offline_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _write_task(tmp_path / "tasks", dataset_path="nobody/nothing", dataset_kwargs={})
    with pytest.raises(DataError, match=r"data set nobody/nothing of the Hugging Face hub: set HF_HUB_OFFLINE=0"):
        load_task(_task("mine"), include_path=str(tmp_path / "tasks"))


def test_stages_measure_parent_and_last_checkpoint_once_and_a_changed_task_file_anew(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    path = _write_task(tmp_path / "tasks")
    asked = LmEvalConfig(
        tasks=(_task("refit_quiz"), _task("refit_reasoning", "on", "off"), _task("mine")),
        include_path=str(tmp_path / "tasks"),
        max_items=None,
        seed=1,
        checkpoints="last",
    )
    config = CONFIG.model_copy(update={"evaluation": CONFIG.evaluation.model_copy(update={"lm_eval": asked})})

    result = run_both(artifacts, tmp_path, config=config)

    found = read_lm_eval(tmp_path / "evaluation" / "f00")
    assert list(found) == ["parent", "rl"]
    assert [(one.task, one.prompt) for one in found["rl"]] == [
        ("refit_quiz", "plain"),
        ("refit_reasoning", "on"),
        ("refit_reasoning", "off"),
        ("mine", "plain"),
    ]
    assert result.facts == {"lm_eval": found["rl"][0].lm_eval_version}
    assert result.metrics["rl_lm_eval_mine_plain_acc"] in (0.0, 1.0)
    assert "parent_lm_eval_refit_reasoning_off_exact_match_last-word" in result.metrics
    table = result.tables["lm_eval"]
    assert table.columns[3:9] == (
        "plain",
        "thinking on",
        "thinking off",
        "parent, plain",
        "parent, thinking on",
        "parent, thinking off",
    )
    assert [row[1] for row in table.rows] == ["refit_quiz"] * 2 + ["refit_reasoning"] * 2 + ["mine"]

    def measured() -> set[str]:
        return {one.name for one in (tmp_path / ASSET).iterdir() if one.is_dir()}

    before = measured()
    assert len(before) == 8
    run_both(artifacts, tmp_path, config=config)
    assert measured() == before
    path.write_text(path.read_text().replace("{{q}}", "Now: {{q}}"))
    run_both(artifacts, tmp_path, config=config)
    assert len(measured() - before) == 2, "the changed task, for the parent and the last checkpoint"


def test_task_that_another_process_measures_meanwhile_is_taken_and_left_as_it_is(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    asked = LmEvalConfig(tasks=(_task("refit_quiz"),), include_path=None, max_items=None, seed=1, checkpoints="last")
    config = CONFIG.model_copy(update={"evaluation": CONFIG.evaluation.model_copy(update={"lm_eval": asked})})
    run_both(artifacts, tmp_path, config=config)
    path = min(path for path in (tmp_path / ASSET).iterdir() if path.is_dir())
    before = {file: file.stat().st_ino for file in path.iterdir()}

    with FinishedMeanwhile(path) as reporter:
        run_both(artifacts, tmp_path, config=config, reporter=reporter)

    waits = [message for message in reporter.heard if message.startswith("waiting for process")]
    assert waits == [f"waiting for process {os.getpid()}, which is making {ASSET}"]
    assert {file: file.stat().st_ino for file in path.iterdir()} == before
