"""What the UI is given of an outcome: numbers, texts, tables, pictures, and what every check compared."""

import base64
import math
from pathlib import Path

import dagster as dg
import pytest

from assets.metadata import MAX_FIGURE_BYTES, MAX_TABLE_ROWS, outcome_metadata
from assets.stage_asset import describe_outcome
from pipeline.artifacts import ArtifactStore
from pipeline.execution import Outcome
from pipeline.recipe_file import load_recipe
from pipeline.stage import StageResult, Table
from pipeline.stages.registry import get_stage
from tests.dagster.stores import open_tiny, publish

SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"


def _outcome(root: Path, result: StageResult, *, svg: bytes = SVG) -> Outcome:
    store = ArtifactStore(root)
    view = store.directory("corpora", "f" * 20) / "view"
    view.mkdir(parents=True)
    (view / "curve.svg").write_bytes(svg)
    artifact = store.publish("corpora", "f" * 20, result=result, wall_s=2.5, provenance={})
    return Outcome(artifact=artifact, how="resumed")


def test_metadata_says_how_where_and_how_long(tmp_path: Path):
    metadata = outcome_metadata(_outcome(tmp_path, StageResult()))

    assert metadata["how"] == dg.MetadataValue.text("resumed")
    assert metadata["path"] == dg.MetadataValue.path(str(tmp_path / "corpora" / ("f" * 20)))
    assert metadata["wall_s"] == dg.MetadataValue.float(2.5)


def test_metadata_keeps_integers_and_floats_and_spells_out_what_json_cannot_hold(tmp_path: Path):
    result = StageResult(metrics={"num_tokens": 2**40, "loss": 0.25, "perplexity": math.inf})

    metadata = outcome_metadata(_outcome(tmp_path, result))

    assert metadata["num_tokens"] == dg.MetadataValue.int(2**40)
    assert metadata["loss"] == dg.MetadataValue.float(0.25)
    assert metadata["perplexity"] == dg.MetadataValue.text("inf")


def test_metadata_table_has_typed_columns(tmp_path: Path):
    table = Table.of(["source", "num_documents", "share", "ok"], [["a", 1, 0.5, True], ["b", 2, None, False]])

    value = outcome_metadata(_outcome(tmp_path, StageResult(tables={"sources": table})))["sources"]

    assert isinstance(value, dg.TableMetadataValue)
    assert [column.type for column in value.schema.columns] == ["string", "int", "float", "bool"]
    assert value.records[1].data == {"source": "b", "num_documents": 2, "share": None, "ok": False}


def test_metadata_long_table_says_what_it_leaves_out(tmp_path: Path):
    table = Table.of(["n"], [[n] for n in range(MAX_TABLE_ROWS + 1)])

    metadata = outcome_metadata(_outcome(tmp_path, StageResult(tables={"blocks": table})))

    value = metadata[f"blocks (first {MAX_TABLE_ROWS} of {MAX_TABLE_ROWS + 1} rows)"]
    assert isinstance(value, dg.TableMetadataValue)
    assert len(value.records) == MAX_TABLE_ROWS


def test_metadata_figure_is_shown_inline(tmp_path: Path):
    value = outcome_metadata(_outcome(tmp_path, StageResult(figures={"loss": "curve.svg"})))["loss"]

    encoded = str(value.value).partition("base64,")[2].rstrip(")")
    assert base64.b64decode(encoded) == SVG


def test_metadata_large_figure_is_named_instead_of_shown(tmp_path: Path):
    outcome = _outcome(tmp_path, StageResult(figures={"loss": "curve.svg"}), svg=b"x" * (MAX_FIGURE_BYTES + 1))

    value = str(outcome_metadata(outcome)["loss"].value)

    assert "base64" not in value
    assert "curve.svg" in value


def test_materialize_result_carries_content_hash_as_data_version(tmp_path: Path):
    workspace = open_tiny(tmp_path)
    artifact = publish(workspace, get_stage("corpora"), target="fused")

    result = describe_outcome(Outcome(artifact=artifact, how="ran"), recipe=workspace.recipe)

    assert result.data_version == dg.DataVersion(artifact.content_hash)


@pytest.mark.parametrize(("value", "passed"), [(0.0, False), (1.0, True), (2.0, True), (math.nan, False)])
def test_check_result_compares_metric_with_bound(tmp_path: Path, value: float, passed: bool):
    workspace = open_tiny(tmp_path)
    artifact = publish(workspace, get_stage("corpora"), target="fused", min_documents_per_source=value)

    (check,) = describe_outcome(Outcome(artifact=artifact, how="ran"), recipe=workspace.recipe).check_results or []

    assert check.passed is passed
    assert check.severity is dg.AssetCheckSeverity.ERROR
    assert check.metadata["bound"] == dg.MetadataValue.float(1.0) or check.metadata["bound"] == dg.MetadataValue.int(1)


def test_check_result_without_its_metric_fails_and_names_it(tmp_path: Path):
    outcome = _outcome(tmp_path, StageResult())

    (check,) = describe_outcome(outcome, recipe=load_recipe("tiny")).check_results or []

    assert not check.passed
    assert "min_documents_per_source is not measured" in str(check.description)
