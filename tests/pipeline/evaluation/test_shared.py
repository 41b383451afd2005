"""Evaluations are made once per (checkpoint, parent, sets, configuration); equal checkpoints share theirs."""

import shutil
from pathlib import Path

import pytest

from pipeline.artifacts import ArtifactStore
from pipeline.data.benchmarks import MultipleChoiceItem
from pipeline.data.documents import Document
from pipeline.data.evaluation_sets import (
    save_held_out,
    save_held_out_items,
    save_instruction_items,
    save_multiple_choice,
    save_reasoning_items,
)
from pipeline.data.instruction_items import generate_instruction_items
from pipeline.data.reasoning_items import generate_items
from pipeline.errors import ArtifactError, CheckpointError
from pipeline.evaluation.results import read_evaluations
from pipeline.evaluation.shared import ASSET, checkpoint_key
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.recipe import EvaluationConfig, InstructionsConfig, ReasoningTask, SampledConfig
from pipeline.stage import StageInputs, StageResult
from pipeline.stages import evaluation, parent_evaluation
from pipeline.stages.configs import EvaluationStage

CONFIG = EvaluationStage(
    evaluation=EvaluationConfig(
        robustness_items=1,
        sampled=SampledConfig(num_items=2, num_samples=2, temperature=0.6, top_p=0.95),
        sequence_length=32,
        text_tokens_per_set=128,
        batch_size=4,
        max_new_tokens_on=6,
        max_new_tokens_off=4,
        precision="fp32",
    )
)
TASK = ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
INSTRUCTED = generate_instruction_items(
    InstructionsConfig(num_prompts=3, kinds="all", max_instructions=2, max_words=10),
    part="evaluation",
    seed=1,
    exclude_questions=frozenset(),
)
OTHER_TASK = ReasoningTask(name="count_bits", config={"max_n": 15})


def _publish(store: ArtifactStore, asset: str, fingerprint: str = "f00") -> Path:
    result = StageResult()
    return store.publish(asset, fingerprint, result=result, wall_s=1.0, provenance={}).path


@pytest.fixture
def artifacts(tmp_path: Path, parent_dir: Path, other: HeterogeneousLlamaForCausalLM) -> dict[str, Path]:
    store = ArtifactStore(tmp_path)
    shutil.copytree(parent_dir, store.directory("parent_checkpoint", "f00"))
    sets_dir = store.directory("evaluation_sets", "f00")
    save_held_out(
        sets_dir, "prose", [Document(document_id=str(n), text=f"Sentence {n} of a text. " * 4) for n in range(4)]
    )
    save_multiple_choice(sets_dir, "quiz", [MultipleChoiceItem(prompt="1 + 1 =", choices=("2", "three"), gold=0)])
    save_reasoning_items(sets_dir, generate_items(TASK, num_items=3, seed=5, exclude_questions=frozenset()))
    save_held_out_items(sets_dir, generate_items(OTHER_TASK, num_items=2, seed=5, exclude_questions=frozenset()))
    save_instruction_items(sets_dir, INSTRUCTED)
    for name in ("child", "fused", "kd", "cpt", "sft", "rl"):
        directory = store.directory(f"{name}_checkpoint", "f00")
        save_checkpoint(
            directory, architecture=other.architecture, tensors=other.state_dict(), tokenizer_dir=parent_dir
        )
        (directory / "notes.json").write_text(f'"{name}"')  # artifacts differ, checkpoints do not
    names = ("parent", "child", "fused", "kd", "cpt", "sft", "rl")
    found = {f"{name}_checkpoint": _publish(store, f"{name}_checkpoint") for name in names}
    found["evaluation_sets"] = _publish(store, "evaluation_sets")
    return found


def _run_both(artifacts: dict[str, Path], root: Path) -> StageResult:
    inputs = StageInputs(artifacts=artifacts, store_root=root, downloads=root)
    parent_out = root / "parent_evaluation" / "f00"
    parent_out.mkdir(parents=True, exist_ok=True)
    parent_evaluation.run(CONFIG, inputs, parent_out)
    out_dir = root / "evaluation" / "f00"
    out_dir.mkdir(parents=True, exist_ok=True)
    given = {**artifacts, "parent_evaluation": parent_out}
    return evaluation.run(CONFIG, StageInputs(artifacts=given, store_root=root, downloads=root), out_dir)


def _evaluated(root: Path) -> set[str]:
    return {path.name for path in (root / ASSET).iterdir() if path.is_dir()}


def test_evaluation_measures_each_distinct_checkpoint_once(artifacts: dict[str, Path], tmp_path: Path) -> None:
    result = _run_both(artifacts, tmp_path)
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
    _run_both(artifacts, tmp_path)
    before = _evaluated(tmp_path)
    store = ArtifactStore(tmp_path)
    changed = {name: tensor * 1.01 for name, tensor in parent.state_dict().items()}
    save_checkpoint(
        store.directory("kd_checkpoint", "f01"),
        architecture=parent.architecture,
        tensors=changed,
        tokenizer_dir=artifacts["parent_checkpoint"],
    )
    _run_both({**artifacts, "kd_checkpoint": _publish(store, "kd_checkpoint", "f01")}, tmp_path)
    assert len(_evaluated(tmp_path) - before) == 1


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
        _run_both({**artifacts, "kd_checkpoint": _publish(store, "kd_checkpoint", "f02")}, tmp_path)


def test_evaluation_of_an_unpublished_checkpoint_is_refused(artifacts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        _run_both({**artifacts, "child_checkpoint": tmp_path}, tmp_path)
