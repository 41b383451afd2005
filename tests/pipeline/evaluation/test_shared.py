"""Evaluations are made once per (checkpoint, parent, sets, configuration); equal checkpoints share theirs."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.artifacts import ArtifactStore
from pipeline.errors import ArtifactError, CheckpointError
from pipeline.evaluation.results import read_evaluations
from pipeline.evaluation.shared import ASSET, checkpoint_key
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from tests.pipeline.evaluation.stages import FinishedMeanwhile, publish, run_both


def _evaluated(root: Path) -> set[str]:
    return {path.name for path in (root / ASSET).iterdir() if path.is_dir()}


def test_evaluation_measures_each_distinct_checkpoint_once(artifacts: dict[str, Path], tmp_path: Path) -> None:
    result = run_both(artifacts, tmp_path)
    assert len(_evaluated(tmp_path)) == 2  # the parent, and the one model that all six checkpoints are
    assert result.metrics["parent_kl"] == 0.0
    assert result.metrics["child_kl"] > 0.0
    assert result.metrics["rl_perplexity"] == result.metrics["child_perplexity"]
    assert {
        "rl_toggle_compliance_on",
        "rl_toggle_compliance_off",
        "rl_accuracy_on",
        "rl_exact_reply_off",
    } <= result.metrics.keys()
    evaluations = read_evaluations(tmp_path / "evaluation" / "f00")
    assert list(evaluations) == ["parent", "child", "fused", "kd", "cpt", "sft", "rl"]
    final = evaluations["rl"]
    assert final.text_overall.num_tokens == 128
    assert final.thinking_on.answer_found.num_samples == 3
    assert final.samples[0].question


def test_evaluation_new_kd_measures_that_checkpoint_only(
    artifacts: dict[str, Path], tmp_path: Path, parent: HeterogeneousLlamaForCausalLM
) -> None:
    run_both(artifacts, tmp_path)
    before = _evaluated(tmp_path)
    store = ArtifactStore(tmp_path)
    changed = {name: tensor * 1.01 for name, tensor in parent.state_dict().items()}
    save_checkpoint(
        store.directory("kd_checkpoint", "f01"),
        architecture=parent.architecture,
        tensors=changed,
        tokenizer_dir=artifacts["parent_checkpoint"],
    )
    run_both({**artifacts, "kd_checkpoint": publish(store, "kd_checkpoint", "f01")}, tmp_path)
    assert len(_evaluated(tmp_path) - before) == 1


def test_evaluation_that_another_process_makes_meanwhile_is_taken_and_left_as_it_is(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    run_both(artifacts, tmp_path)
    path = min(path for path in (tmp_path / ASSET).iterdir() if path.is_dir())
    before = {file: file.stat().st_ino for file in path.iterdir()}

    with FinishedMeanwhile(path) as reporter:
        run_both(artifacts, tmp_path, reporter=reporter)

    waits = [message for message in reporter.heard if message.startswith("waiting for process")]
    assert waits == [f"waiting for process {os.getpid()}, which is making {ASSET}"]
    assert {file: file.stat().st_ino for file in path.iterdir()} == before


def test_checkpoint_key_ignores_what_is_not_the_model(artifacts: dict[str, Path]) -> None:
    keys = {checkpoint_key(artifacts[f"{name}_checkpoint"]) for name in ("child", "fused", "kd", "rl")}
    assert len(keys) == 1
    assert checkpoint_key(artifacts["parent_checkpoint"]) not in keys


def test_evaluation_refuses_another_tokenizer(artifacts: dict[str, Path], tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    directory = store.directory("kd_checkpoint", "f02")
    shutil.copytree(artifacts["kd_checkpoint"], directory)
    template = directory / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(CheckpointError, match="different tokenizer files"):
        run_both({**artifacts, "kd_checkpoint": publish(store, "kd_checkpoint", "f02")}, tmp_path)


def test_evaluation_of_an_unpublished_checkpoint_is_refused(artifacts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        run_both({**artifacts, "child_checkpoint": tmp_path}, tmp_path)
