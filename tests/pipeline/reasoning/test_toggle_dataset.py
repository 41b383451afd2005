"""The toggle dataset: rows of solvers and chat, blends, order, splits, packing; self-chat; and the data stages."""

from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import THINK_OPEN, THINKING_OFF, THINKING_ON, generation_prompt_ids, reasoning_messages
from pipeline.data.decontamination import build_ngrams
from pipeline.data.documents import Document
from pipeline.data.evaluation_sets import (
    load_evaluated_questions,
    save_evaluation_ngrams,
    save_held_out,
    save_held_out_items,
    save_instruction_items,
    save_reasoning_items,
)
from pipeline.data.instruction_items import InstructionItem, generate_instruction_items
from pipeline.data.packed import IGNORED_LABEL, blend_split, load_packed
from pipeline.data.reasoning_items import generate_items
from pipeline.errors import DataError
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import SilentReporter
from pipeline.reasoning.filtering import TokenisedRows, num_unpaired_prompts
from pipeline.reasoning.prompts import load_prompts
from pipeline.reasoning.rows import TraceRow, read_rows, write_rows
from pipeline.reasoning.self_chat import ChatTurn, find_flaw, sample_self_chat, user_header_ids
from pipeline.reasoning.toggle_dataset import (
    ToggleSample,
    blend_samples,
    counts_by_category,
    mask_preview,
    num_unverified,
    split_samples,
)
from pipeline.reasoning.trace_sources import chat_rows, solver_rows, task_items
from pipeline.recipe import BlendConfig, ChatConfig, InstructionsConfig, ReasoningTask, RLPromptsConfig
from pipeline.stage import StageInputs
from pipeline.stages import reasoning_toggle_dataset, reasoning_traces, rl_prompts
from pipeline.stages.configs import RLPromptsStage, ToggleDatasetStage, TracesStage
from tests.pipeline.reasoning.builders import FILTERS, make_row, toggle_config, traces_config

TASKS = (
    ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    ReasoningTask(name="leg_counting", config={"min_animals": 2, "max_animals": 2, "max_instances": 4}),
)


def _rows(*, num_items: int = 20, exclude: frozenset[str] = frozenset()) -> list[TraceRow]:
    items = task_items(TASKS, items_per_task=num_items, seed=3, exclude_questions=exclude)
    return solver_rows(items, num_unsolved=Counter())


def _samples(rows: list[TraceRow], tokenizer: PreTrainedTokenizerFast) -> list[ToggleSample]:
    tokens = TokenisedRows(tokenizer)
    return [ToggleSample(row=row, chat=tokens.chat(row)) for row in rows]


def _trained_text(sample: ToggleSample, tokenizer: PreTrainedTokenizerFast) -> str:
    pairs = zip(sample.chat.ids, sample.chat.trained_mask, strict=True)
    return str(tokenizer.decode([id_ for id_, is_trained in pairs if is_trained]))


def test_task_items_leave_out_what_evaluation_asks():
    evaluated = frozenset(
        item.question for task in TASKS for item in generate_items(task, num_items=15, seed=9, exclude_questions=set())
    )
    items = task_items(TASKS, items_per_task=60, seed=3, exclude_questions=evaluated)
    questions = [item.question for item in items]
    assert len(questions) == len(set(questions)) == 120
    assert not evaluated & set(questions)


def test_rows_survive_their_file(tmp_path: Path):
    rows = [*_rows(num_items=2), *chat_rows([ChatTurn(question="Q?", answer="A", is_complete=False)], licence="MIT")]
    write_rows(tmp_path / "rows.parquet", rows)
    assert read_rows(tmp_path / "rows.parquet") == rows


def test_solver_rows_differ_by_system_prompt_and_thought_alone():
    rows = _rows()
    assert len(rows) == 80
    for on, off in zip(rows[::2], rows[1::2], strict=True):
        assert (on.system_prompt, off.system_prompt) == (THINKING_ON, THINKING_OFF)
        assert (on.input, on.prompt_id, on.category) == (off.input, off.prompt_id, "arithmetic")
        assert on.output.startswith("<think>\n")
        assert on.output.endswith(f"\n</think>\n\n{off.output}")


def test_tokenised_rows_train_the_output_and_its_end_token_only(tokenizer: PreTrainedTokenizerFast):
    for sample in _samples(_rows(num_items=1), tokenizer):
        assert _trained_text(sample, tokenizer) == f"{sample.row.output}<|im_end|>"
        prompt = generation_prompt_ids(
            tokenizer, reasoning_messages(sample.row.prompt_text, thinking=sample.row.mode == "on")
        )
        assert list(sample.chat.ids[: len(prompt)]) == prompt


def test_tokenised_rows_train_the_last_turn_of_several(tokenizer: PreTrainedTokenizerFast):
    row = make_row(question="A?", output="C.", mode="off", history=(("user", "First?"), ("assistant", "Earlier.")))
    (sample,) = _samples([row], tokenizer)
    assert _trained_text(sample, tokenizer) == "C.<|im_end|>"


def test_chat_rows_alternate_modes_and_leave_a_missing_end_untrained(tokenizer: PreTrainedTokenizerFast):
    turns = [
        ChatTurn(question="Who?", answer="Me.", is_complete=True),
        ChatTurn(question="What?", answer="That is a lo", is_complete=False),
    ]
    whole, cut = _samples(chat_rows(turns, licence="MIT"), tokenizer)
    assert (whole.row.mode, cut.row.mode) == ("off", "none")
    assert _trained_text(whole, tokenizer) == "Me.<|im_end|>"
    assert _trained_text(cut, tokenizer) == "That is a lo"


def test_split_samples_keeps_a_prompts_modes_together(tokenizer: PreTrainedTokenizerFast):
    samples = _samples(_rows(), tokenizer)
    split = split_samples(samples, seed=0)
    train, validation = ({sample.row.prompt_id for sample in part} for part in (split.train, split.validation))
    assert len(validation) == 2
    assert not train & validation
    assert len(split.train) + len(split.validation) == len(samples)
    assert num_unpaired_prompts(sample.row for sample in split.train) == 0
    assert split == split_samples(samples, seed=0)


def test_num_unverified_finds_a_reply_with_another_answer():
    on, off = _rows(num_items=1)[:2]
    assert num_unverified([on, off]) == 0
    assert num_unverified([make_row(question="?", output="<think>\n1\n</think>\n\n99", item=on.item), off]) == 1


def _blend(
    samples: list[ToggleSample],
    *,
    weights: dict[str, float],
    modes: tuple[str, ...] = ("thinking_on", "thinking_off"),
    order: str = "shuffled",
) -> list[ToggleSample]:
    config = BlendConfig.model_validate({"name": "b", "modes": modes, "weights": weights, "order": order})
    return blend_samples(samples, config=config)


def _categories(tokenizer: PreTrainedTokenizerFast) -> list[ToggleSample]:
    """40 prompts of math and 12 of code, in both modes."""
    rows: list[TraceRow] = []
    for category, num in (("math", 40), ("code", 12)):
        for number in range(num):
            question, thought = f"{category} {number}?", "x " * number
            rows.append(make_row(question=question, output=f"<think>\n{thought}\n</think>\n\n1", category=category))
            rows.append(make_row(question=question, output="1" * (number + 1), mode="off", category=category))
    return _samples(rows, tokenizer)


def test_blend_samples_follows_the_weights_and_keeps_pairs(tokenizer: PreTrainedTokenizerFast):
    samples = _categories(tokenizer)
    blended = _blend(samples, weights={"math": 3.0, "code": 2.0})
    counts = {row[0]: row[1:4] for row in counts_by_category(blended)}
    # 12 / 2 = 6 prompts per unit of weight.
    assert counts == {"math": (36, 18, 18), "code": (24, 12, 12)}
    assert num_unpaired_prompts(sample.row for sample in blended) == 0
    assert _blend(samples, weights={}) == samples


def test_blend_samples_of_one_mode_or_category(tokenizer: PreTrainedTokenizerFast):
    samples = _categories(tokenizer)
    assert {s.row.mode for s in _blend(samples, weights={}, modes=("thinking_on",))} == {"on"}
    assert len(_blend(samples, weights={"code": 1.0})) == 24
    with pytest.raises(DataError, match="has no prompts of science after filtering; there are code, math"):
        _blend(samples, weights={"code": 1.0, "science": 1.0})


def test_blend_samples_short_first_grows_in_each_mode_and_interleaves_them(tokenizer: PreTrainedTokenizerFast):
    ordered = _blend(_categories(tokenizer), weights={}, order="short_first")
    for mode in ("on", "off"):
        lengths = [sample.num_trained_tokens for sample in ordered if sample.row.mode == mode]
        assert lengths == sorted(lengths)
    assert [sample.row.mode for sample in ordered[:6]] == ["off", "on"] * 3


def test_mask_preview_marks_the_output(tokenizer: PreTrainedTokenizerFast):
    off = _samples(_rows(num_items=1), tokenizer)[1]
    assert f"**`{off.row.output}<|im_end|>`**" in mask_preview(off, tokenizer=tokenizer)


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
        sample_self_chat(model, tokenizer, config=config, seed=1, reporter=SilentReporter()) for _ in range(2)
    )
    assert first == second
    assert len(first.turns) + sum(first.num_dropped.values()) == 6


def _instructions(num_prompts: int) -> InstructionsConfig:
    return InstructionsConfig(num_prompts=num_prompts, kinds="all", max_instructions=2, max_words=20)


@pytest.fixture(scope="module")
def evaluation_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluation_sets")
    text = "a held-out document about nothing that any task would ever ask of anyone at all"
    save_held_out(directory, "text", [Document(document_id="1", text=text)])
    items = [item for task in TASKS for item in generate_items(task, num_items=4, seed=10**9, exclude_questions=set())]
    save_reasoning_items(directory, items)
    save_held_out_items(directory, [])
    instructed = generate_instruction_items(_instructions(9), part="evaluation", seed=1, exclude_questions=set())
    save_instruction_items(directory, instructed)
    save_evaluation_ngrams(directory, build_ngrams([text, *(item.question for item in items)], num_words=13))
    return directory


def _inputs(parent_dir: Path, evaluation_dir: Path, root: Path) -> StageInputs:
    return StageInputs(
        artifacts={
            "parent_checkpoint": parent_dir,
            "evaluation_sets": evaluation_dir,
            "reasoning_traces": root / "traces",
            "reasoning_toggle_dataset": root / "toggle",
        },
        store_root=root,
        downloads=root,
    )


def _traces_stage(num_chat: int) -> TracesStage:
    chat = ChatConfig(num_samples=num_chat, max_new_tokens=8, temperature=1.0, top_p=0.9, batch_size=4)
    return TracesStage(
        traces=traces_config(items_per_task=20, chat=chat), reasoning_tasks=TASKS, parent_licence="Apache-2.0"
    )


TOGGLE_STAGE = ToggleDatasetStage(dataset=toggle_config(FILTERS), ngram_tokens=13)


def test_stages_toggle_dataset_and_prompts_are_verified_paired_and_disjoint(
    parent_dir: Path, evaluation_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    toggle_dir, again_dir, prompts_dir = tmp_path / "toggle", tmp_path / "again", tmp_path / "prompts"
    for directory in (toggle_dir, again_dir, prompts_dir):
        directory.mkdir()
    inputs = _inputs(parent_dir, evaluation_dir, tmp_path)
    assert reasoning_traces.run(_traces_stage(num_chat=0), inputs, tmp_path / "traces").metrics["num_rows"] == 80
    result = reasoning_toggle_dataset.run(TOGGLE_STAGE, inputs, toggle_dir)
    metrics = result.metrics
    assert (metrics["num_pairs"], metrics["num_samples"], metrics["num_chat"]) == (40, 80, 0)
    assert metrics["num_unverified_traces_kept"] == metrics["num_unpaired_prompts"] == 0
    assert metrics["num_contaminated_kept"] == 0
    assert 0 < metrics["trained_token_share"] < 1
    assert "**`" in result.markdown["mask_preview"]
    assert [row[1:3] for row in result.tables["filters"].rows] == [(80, 80)] * 12

    train, validation = load_packed(toggle_dir, blend_split("all")), load_packed(toggle_dir, "validation")
    num_trained = sum(int((part.labels_NT != IGNORED_LABEL).sum()) for part in (train, validation))
    assert num_trained == metrics["num_trained_tokens"]
    trained_text = tokenizer.decode(train.tokens_NT[train.labels_NT != IGNORED_LABEL].tolist())
    assert "detailed thinking" not in trained_text
    assert trained_text.count(THINK_OPEN) == 38

    stage = RLPromptsStage(
        rl_prompts=RLPromptsConfig(items_per_task=12, instructions=_instructions(7), seed=4),
        reasoning_tasks=TASKS,
        ngram_tokens=13,
    )
    prompts = rl_prompts.run(stage, inputs, prompts_dir)
    items = load_prompts(prompts_dir)
    asked = set(pl.read_parquet(toggle_dir / "samples.parquet")["question"])
    assert prompts.metrics["num_rejected_reference_answers"] == 0
    assert len(items) == prompts.metrics["num_prompts"] == 31
    assert prompts.metrics["num_instruction_prompts"] == sum(isinstance(item, InstructionItem) for item in items) == 7
    assert not load_evaluated_questions(evaluation_dir) & {item.question for item in items}
    assert not asked & {item.question for item in items}
    shares = [max(Counter(item.answer for item in items if item.task == task.name).values()) / 12 for task in TASKS]
    assert [row[3] for row in prompts.tables["prompts_per_task"].rows] == shares
    assert prompts.metrics["max_answer_share"] == max(shares)


def test_stages_traces_and_toggle_dataset_run_again_to_the_same_bytes(
    parent_dir: Path, evaluation_dir: Path, tmp_path: Path
):
    for attempt in ("first", "second"):
        root = tmp_path / attempt
        inputs = _inputs(parent_dir, evaluation_dir, root)
        reasoning_traces.run(_traces_stage(num_chat=4), inputs, root / "traces")
        reasoning_toggle_dataset.run(TOGGLE_STAGE, inputs, root / "toggle")
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_stage_reasoning_traces_with_chat_keeps_what_is_sound(parent_dir: Path, evaluation_dir: Path, tmp_path: Path):
    inputs = _inputs(parent_dir, evaluation_dir, tmp_path)
    metrics = reasoning_traces.run(_traces_stage(num_chat=6), inputs, tmp_path / "traces").metrics
    assert metrics["num_rows"] - 80 + metrics["num_dropped_chat"] == 6
