"""Reinforcement learning on instructions and on a reward model: rewards that rise by learning alone, and refusals."""

import string
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from pipeline.data.chat import end_of_turn_id, generation_prompt_ids, reasoning_messages, render_chat
from pipeline.data.instruction_items import InstructionItem, generate_instruction_items
from pipeline.data.reasoning_items import generate_items
from pipeline.errors import CheckpointError, DataError
from pipeline.model.checkpoint import TensorReader, load_model, load_tokenizer, read_architecture, save_checkpoint
from pipeline.reasoning.held_out import split_held_out
from pipeline.reasoning.prompts import RLItem, kind_of, load_prompts
from pipeline.reasoning.reward_model import RewardModel
from pipeline.recipe import (
    RLOO,
    RPO,
    HeldOutRewardConfig,
    InstructionKind,
    InstructionsConfig,
    ReasoningTask,
    RewardModelConfig,
    RLAlgorithm,
    RLConfig,
)
from pipeline.stages import rl_checkpoint
from tests.pipeline.reasoning.rl_builders import CONFIG, rl_artifacts, rl_inputs

CPU = torch.device("cpu")
RLOO_ALGORITHM = RLOO(kind="rloo", kl_weight=0.0)
ONLINE_RPO = RPO(kind="rpo", divergence="squared", beta=0.2, reward_scale=3.0, online=True)


def _instructed(num_prompts: int, *kinds: InstructionKind) -> list[InstructionItem]:
    config = InstructionsConfig(num_prompts=num_prompts, kinds=kinds, max_instructions=1, max_words=4)
    return generate_instruction_items(config, part="training", seed=1, exclude_questions=set())


def _learning(algorithm: RLAlgorithm, **changes: object) -> RLConfig:
    """Replies of a few tokens, no thought, no pay for form; 48 prompts are watched and not trained on."""
    return CONFIG.model_copy(
        update={
            "algorithm": algorithm,
            "steps": 32,
            "prompts_per_step": 8,
            "samples_per_prompt": 8,
            "max_new_tokens": 8,
            "share_thinking_on": 0.0,
            "updates_per_rollout": 1,
            "format_reward": 0.0,
            "held_out": HeldOutRewardConfig(num_prompts=48, interval_steps=100),
            "optimizer": CONFIG.optimizer.model_copy(update={"learning_rate": 3e-3}),
            **changes,
        }
    )


def _write_letters_and_end(sft_dir: Path, *, parent_dir: Path, question: str) -> None:
    """Save a policy that ends nearly every reply within a few letters, lowercase or not: ending is not what it lacks.

    What a final hidden state has in common with all others is added to the output rows of letters and end of turn.
    """
    tokenizer, model = load_tokenizer(parent_dir), load_model(parent_dir, dtype=torch.float32)
    prompt_ids = generation_prompt_ids(tokenizer, reasoning_messages(question, thinking=False))
    with torch.no_grad():
        mean_D = model.model(input_ids=torch.tensor([prompt_ids])).last_hidden_state[0].mean(dim=0)
    tensors = dict(TensorReader(parent_dir))
    rows_VD = tensors["model.embed_tokens.weight"]
    for letter in string.ascii_letters:
        rows_VD[tokenizer.encode(letter, add_special_tokens=False)[0]] += 3.0 * mean_D / mean_D.norm() ** 2
    rows_VD[end_of_turn_id(tokenizer)] += 5.5 * mean_D / mean_D.norm() ** 2
    save_checkpoint(sft_dir, architecture=read_architecture(parent_dir), tensors=tensors, tokenizer_dir=parent_dir)


@pytest.mark.parametrize("algorithm", [RLOO_ALGORITHM, ONLINE_RPO], ids=["rloo", "rpo"])
def test_rl_checkpoint_learns_to_follow_an_instruction_on_requests_it_never_saw(
    parent_dir: Path, tmp_path: Path, algorithm: RLAlgorithm
):
    items = _instructed(80, "all_lowercase")
    artifacts = rl_artifacts(tmp_path / "in", parent_dir=parent_dir, items=items)
    artifacts["sft_checkpoint"] = tmp_path / "sft"
    _write_letters_and_end(tmp_path / "sft", parent_dir=parent_dir, question=items[0].question)
    result = rl_checkpoint.run(
        _learning(algorithm),
        rl_inputs(artifacts, micro_batch_size=64, checkpoint_interval_steps=100),
        tmp_path / "out",
    )
    # The same 48 requests, drawn with the same random numbers: only the weights differ. 0.29 to 0.96 and 0.75 here.
    first, last = result.metrics["held_out_reward_first"], result.metrics["held_out_reward_last"]
    assert 0.1 < first < 0.5
    assert last > first + 0.3
    truncation = pl.read_parquet(tmp_path / "out" / "curve.parquet")["truncation_rate"]
    assert max(truncation[0], truncation[-1]) < 0.1
    assert "held_out" not in result.tables


@pytest.fixture(scope="module")
def mixed() -> list[RLItem]:
    task = ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    tasks: Sequence[RLItem] = generate_items(task, num_items=12, seed=4, exclude_questions=set())
    return [*tasks, *_instructed(6, "all_lowercase", "no_commas")]


def test_rl_checkpoint_watches_each_kind_of_prompt_apart(parent_dir: Path, mixed: list[RLItem], tmp_path: Path):
    artifacts = rl_artifacts(tmp_path / "in", parent_dir=parent_dir, items=mixed)
    assert load_prompts(artifacts["rl_prompts"]) == mixed
    config = CONFIG.model_copy(update={"steps": 2, "held_out": HeldOutRewardConfig(num_prompts=6, interval_steps=1)})
    result = rl_checkpoint.run(config, rl_inputs(artifacts), tmp_path / "out")
    curve = pl.read_parquet(tmp_path / "out" / "curve.parquet")
    for measure in ("held_out_reward", "held_out_accuracy"):
        parts = (4 * curve[f"{measure}_tasks"] + 2 * curve[f"{measure}_instructions"]) / 6
        assert parts.to_list() == pytest.approx(curve[measure].to_list())
    table = result.tables["held_out"]
    assert [row[0] for row in table.rows] == ["instructions", "tasks"]
    assert table.rows[0][1] == curve["held_out_reward_instructions"][0]
    (instructions, tasks), last = (row[2] for row in table.rows), result.metrics["held_out_reward_last"]
    assert isinstance(instructions, float)
    assert isinstance(tasks, float)
    assert (2 * instructions + 4 * tasks) / 6 == pytest.approx(last)
    assert {"chain_sum", "instructions"} >= set(pl.read_parquet(tmp_path / "out" / "rollout_samples.parquet")["task"])


def test_split_held_out_takes_the_same_share_of_every_kind(mixed: list[RLItem]):
    config = CONFIG.model_copy(update={"held_out": HeldOutRewardConfig(num_prompts=6, interval_steps=1)})
    trained, held_out = split_held_out(mixed, config=config)
    assert [kind_of(item) for item in held_out] == ["tasks"] * 4 + ["instructions"] * 2
    assert {item.question for item in trained} == {item.question for item in mixed} - {
        item.question for item in held_out
    }
    few = CONFIG.model_copy(update={"held_out": HeldOutRewardConfig(num_prompts=1, interval_steps=1)})
    with pytest.raises(DataError, match=r"num_prompts is 1, and there are prompts of 2 kinds \(instructions, tasks\)"):
        split_held_out(mixed, config=few)


def _save_reward_model(directory: Path, tokenizer: PreTrainedTokenizerFast, *, num_labels: int = 1) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=400,
        initializer_range=0.3,
        num_labels=num_labels,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _reward_config(path: Path, *, weight: float = 1.0, low: float = -100.0, high: float = 100.0) -> RewardModelConfig:
    return RewardModelConfig(path=str(path), weight=weight, min_score=low, max_score=high, precision="fp32")


@pytest.fixture(scope="module")
def reward_dir(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_reward_model(tmp_path_factory.mktemp("reward"), tokenizer)


PAIRS = [
    ("What is snow?", "cold"),
    ("Hi", "Snow falls in winter and melts in spring."),
    ("Hi", "so"),
    ("Hi", "no " * 9),
]


def test_reward_model_scores_each_conversation_as_if_alone(reward_dir: Path, tokenizer: PreTrainedTokenizerFast):
    model = LlamaForSequenceClassification.from_pretrained(reward_dir).eval()
    alone: list[float] = []
    for request, answer in PAIRS:
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        with torch.no_grad():
            alone.append(model(input_ids=torch.tensor([render_chat(tokenizer, turns)])).logits.item())
    assert max(alone) - min(alone) > 0.1
    wide = RewardModel(_reward_config(reward_dir), device=CPU).rewards(PAIRS)
    assert wide == pytest.approx([score + 100.0 for score in alone], abs=1e-4)
    low, high = sorted(alone)[1:3]
    narrow = RewardModel(_reward_config(reward_dir, weight=0.5, low=low, high=high), device=CPU).rewards(PAIRS)
    assert narrow == pytest.approx([0.5 * (min(max(score, low), high) - low) for score in alone], abs=1e-4)


def test_reward_model_pays_nothing_for_no_answer_or_one_that_fakes_a_turn(
    reward_dir: Path, tokenizer: PreTrainedTokenizerFast
):
    fake = f"so{tokenizer.eos_token}"
    assert RewardModel(_reward_config(reward_dir), device=CPU).rewards([("Hi", ""), ("Hi", fake)]) == [0.0, 0.0]


def test_reward_model_that_cannot_be_one_is_refused(
    reward_dir: Path, parent_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    with pytest.raises(DataError, match=r"tokens for rl\.reward_model, which reads 400: lower"):
        RewardModel(_reward_config(reward_dir), device=CPU).rewards([("Hi", "so it is " * 60)])
    two = _save_reward_model(tmp_path / "two", tokenizer, num_labels=2)
    with pytest.raises(CheckpointError, match="has 2 outputs"):
        RewardModel(_reward_config(two), device=CPU)
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        RewardModel(_reward_config(tmp_path), device=CPU)
    headless = _save_reward_model(tmp_path / "headless", tokenizer)
    LlamaForSequenceClassification.from_pretrained(headless).model.save_pretrained(headless)
    with pytest.raises(CheckpointError, match=r"lacks the tensors \['score.weight'\]"):
        RewardModel(_reward_config(headless), device=CPU)


def test_rl_checkpoint_pays_what_the_reward_model_says_to_replies_that_end(
    parent_dir: Path, reward_dir: Path, mixed: list[RLItem], tmp_path: Path
):
    artifacts = rl_artifacts(tmp_path / "in", parent_dir=parent_dir, items=mixed)
    config = _learning(
        RPO(kind="rpo", divergence="squared", beta=0.1, reward_scale=3.0, online=False),
        steps=2,
        accuracy_reward=0.0,
        reward_model=_reward_config(reward_dir, weight=0.25, low=-2.0, high=2.0),
        held_out=HeldOutRewardConfig(num_prompts=2, interval_steps=1),
    )
    rl_checkpoint.run(config, rl_inputs(artifacts), tmp_path / "out")
    curve = pl.read_parquet(tmp_path / "out" / "curve.parquet")
    assert curve["model_reward"].to_list() == pytest.approx(curve["reward"].to_list())
    assert all(0 < reward < 1 for reward in curve["model_reward"])
    assert all(norm > 0 for norm in curve["grad_norm"])
    samples = pl.read_parquet(tmp_path / "out" / "rollout_samples.parquet")
    assert samples.filter(~pl.col("is_terminated"))["reward"].sum() == 0
    assert samples.filter(pl.col("is_terminated"))["reward"].max() > 0
