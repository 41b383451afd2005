"""What reinforcement learning shows while it trains: one completion every so many steps, as a line for people."""

from pathlib import Path

import polars as pl
import pytest

from pipeline.data.reasoning_items import generate_items
from pipeline.reasoning.rl import sample_text
from pipeline.recipe import ReasoningTask
from pipeline.stages import rl_checkpoint
from tests.pipeline.reasoning.rl_builders import CONFIG, rl_artifacts, rl_inputs
from tests.pipeline.reporters import NotingReporter


def test_sample_text_is_one_line_of_question_reply_answer_and_reward():
    sample = {
        "step": 11,
        "task": "chain_sum",
        "mode": "on",
        "question": " What is\n2 + 3? ",
        "completion": "<think>\nfive\n</think>\n\n5",
        "answer": "5",
        "reward": 1.2,
    }
    assert sample_text(sample) == (
        "step 11, chain_sum, thinking on: What is 2 + 3? -> <think> five </think> 5 (wanted 5, reward 1.2)"
    )


@pytest.mark.parametrize(("interval", "shown"), [(1, [1, 2, 3, 4]), (3, [1, 4]), (10, [1])])
def test_rl_checkpoint_stage_shows_a_completion_of_every_interval(
    parent_dir: Path, tmp_path: Path, interval: int, shown: list[int]
):
    task = ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    items = generate_items(task, num_items=6, seed=4, exclude_questions=set())
    config = CONFIG.model_copy(
        update={
            "steps": 4,
            "prompts_per_step": 2,
            "samples_per_prompt": 2,
            "max_new_tokens": 6,
            "updates_per_rollout": 1,
        }
    )
    reporter = NotingReporter()
    artifacts = rl_artifacts(tmp_path / "in", parent_dir=parent_dir, items=items)
    inputs = rl_inputs(artifacts, reporter=reporter, sample_interval_steps=interval)
    rl_checkpoint.run(config, inputs, tmp_path / "out")
    # Of each step the file keeps some; the last of them is shown.
    kept = {row["step"]: row for row in pl.read_parquet(tmp_path / "out" / "rollout_samples.parquet").to_dicts()}
    notes = [note for note in reporter.notes if note.startswith("step ")]
    assert notes == [sample_text(kept[step]) for step in shown]
    assert [note.partition(",")[0] for note in notes] == [f"step {step}" for step in shown]
