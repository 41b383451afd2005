"""Identity and materialization: what changes a fingerprint, and when a stage is reused, resumed, run or refused."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.artifacts import RESULT, ArtifactStore, RunRecord
from pipeline.errors import ArtifactError, CheckpointError, MissingInputError, StageError
from pipeline.execution import (
    Workspace,
    failed_blocking_check,
    find_artifact,
    materialize,
    open_workspace,
    stage_fingerprint,
)
from pipeline.home import refit_home
from pipeline.model.architecture_files import load_architecture
from pipeline.model.decilm_config import decilm_config
from pipeline.recipe import (
    CorporaConfig,
    EndpointTraces,
    FilePrompts,
    ImportedTraces,
    LmEvalConfig,
    LmEvalTask,
    LocalParent,
    Recipe,
    RewardModelConfig,
)
from pipeline.recipe_file import load_recipe
from pipeline.runtimes import RuntimeMissingError
from pipeline.stage import ExecutionSettings, StageResult
from pipeline.stages.registry import STAGES, get_stage
from tests.dagster.stores import open_tiny, publish, publish_all
from tests.pipeline.data.builders import file_source

PARENT = get_stage("parent_checkpoint")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_tiny(tmp_path)


def test_materialize_runs_then_reuses_without_running(workspace: Workspace):
    lines: list[dict[str, object]] = []

    first = materialize(workspace, PARENT.name, "fused")
    second = materialize(workspace, PARENT.name, "light", on_progress=lines.append)

    assert (first.how, second.how) == ("ran", "reused")
    assert second.artifact.content_hash == first.artifact.content_hash
    assert lines == []
    first.artifact.verify_hashes()


@pytest.mark.parametrize(("left", "how"), [("checkpoints/step-10/weights", "resumed"), ("spec.json", "ran")])
def test_materialize_after_a_stopped_run_says_resumed_where_work_was_saved(workspace: Workspace, left: str, how: str):
    key = stage_fingerprint(workspace, PARENT, "fused")
    saved = workspace.store.directory(PARENT.name, key) / "_work" / left
    saved.parent.mkdir(parents=True)
    saved.touch()

    assert materialize(workspace, PARENT.name, "fused").how == how


def test_materialize_removes_the_work_that_a_kill_left_in_a_finished_artifact(workspace: Workspace):
    made = materialize(workspace, PARENT.name, "fused").artifact
    left = made.path / "_work" / "checkpoints" / "step-10" / "weights"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"two of them in an 8B stage")

    again = materialize(workspace, PARENT.name, "fused")

    assert again.how == "reused"
    assert not (made.path / "_work").exists()
    again.artifact.verify_hashes()


def test_materialize_records_where_the_artifact_comes_from(workspace: Workspace):
    provenance = materialize(workspace, PARENT.name, "fused").artifact.manifest.provenance

    assert provenance["recipe"] == "tiny"
    assert provenance["stage_version"] == PARENT.version
    assert provenance["target"] == ""
    assert provenance["execution.zero_stage"] == "1"


def test_materialize_without_inputs_names_the_asset_to_materialize(workspace: Workspace):
    with pytest.raises(MissingInputError, match=r"SELECT='\*(corpora|parent_checkpoint)'` first"):
        materialize(workspace, "distillation_mix", "fused")


def test_materialize_while_another_makes_it_waits_and_says_for_whom(workspace: Workspace):
    key = stage_fingerprint(workspace, PARENT, "fused")
    heard: list[dict[str, object]] = []

    def stop_waiting(line: dict[str, object]) -> None:
        heard.append(line)
        raise KeyboardInterrupt

    with workspace.store.locked(PARENT.name, key), pytest.raises(KeyboardInterrupt):
        materialize(workspace, PARENT.name, "fused", on_progress=stop_waiting)

    assert heard == [{"note": f"waiting for process {os.getpid()}, which is making {PARENT.name}"}]


def test_materialize_after_a_failed_blocking_check_of_its_input_is_refused(workspace: Workspace):
    materialize(workspace, "corpora", "fused")
    publish(workspace, PARENT, target="fused", num_non_finite_weights=3)
    publish(workspace, get_stage("evaluation_sets"), target="fused")

    with pytest.raises(StageError, match=r"weights_are_finite: num_non_finite_weights is 3, wanted == 0"):
        materialize(workspace, "distillation_mix", "fused")


@pytest.mark.parametrize(
    ("metrics", "failure"),
    [
        ({"final_kl": 0.1}, None),
        ({"final_kl": 9.0}, "policy_stays_near_its_start: final_kl is 9.0"),
        ({}, "policy_stays_near_its_start: final_kl is None"),
        ({"kl_to_teacher": 9.0}, None),
    ],
    ids=["near", "far", "not measured", "distilled"],
)
def test_blocking_check_applies_unless_another_metric_stands_for_its_own(
    tmp_path: Path, metrics: dict[str, float], failure: str | None
):
    store = ArtifactStore(tmp_path)
    store.directory("rl_checkpoint", "f" * 20).mkdir(parents=True)
    result = StageResult(metrics={"num_stops": 0, **metrics})
    artifact = store.publish("rl_checkpoint", "f" * 20, result=result, wall_s=1.0, provenance={})
    found = failed_blocking_check(artifact, load_recipe("tiny"))
    assert found is None if failure is None else found is not None and found.startswith(failure)


def test_materialize_from_an_input_whose_bytes_changed_is_refused(workspace: Workspace):
    corpora = materialize(workspace, "corpora", "fused").artifact
    (file,) = corpora.path.glob("*.parquet")
    file.write_bytes(bytes(reversed(file.read_bytes())))

    with pytest.raises(ArtifactError, match="was changed after it was published"):
        materialize(workspace, "evaluation_sets", "fused")


def test_materialize_of_a_stage_that_fails_in_its_process_gives_its_one_message(workspace: Workspace):
    publish(workspace, PARENT, target="fused")  # no checkpoint in it

    with pytest.raises(
        StageError, match=r"^[^\n]* has no architecture\.json: it is not a checkpoint of this pipeline$"
    ):
        materialize(workspace, "block_profile", "fused")
    assert find_artifact(workspace, "block_profile", "fused") is None


def test_execution_settings_are_not_part_of_identity(workspace: Workspace, tmp_path: Path):
    publish_all(workspace, target="fused")
    settings = ExecutionSettings(num_ranks=8, zero_stage=3, num_threads=2)
    elsewhere = Workspace(
        recipe=workspace.recipe,
        recipe_given="tiny",
        store=workspace.store,
        downloads=tmp_path / "other",
        execution=settings,
    )

    for stage in STAGES:
        assert stage_fingerprint(elsewhere, stage, "fused") == stage_fingerprint(workspace, stage, "fused")


def test_fingerprint_of_shared_stages_is_the_same_for_every_target(workspace: Workspace):
    publish_all(workspace, target="fused")

    for stage in STAGES:
        if not stage.per_target:
            assert stage_fingerprint(workspace, stage, "light") == stage_fingerprint(workspace, stage, "fused")


def test_fingerprint_of_corpora_follows_the_bytes_of_local_files(workspace: Workspace, tmp_path: Path):
    file = tmp_path / "documents.jsonl"
    source = file_source(tmp_path / "*.jsonl")
    mine = open_tiny(tmp_path, recipe=workspace.recipe.model_copy(update={"corpora": CorporaConfig(sources=(source,))}))
    corpora = get_stage("corpora")

    file.write_text('{"text": "one"}\n')
    first = stage_fingerprint(mine, corpora, "fused")
    file.write_text('{"text": "two"}\n')
    second = stage_fingerprint(mine, corpora, "fused")
    file.write_text('{"text": "one"}\n')

    assert first != second
    assert stage_fingerprint(mine, corpora, "fused") == first


def test_fingerprint_of_traces_follows_the_bytes_of_imports_and_prompts(workspace: Workspace, tmp_path: Path):
    imported = ImportedTraces(
        name="mine",
        kind="jsonl",
        path=str(tmp_path / "rows*.jsonl"),
        truth="trusted",
        answer_field=None,
        max_rows=9,
    )
    asked = EndpointTraces(
        name="teacher",
        model="a-model",
        licence="MIT",
        url_variable="URL",
        key_variable=None,
        thinking=True,
        system_prompt=None,
        prompts=FilePrompts(
            kind="jsonl",
            path=str(tmp_path / "prompts.jsonl"),
            question_field="question",
            answer_field=None,
            category="math",
            truth="majority",
        ),
        num_samples=1,
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=9,
        seed=1,
    )
    traces = workspace.recipe.reasoning_traces.model_copy(update={"imports": (imported,), "endpoints": (asked,)})
    mine = open_tiny(tmp_path, recipe=workspace.recipe.model_copy(update={"reasoning_traces": traces}))
    for name in ("parent_checkpoint", "corpora", "evaluation_sets"):
        publish(mine, get_stage(name), target="fused")

    def after(rows: str, prompts: str) -> str:
        (tmp_path / "rows-1.jsonl").write_text(rows)
        (tmp_path / "prompts.jsonl").write_text(prompts)
        return stage_fingerprint(mine, get_stage("reasoning_traces"), "fused")

    first = after("{}", "{}")
    assert len({first, after("{ }", "{}"), after("{}", "{ }")}) == 3
    assert after("{}", "{}") == first


def test_fingerprint_of_reports_follows_what_their_inputs_report_but_not_the_time_they_took(workspace: Workspace):
    artifacts = publish_all(workspace, target="fused")

    def keys() -> dict[str, str]:
        return {stage.name: stage_fingerprint(workspace, stage, "fused") for stage in STAGES}

    def changed(stage_name: str, **values: object) -> list[str]:
        before, path = keys(), artifacts[stage_name].path / RESULT
        record = RunRecord.model_validate_json(path.read_bytes()).model_copy(update=values)
        path.write_text(record.model_dump_json())
        return [name for name, key in keys().items() if key != before[name]]

    other = StageResult(metrics={**artifacts["speed_report"].record.result.metrics, "decode_speedup": math.nan})
    assert changed("speed_report", wall_s=99.0) == []
    assert changed("speed_report", result=other) == ["model_card", "report"]


def test_fingerprint_of_evaluations_follows_the_task_files_and_what_they_read(workspace: Workspace, tmp_path: Path):
    tasks, data = tmp_path / "tasks", tmp_path / "items.jsonl"
    tasks.mkdir()
    task = f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\n"
    asked = LmEvalConfig(
        tasks=(LmEvalTask(name="mine", prompts=("plain",), num_fewshot=None),),
        include_path=str(tasks),
        max_items=None,
        seed=1,
        checkpoints="last",
    )
    evaluation = workspace.recipe.evaluation.model_copy(update={"lm_eval": asked})
    mine = open_tiny(tmp_path, recipe=workspace.recipe.model_copy(update={"evaluation": evaluation}))
    for name in ("parent_checkpoint", "corpora", "evaluation_sets"):
        key = stage_fingerprint(mine, get_stage(name), "fused")
        mine.store.publish(name, key, result=StageResult(), wall_s=0.0, provenance={})

    def after(task_text: str, data_text: str) -> str:
        (tasks / "mine.yaml").write_text(task_text)
        data.write_text(data_text)
        return stage_fingerprint(mine, get_stage("parent_evaluation"), "fused")

    first = after(task, "{}")
    assert len({first, after(f"{task}num_fewshot: 2\n", "{}"), after(task, "{ }"), after("task: [", "{}")}) == 4
    assert after(task, "{}") == first


def test_fingerprint_of_rl_follows_the_bytes_of_the_reward_model(workspace: Workspace, tmp_path: Path):
    publish_all(workspace, target="fused")
    (tmp_path / "judge").mkdir()
    model = RewardModelConfig(path=str(tmp_path / "judge"), weight=1.0, min_score=0.0, max_score=1.0, precision="fp32")
    rl = workspace.recipe.rl.model_copy(update={"reward_model": model})
    judged = open_tiny(tmp_path, recipe=workspace.recipe.model_copy(update={"rl": rl}))
    stage, weights = get_stage("rl_checkpoint"), tmp_path / "judge" / "model.safetensors"
    found = []
    for content in (b"one", b"two", b"one"):
        weights.write_bytes(content)
        found.append(stage_fingerprint(judged, stage, "fused"))
    assert found[0] == found[2] != found[1]


def test_open_workspace_puts_all_state_below_refit_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REFIT_HOME", str(tmp_path))
    monkeypatch.setenv("RECIPE", "tiny")
    monkeypatch.delenv("REFIT_EXECUTION", raising=False)

    workspace = open_workspace()

    assert refit_home() == tmp_path
    assert workspace.recipe == load_recipe("tiny")
    assert workspace.store.root == tmp_path / "store"
    assert workspace.downloads == tmp_path / "downloads"


def test_parent_whose_layers_differ_is_refused_before_anything_runs(workspace: Workspace, tmp_path: Path):
    child = load_architecture("llama-3.3-nemotron-super-49b")
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "config.json").write_text(json.dumps(decilm_config(child, torch_dtype="bfloat16")))
    parent = LocalParent(kind="local", path=str(tmp_path / "child"), licence="test")
    other = replace(workspace, recipe=workspace.recipe.model_copy(update={"parent": parent}))
    for stage_name in ("corpora", "parent_checkpoint"):
        with pytest.raises(CheckpointError, match=r"layer 1 is kv8\+ffn28672 .* a parent must have equal layers"):
            materialize(other, stage_name, "fused")
    assert not list(other.store.root.glob("*/*"))


def test_fingerprint_of_a_local_parent_reads_the_weights_of_its_subblocks(workspace: Workspace, tmp_path: Path):
    shard = tmp_path / "anymodel" / "subblocks_safetensors" / "block_0_ffn.safetensors"
    shard.parent.mkdir(parents=True)
    parent = LocalParent(kind="local", path=str(tmp_path / "anymodel"), licence="test")
    other = replace(workspace, recipe=workspace.recipe.model_copy(update={"parent": parent}))
    shard.write_bytes(b"some weights")
    before = stage_fingerprint(other, PARENT, "fused")
    shard.write_bytes(b"other weights")
    assert stage_fingerprint(other, PARENT, "fused") != before


def _timed_in_vllm(recipe: Recipe) -> Recipe:
    profile = recipe.block_profile.model_copy(update={"backend": "vllm"})
    return recipe.model_copy(update={"block_profile": profile})


def test_artifact_measured_in_a_runtime_that_is_not_installed_is_not_found(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REFIT_RUNTIMES", str(tmp_path / "none"))
    publish_all(workspace, target="fused")
    asking = replace(workspace, recipe=_timed_in_vllm(workspace.recipe))

    with pytest.raises(RuntimeMissingError, match="make install-vllm"):
        stage_fingerprint(asking, get_stage("block_profile"), "fused")
    assert find_artifact(asking, "block_profile", "fused") is None
    assert find_artifact(asking, "mip_solution", "fused") is None  # it reads the profile
    assert find_artifact(asking, "block_scores", "fused") is not None
