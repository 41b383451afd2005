"""Data that is empty, broken, or not what the recipe says it is."""

import copy
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from pipeline.cli import main
from pipeline.data.packed import IGNORED_LABEL, PackedTokens
from pipeline.errors import DataError
from pipeline.training.validation import require_masked
from tests.bad_input.command import TINY, refused, write_recipe

GOOD_LINE = json.dumps({"text": "One good document."}) + "\n"
LICENCE = {"licence": "none", "domain": "web", "max_documents": 100}


def jsonl(path: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "jsonl", "name": "mine", "path": path, "text_field": "text", **LICENCE, **changes}


def saved(path: str, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "datasets",
        "name": "mine",
        "path": path,
        "revision": None,
        "config_name": None,
        "split": "train",
        "text_field": "text",
        **LICENCE,
        **changes,
    }


FILES: dict[str, tuple[bytes, list[str]]] = {
    "field missing": (b'{"body": "x"}\n', ["no field 'text'", "body"]),
    "text that is a number": (b'{"text": 5}\n', ["text in", "int"]),
    "text that is null": (b'{"text": null}\n', ["text in", "NoneType"]),
    "broken line": (GOOD_LINE.encode() + b'{"text": \n', ["line 2", "not JSON"]),
    "row that is a list": (b'["text"]\n', ["mine"]),
    "not UTF-8": (b'{"text": "caf\xe9"}\n', ["data.jsonl", "UTF-8"]),
}


def run_corpora(
    source: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    sources = [*copy.deepcopy(TINY["corpora"]["sources"]), source]
    recipe = write_recipe(tmp_path, {"corpora.sources": sources})
    arguments = ["materialize", "--recipe", str(recipe), "corpora"]
    return refused(arguments, tmp_path=tmp_path, monkeypatch=monkeypatch, capsys=capsys, stage_name="corpora")


@pytest.mark.parametrize("name", FILES)
def test_jsonl_file_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    data, wanted = FILES[name]
    (tmp_path / "data.jsonl").write_bytes(data)
    message = run_corpora(jsonl(str(tmp_path / "data.jsonl")), tmp_path, monkeypatch, capsys)
    assert all(text in message for text in wanted), message


@pytest.mark.parametrize("data", [b"", b'{"text": ""}\n{"text": "  "}\n'], ids=["no line", "empty texts"])
def test_source_without_a_document_stops_every_reader(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "data.jsonl").write_bytes(data)
    sources = [*copy.deepcopy(TINY["corpora"]["sources"]), jsonl(str(tmp_path / "data.jsonl"))]
    recipe = write_recipe(tmp_path, {"corpora.sources": sources})
    monkeypatch.setenv("REFIT_HOME", str(tmp_path / "home"))
    main(["materialize", "--recipe", str(recipe), "corpora"])
    message = refused(
        ["materialize", "--recipe", str(recipe), "evaluation_sets"],
        tmp_path=tmp_path,
        monkeypatch=monkeypatch,
        capsys=capsys,
        stage_name="evaluation_sets",
    )
    assert "corpora failed its blocking check every_source_has_documents: min_documents_per_source is 0" in message


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("glob of nothing", ["no file matches", "nothing-*.jsonl"]),
        ("parquet that is none", ["cannot read column 'text'", "data.parquet"]),
        ("parquet without the column", ["cannot read column 'text'", "data.parquet"]),
        ("directory that is not there", ["elsewhere"]),
        ("directory with a script", ["script-set"]),
        ("hub id without a commit", ["some/set", "revision"]),
    ],
)
def test_source_is_refused(
    name: str, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    parquet = tmp_path / "data.parquet"
    if name == "parquet that is none":
        parquet.write_bytes(b"PAR1 but not really")
    elif name == "parquet without the column":
        pl.DataFrame({"body": ["x"]}).write_parquet(parquet)
    script = tmp_path / "script-set"
    script.mkdir()
    (script / "script-set.py").write_text("open('canary-was-run', 'w')\n", encoding="utf-8")
    sources = {
        "glob of nothing": jsonl(str(tmp_path / "nothing-*.jsonl")),
        "parquet that is none": jsonl(str(parquet), kind="parquet"),
        "parquet without the column": jsonl(str(parquet), kind="parquet"),
        "directory that is not there": saved(str(tmp_path / "elsewhere")),
        "directory with a script": saved(str(script)),
        "hub id without a commit": saved("some/set"),
    }
    message = run_corpora(sources[name], tmp_path, monkeypatch, capsys)
    assert all(text in message for text in wanted), message


@pytest.mark.parametrize(
    ("changes", "stage_name", "wanted"),
    [
        (
            {"distillation_mix.tokens": 10**9, "distillation_mix.validation_tokens": 2048},
            "distillation_mix",
            ["1,000,000,000", "raise max_documents"],
        ),
        ({"distillation_mix.validation_tokens": 10**8}, "distillation_mix", ["validation part wants", "lower"]),
        ({"evaluation_sets.held_out.0.num_documents": 128}, "distillation_mix", ["hold 0 in their validation"]),
        ({"evaluation_sets.held_out.0.num_documents": 5000}, "evaluation_sets", ["5,000"]),
    ],
)
def test_mixture_that_runs_dry_is_refused(
    changes: dict[str, Any],
    stage_name: str,
    wanted: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    recipe = write_recipe(tmp_path, changes)
    monkeypatch.setenv("REFIT_HOME", str(tmp_path / "home"))
    for name in ("parent_checkpoint", "corpora", "evaluation_sets"):
        if name != stage_name:
            main(["materialize", "--recipe", str(recipe), name])
    message = refused(
        ["materialize", "--recipe", str(recipe), stage_name],
        tmp_path=tmp_path,
        monkeypatch=monkeypatch,
        capsys=capsys,
        stage_name=stage_name,
    )
    assert all(text in message for text in wanted), message


def test_samples_of_which_nothing_is_trained_are_refused():
    tokens_NT = torch.zeros(2, 8, dtype=torch.long)
    masked = PackedTokens(
        tokens_NT=tokens_NT, labels_NT=torch.full_like(tokens_NT, IGNORED_LABEL), position_ids_NT=tokens_NT
    )
    with pytest.raises(DataError, match="toggle set"):
        require_masked(masked, what="toggle set")
