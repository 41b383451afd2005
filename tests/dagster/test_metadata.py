"""What the UI is given of an outcome: numbers, texts, tables, pictures, and what every check compared."""

import base64
import math
from pathlib import Path

import dagster as dg
import pytest

from assets.highlights import HIGHLIGHTS, Unit
from assets.metadata import (
    MAX_FIGURE_BYTES,
    MAX_INLINE_CHARACTERS,
    MAX_TABLE_ROWS,
    column_title,
    outcome_metadata,
    readable_number,
)
from assets.stage_asset import describe_outcome
from pipeline.artifacts import ArtifactStore
from pipeline.execution import Outcome
from pipeline.recipe_file import load_recipe
from pipeline.stage import StageResult, Table
from pipeline.stages.registry import STAGES, Stage, get_stage
from resources.launcher import observation_metadata
from tests.dagster.stores import open_tiny, publish

SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"


def _outcome(root: Path, result: StageResult, *, svg: bytes = SVG, asset: str = "corpora") -> Outcome:
    store = ArtifactStore(root)
    view = store.directory(asset, "f" * 20) / "view"
    view.mkdir(parents=True)
    (view / "curve.svg").write_bytes(svg)
    artifact = store.publish(asset, "f" * 20, result=result, wall_s=2.5, provenance={})
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
    assert value.records[1].data == {"source": "b", "documents": 2, "share": None, "ok": False}


def test_metadata_table_shows_five_digits_and_whole_integers(tmp_path: Path):
    table = Table.of(["loss", "num_tokens"], [[0.7741997241973877, 123456789], [1234567.25, 1], [math.nan, 2]])

    value = outcome_metadata(_outcome(tmp_path, StageResult(tables={"curve": table})))["curve"]

    assert isinstance(value, dg.TableMetadataValue)
    assert [record.data["loss"] for record in value.records] == [0.7742, 1234567.2, "nan"]
    assert value.records[0].data["tokens"] == 123456789


def test_metadata_table_keeps_names_whose_titles_would_collide(tmp_path: Path):
    table = Table.of(["tokens", "num_tokens"], [[1, 2]])

    value = outcome_metadata(_outcome(tmp_path, StageResult(tables={"counts": table})))["counts"]

    assert isinstance(value, dg.TableMetadataValue)
    assert value.records[0].data == {"tokens": 1, "num_tokens": 2}


def test_metadata_long_table_says_what_it_leaves_out(tmp_path: Path):
    table = Table.of(["n"], [[n] for n in range(MAX_TABLE_ROWS + 1)])

    metadata = outcome_metadata(_outcome(tmp_path, StageResult(tables={"blocks": table})))

    value = metadata[f"blocks (first {MAX_TABLE_ROWS} of {MAX_TABLE_ROWS + 1} rows)"]
    assert isinstance(value, dg.TableMetadataValue)
    assert len(value.records) == MAX_TABLE_ROWS


def test_metadata_figure_is_shown_inline(tmp_path: Path):
    value = outcome_metadata(_outcome(tmp_path, StageResult(figures={"loss": "curve.svg"})))["picture: loss"]

    encoded = str(value.value).partition("base64,")[2].rstrip(")")
    assert base64.b64decode(encoded) == SVG


def test_metadata_large_figure_is_named_instead_of_shown(tmp_path: Path):
    outcome = _outcome(tmp_path, StageResult(figures={"loss": "curve.svg"}), svg=b"x" * (MAX_FIGURE_BYTES + 1))

    value = str(outcome_metadata(outcome)["picture: loss"].value)

    assert "base64" not in value
    assert "curve.svg" in value


def test_metadata_is_in_the_order_people_read_it(tmp_path: Path):
    result = StageResult(
        metrics={"num_documents": 3},
        facts={"device": "cpu"},
        tables={"sources": Table.of(["n"], [[1]])},
        markdown={"note": "text"},
        figures={"loss": "curve.svg"},
    )

    keys = list(outcome_metadata(_outcome(tmp_path, result)))

    assert keys == [
        "at a glance", "picture: loss", "note", "sources", "device", "num_documents",
        "how", "wall_s", "fingerprint", "path",
    ]  # fmt: skip


def test_metadata_summary_shows_labels_with_units(tmp_path: Path):
    result = StageResult(metrics={"num_sources": 2, "num_documents": 123456, "num_characters": 7})

    summary = str(outcome_metadata(_outcome(tmp_path, result))["at a glance"].value)

    assert "| Documents | **123,456** |" in summary
    assert "| This time | **resumed in 2s** |" in summary


def test_metadata_summary_leaves_out_what_was_not_measured(tmp_path: Path):
    summary = str(outcome_metadata(_outcome(tmp_path, StageResult(metrics={"num_sources": 2})))["at a glance"].value)

    assert "Sources" in summary
    assert "Documents" not in summary


def test_metadata_summary_of_a_training_draws_its_curve(tmp_path: Path):
    falling = Table.of(["step", "loss"], [[step, 1.0 / (step + 1)] for step in range(500)])

    summary = str(
        outcome_metadata(_outcome(tmp_path, StageResult(tables={"training_curve": falling}), asset="kd_checkpoint"))[
            "at a glance"
        ].value
    )

    svg = base64.b64decode(summary.partition("base64,")[2].rstrip(")")).decode()
    points = [tuple(map(int, point.split(","))) for point in svg.partition('points="')[2].partition('"')[0].split()]
    assert points[0] == (4, 4)  # the highest loss, at the top left
    assert points[-1] == (236, 44)  # the lowest, at the bottom right


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_metadata_summary_is_short_enough_to_be_shown_in_place(tmp_path: Path, stage: Stage):
    metrics = dict.fromkeys(HIGHLIGHTS[stage.name].numbers, 123456789.123456789)
    zigzag = Table.of(["loss", "reward"], [[step % 7, step % 5] for step in range(1000)])
    result = StageResult(metrics=metrics, tables={"training_curve": zigzag})

    metadata = outcome_metadata(_outcome(tmp_path, result, asset=stage.name))

    summary = str(metadata["at a glance"].value)
    assert len(summary) <= MAX_INLINE_CHARACTERS
    assert ("svg+xml" in summary) is (HIGHLIGHTS[stage.name].sparkline is not None)


def test_highlights_are_those_of_the_stages():
    assert set(HIGHLIGHTS) == {stage.name for stage in STAGES}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (279168, "", "279,168"),
        (279168.0, "tokens", "279,168 tokens"),
        (0.0041242484, "nats/token", "0.00412 nats/token"),
        (1.3567081, "x", "1.36x"),
        (0.4010834, "%", "40.1 %"),
        (8964.654, "tokens/s", "8,965 tokens/s"),
        (9.5e-6, "nats/token", "9.5e-06 nats/token"),
        (0, "", "0"),
        (math.nan, "%", "nan"),
        (math.inf, "", "inf"),
    ],
)
def test_readable_number(value: float, unit: Unit, text: str):
    assert readable_number(value, unit) == text


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("time_ms", "time, ms"),
        ("weights_mib", "weights, MiB"),
        ("num_layers", "layers"),
        ("kv_bytes_per_token", "kv, bytes/token"),
        ("tokens_per_second", "tokens/s"),
        ("parent_tokens_per_second", "parent tokens/s"),
        ("kl_alone_nats", "kl alone, nats/token"),
        ("learning_rate", "learning rate"),
        ("KL to parent, nats/token", "KL to parent, nats/token"),
        ("tokens_per_second_low", "tokens per second low"),
    ],
)
def test_column_title(name: str, title: str):
    assert column_title(name) == title


def test_metric_is_rounded_under_its_own_name(tmp_path: Path):
    metadata = outcome_metadata(_outcome(tmp_path, StageResult(metrics={"loss": 0.010282767936587334})))

    assert metadata["loss"] == dg.MetadataValue.float(0.0102828)


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


def test_check_result_that_does_not_apply_passes_and_says_so(tmp_path: Path):
    metrics = {"num_stops": 0, "kl_to_teacher": 3.0}
    outcome = _outcome(tmp_path, StageResult(metrics=metrics), asset="rl_checkpoint")

    _, check = describe_outcome(outcome, recipe=load_recipe("tiny")).check_results or []

    assert check.passed
    assert check.description == "does not apply: kl_to_teacher was measured in place of final_kl"


def test_check_result_records_the_value_as_a_number_to_plot(tmp_path: Path):
    workspace = open_tiny(tmp_path)
    artifact = publish(workspace, get_stage("corpora"), target="fused", min_documents_per_source=2)

    (check,) = describe_outcome(Outcome(artifact=artifact, how="ran"), recipe=workspace.recipe).check_results or []

    assert check.metadata["value"] == dg.MetadataValue.int(2)


def test_observation_holds_progress_and_readable_metrics():
    line = {
        "what": "KD steps",
        "step": 76,
        "total": 480,
        "eta_s": 55.53674888079831,
        "metrics": {"loss": 0.8841928839683533, "kl": math.inf},
    }

    assert observation_metadata(line) == {
        "what": "KD steps", "step": 76, "total": 480, "eta_s": 55.5367, "loss": 0.884193, "kl": "inf",
    }  # fmt: skip


def test_observation_without_evidence_has_no_eta():
    line = {"what": "KD steps", "step": 1, "total": 480, "eta_s": None, "metrics": {}}

    assert "eta_s" not in observation_metadata(line)
