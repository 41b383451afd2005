"""What stages read from outside the store: paths as their readers take them, and those with nothing behind them."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.environment import local_files, missing_paths
from pipeline.recipe import CorporaConfig, DatasetSource, EndpointTraces, ImportedTraces
from pipeline.recipe_file import load_recipe
from pipeline.stages.configs import CorporaStage, TracesStage
from pipeline.stages.registry import get_stage


def traces(**changes: Any) -> TracesStage:
    recipe = load_recipe("tiny")
    config = get_stage("reasoning_traces").config(recipe, recipe.default_target)
    assert isinstance(config, TracesStage)
    return config.model_copy(update={"traces": config.traces.model_copy(update=changes)})


def asked(path: Path) -> EndpointTraces:
    return EndpointTraces.model_validate(
        {
            "name": "thinker",
            "model": "m",
            "licence": "MIT",
            "url_variable": "URL",
            "key_variable": None,
            "thinking": True,
            "system_prompt": None,
            "prompts": {
                "kind": "jsonl",
                "path": str(path),
                "question_field": "q",
                "answer_field": None,
                "category": "math",
                "truth": "majority",
            },
            "num_samples": 1,
            "temperature": 0.6,
            "top_p": 0.95,
            "max_new_tokens": 8,
            "seed": 1,
        }
    )


@pytest.mark.parametrize("name", ["questions.jsonl", "q[1].jsonl"])
def test_prompts_of_an_endpoint_are_one_file_by_its_very_name(tmp_path: Path, name: str):
    config = traces(endpoints=(asked(tmp_path / name),))
    assert missing_paths(config) == [f"reasoning_traces.endpoints thinker, prompts.path {tmp_path / name}"]
    (tmp_path / name).touch()
    assert missing_paths(config) == []
    assert local_files(config) == [tmp_path / name]


def test_imports_are_patterns(tmp_path: Path):
    rows = ImportedTraces(
        name="mine", kind="jsonl", path=str(tmp_path / "r*.jsonl"), truth="trusted", answer_field=None, max_rows=9
    )
    config = traces(imports=(rows,))
    assert missing_paths(config) == [f"reasoning_traces.imports mine, path {tmp_path}/r*.jsonl"]
    for name in ("r2.jsonl", "r1.jsonl"):
        (tmp_path / name).touch()
    assert missing_paths(config) == []
    assert [file.name for file in local_files(config)] == ["r1.jsonl", "r2.jsonl"]


@pytest.mark.parametrize(("revision", "is_told"), [(None, True), ("0" * 40, False)])
def test_a_data_set_of_the_hub_is_no_path(tmp_path: Path, revision: str | None, is_told: bool):
    source = DatasetSource(
        kind="datasets",
        name="mine",
        domain="web",
        licence="mine",
        path=str(tmp_path / "saved"),
        revision=revision,
        config_name=None,
        split="train",
        text_field="text",
        max_documents=5,
    )
    found = missing_paths(CorporaStage(corpora=CorporaConfig(sources=(source,))))
    assert found == ([f"corpora.sources mine, path {tmp_path}/saved"] if is_told else [])
