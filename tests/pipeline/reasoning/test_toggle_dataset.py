"""The toggle dataset: pairs, exclusions, masks, splits, packing; self-chat; and both data stages on a tiny parent."""

import dataclasses
from pathlib import Path

import polars as pl
import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import THINK_OPEN, THINKING_OFF, THINKING_ON, generation_prompt_ids, reasoning_messages
from pipeline.data.decontamination import build_ngrams
from pipeline.data.documents import Document
from pipeline.data.evaluation_sets import save_evaluation_ngrams, save_held_out, save_reasoning_items
from pipeline.data.packed import IGNORED_LABEL, load_packed
from pipeline.data.reasoning_items import generate_items
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import SilentReporter
from pipeline.reasoning.prompts import load_prompts
from pipeline.reasoning.self_chat import ChatTurn, find_flaw, sample_self_chat, user_header_ids
from pipeline.reasoning.toggle_dataset import (
    SolvedItems,
    chat_samples,
    mask_preview,
    num_unpaired_prompts,
    num_unverified_traces,
    paired_samples,
    solve_tasks,
    split_samples,
    without_long_prompts,
)
from pipeline.recipe import ChatConfig, ReasoningTask, RLPromptsConfig, ToggleDatasetConfig
from pipeline.stage import StageInputs
from pipeline.stages import reasoning_toggle_dataset, rl_prompts
from pipeline.stages.configs import RLPromptsStage, ToggleDatasetStage

TASKS = (
    ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    ReasoningTask(name="leg_counting", config={"min_animals": 2, "max_animals": 2, "max_instances": 4}),
)
NO_NGRAMS = build_ngrams([], num_words=13)


def _solve(*, num_items: int = 20, exclude: frozenset[str] = frozenset()) -> SolvedItems:
    return solve_tasks(
        TASKS, items_per_task=num_items, seed=3, evaluation_questions=exclude, evaluation_ngrams=NO_NGRAMS
    )


def test_solve_tasks_leaves_out_what_evaluation_asks():
    evaluated = frozenset(
        item.question for task in TASKS for item in generate_items(task, num_items=15, seed=9, exclude_questions=set())
    )
    solved = _solve(num_items=60, exclude=evaluated)
    questions = [kept.item.question for kept in solved.kept]
    assert len(questions) == len(set(questions)) == 120
    assert not evaluated & set(questions)


def test_solve_tasks_drops_questions_that_share_text_with_evaluation_documents():
    text = "Your task is to count how many legs there are in total when given a list of animals."
    solved = solve_tasks(
        TASKS,
        items_per_task=5,
        seed=3,
        evaluation_questions=set(),
        evaluation_ngrams=build_ngrams([text], num_words=13),
    )
    assert {kept.item.task for kept in solved.kept} == {"chain_sum"}
    assert solved.num_dropped["contaminated"] == 5


def test_paired_samples_differ_by_system_prompt_and_thought_alone(tokenizer: PreTrainedTokenizerFast):
    for solved in _solve().kept:
        on, off = paired_samples(solved, tokenizer=tokenizer)
        assert (on.system, off.system) == (THINKING_ON, THINKING_OFF)
        assert (on.question, on.answer) == (off.question, off.answer)
        assert on.completion == f"<think>\n{solved.trace.text}\n</think>\n\n{solved.trace.answer}"
        assert off.completion == solved.trace.answer


def test_paired_samples_train_the_completion_and_its_end_token_only(tokenizer: PreTrainedTokenizerFast):
    for sample in paired_samples(_solve().kept[0], tokenizer=tokenizer):
        trained = [id_ for id_, is_trained in zip(sample.chat.ids, sample.chat.trained_mask, strict=True) if is_trained]
        assert tokenizer.decode(trained) == f"{sample.completion}<|im_end|>"
        prompt = generation_prompt_ids(tokenizer, reasoning_messages(sample.question, thinking=sample.mode == "on"))
        assert list(sample.chat.ids[: len(prompt)]) == prompt


def test_chat_samples_alternate_modes_and_leave_a_missing_end_untrained(tokenizer: PreTrainedTokenizerFast):
    whole, cut = chat_samples(
        [
            ChatTurn(question="Who?", answer="Me.", is_complete=True),
            ChatTurn(question="What?", answer="That is a lo", is_complete=False),
        ],
        tokenizer=tokenizer,
    )
    assert (whole.mode, whole.system, cut.mode, cut.system) == ("off", THINKING_OFF, "none", None)
    for sample, text in ((whole, "Me.<|im_end|>"), (cut, "That is a lo")):
        trained = [id_ for id_, is_trained in zip(sample.chat.ids, sample.chat.trained_mask, strict=True) if is_trained]
        assert tokenizer.decode(trained) == text


def test_split_samples_keeps_a_prompts_modes_together(tokenizer: PreTrainedTokenizerFast):
    samples = [sample for solved in _solve().kept for sample in paired_samples(solved, tokenizer=tokenizer)]
    split = split_samples(samples, seed=0)
    train, validation = ({sample.prompt_id for sample in part} for part in (split.train, split.validation))
    assert len(validation) == 2
    assert not train & validation
    assert len(split.train) + len(split.validation) == len(samples)
    assert num_unpaired_prompts(split.train) == num_unpaired_prompts(split.validation) == 0
    assert split == split_samples(samples, seed=0)


def test_num_unpaired_prompts_counts_what_is_missing_doubled_or_different(tokenizer: PreTrainedTokenizerFast):
    solved = _solve(num_items=2).kept
    pairs = [paired_samples(item, tokenizer=tokenizer) for item in solved]
    on, off = pairs[0]
    assert num_unpaired_prompts([on]) == 1
    assert num_unpaired_prompts([on, off, off]) == 1
    assert num_unpaired_prompts([on, dataclasses.replace(off, answer="other")]) == 1
    assert num_unpaired_prompts([on, off, *pairs[1]]) == 0


def test_num_unverified_traces_finds_a_reply_with_another_answer(tokenizer: PreTrainedTokenizerFast):
    solved = _solve(num_items=2).kept
    on, off = paired_samples(solved[0], tokenizer=tokenizer)
    items = {item.prompt_id: item.item for item in solved}
    assert num_unverified_traces([on, off], items=items) == 0
    assert num_unverified_traces([dataclasses.replace(on, completion="<think>\n1\n</think>\n\n99")], items=items) == 1


def test_without_long_prompts_drops_both_modes(tokenizer: PreTrainedTokenizerFast):
    on, off = paired_samples(_solve(num_items=2).kept[0], tokenizer=tokenizer)
    assert without_long_prompts([on, off], max_tokens=len(on.chat.ids)) == [on, off]
    assert without_long_prompts([on, off], max_tokens=len(on.chat.ids) - 1) == []


def test_mask_preview_marks_the_completion(tokenizer: PreTrainedTokenizerFast):
    _, off = paired_samples(_solve(num_items=2).kept[0], tokenizer=tokenizer)
    assert f"**`{off.answer}<|im_end|>`**" in mask_preview(off, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        ("A fine answer.", None),
        ("  \n ", "empty"),
        ("<think>no", "think tag"),
        ("same\nother\nsame\nsame", "repeated lines"),
    ],
)
def test_find_flaw_names_why_a_turn_is_dropped(text: str, flaw: str | None):
    assert find_flaw(text) == flaw


def test_user_header_ids_end_where_the_user_speaks(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer.decode(user_header_ids(tokenizer)) == "<|im_start|>user\n"


def test_sample_self_chat_same_seed_same_turns(
    model: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
):
    config = ChatConfig(num_samples=6, max_new_tokens=8, temperature=1.0, top_p=0.9, batch_size=4)
    first, second = (
        sample_self_chat(
            model, tokenizer, config=config, seed=1, evaluation_ngrams=NO_NGRAMS, reporter=SilentReporter()
        )
        for _ in range(2)
    )
    assert first == second
    assert len(first.turns) + sum(first.num_dropped.values()) == 6


@pytest.fixture(scope="module")
def evaluation_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluation_sets")
    text = "a held-out document about nothing that any task would ever ask of anyone at all"
    save_held_out(directory, "text", [Document(document_id="1", text=text)])
    items = [item for task in TASKS for item in generate_items(task, num_items=4, seed=10**9, exclude_questions=set())]
    save_reasoning_items(directory, items)
    save_evaluation_ngrams(directory, build_ngrams([text, *(item.question for item in items)], num_words=13))
    return directory


def _toggle_stage(num_chat: int) -> ToggleDatasetStage:
    chat = ChatConfig(num_samples=num_chat, max_new_tokens=8, temperature=1.0, top_p=0.9, batch_size=4)
    return ToggleDatasetStage(
        dataset=ToggleDatasetConfig(items_per_task=20, sequence_length=384, chat=chat, seed=3),
        reasoning_tasks=TASKS,
        ngram_tokens=13,
    )


def test_stages_toggle_dataset_and_prompts_are_verified_paired_and_disjoint(
    parent_dir: Path, evaluation_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    toggle_dir, again_dir, prompts_dir = tmp_path / "toggle", tmp_path / "again", tmp_path / "prompts"
    for directory in (toggle_dir, again_dir, prompts_dir):
        directory.mkdir()
    inputs = StageInputs(
        artifacts={
            "parent_checkpoint": parent_dir,
            "evaluation_sets": evaluation_dir,
            "reasoning_toggle_dataset": toggle_dir,
        },
        store_root=tmp_path,
        downloads=tmp_path,
    )
    result = reasoning_toggle_dataset.run(_toggle_stage(num_chat=0), inputs, toggle_dir)
    metrics = result.metrics
    assert (metrics["num_pairs"], metrics["num_samples"], metrics["num_chat"]) == (40, 80, 0)
    assert metrics["num_unverified_traces_kept"] == metrics["num_unpaired_prompts"] == 0
    assert metrics["num_dropped_contaminated"] == metrics["num_dropped_too_long"] == 0
    assert 0 < metrics["trained_token_share"] < 1
    assert "**`" in result.markdown["mask_preview"]

    train, validation = load_packed(toggle_dir, "train"), load_packed(toggle_dir, "validation")
    num_trained = sum(int((part.labels_NT != IGNORED_LABEL).sum()) for part in (train, validation))
    assert num_trained == metrics["num_trained_tokens"]
    trained_text = tokenizer.decode(train.tokens_NT[train.labels_NT != IGNORED_LABEL].tolist())
    assert "detailed thinking" not in trained_text
    assert trained_text.count(THINK_OPEN) == 38

    reasoning_toggle_dataset.run(_toggle_stage(num_chat=0), inputs, again_dir)
    for path in toggle_dir.iterdir():
        assert path.read_bytes() == (again_dir / path.name).read_bytes()

    stage = RLPromptsStage(
        rl_prompts=RLPromptsConfig(items_per_task=12, seed=4), reasoning_tasks=TASKS, ngram_tokens=13
    )
    prompts = rl_prompts.run(stage, inputs, prompts_dir)
    items = load_prompts(prompts_dir)
    asked = set(pl.read_parquet(toggle_dir / "samples.parquet")["question"])
    assert prompts.metrics["num_rejected_reference_answers"] == 0
    assert len(items) == prompts.metrics["num_prompts"] == 24
    assert not asked & {item.question for item in items}


def test_stages_toggle_dataset_with_chat_keeps_what_is_sound(parent_dir: Path, evaluation_dir: Path, tmp_path: Path):
    inputs = StageInputs(
        artifacts={"parent_checkpoint": parent_dir, "evaluation_sets": evaluation_dir},
        store_root=tmp_path,
        downloads=tmp_path,
    )
    metrics = reasoning_toggle_dataset.run(_toggle_stage(num_chat=6), inputs, tmp_path).metrics
    assert metrics["num_chat"] + metrics["num_dropped_chat"] == 6
