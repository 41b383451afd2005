"""The stages of the data group, chained as the graph chains them."""

import json
from pathlib import Path

import polars as pl
import pytest

from pipeline.data.documents import load_documents
from pipeline.data.evaluation_sets import (
    load_evaluation_ngrams,
    load_held_out,
    load_held_out_ids,
    load_multiple_choice,
    load_reasoning_items,
)
from pipeline.data.packed import load_packed, long_context_split
from pipeline.errors import DataError
from pipeline.model.random_parent import make_random_parent
from pipeline.recipe import (
    CorporaConfig,
    EvaluationSetsConfig,
    HeldOutText,
    InstructionsConfig,
    LongContextTokens,
    MixtureConfig,
    MixtureEntry,
    RandomParent,
    ReasoningTask,
)
from pipeline.stage import StageInputs
from pipeline.stages import corpora, distillation_mix, evaluation_sets, pretraining_mix
from pipeline.stages.configs import CorporaStage, EvaluationSetsStage, MixtureStage
from tests.pipeline.data.builders import file_source, make_documents, write_corpora

PARENT = RandomParent(
    kind="random",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
    initializer_range=0.02,
    tie_word_embeddings=True,
    seed=1,
)
SETS = EvaluationSetsConfig(
    held_out=(HeldOutText(source="words", num_documents=4),),
    multiple_choice=(),
    reasoning_items_per_task=5,
    held_out_tasks=(),
    instructions=InstructionsConfig(num_prompts=3, kinds="all", max_instructions=2, max_words=20),
    ngram_tokens=13,
    seed=1,
)
TASKS = (
    ReasoningTask(name="chain_sum", config={"max_terms": 3}),
    ReasoningTask(name="chain_sum", config={"max_terms": 4}),
)
MIXTURE = MixtureConfig(
    sequence_length=64,
    tokens=6400,
    validation_tokens=640,
    long_context=(),
    entries=(MixtureEntry(source="words", weight=1.0),),
    seed=1,
)


def stage_inputs(tmp_path: Path, **artifacts: Path) -> StageInputs:
    return StageInputs(artifacts=artifacts, store_root=tmp_path / "store", downloads=tmp_path / "downloads")


def test_corpora_writes_documents_licences_and_counts(tmp_path: Path):
    documents = make_documents(12, num_words=60, seed=1)
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"body": item.text}) + "\n" for item in documents), encoding="utf-8"
    )
    source = file_source(tmp_path / "own.jsonl", text_field="body", max_documents=10)
    config = CorporaStage(corpora=CorporaConfig(sources=(source,)))
    outs = [tmp_path / "first", tmp_path / "second"]
    result, again = (corpora.run(config, stage_inputs(tmp_path), out) for out in outs)
    assert result == again
    assert load_documents(outs[0], "own") == documents[:10]
    assert result.metrics["num_documents"] == result.metrics["min_documents_per_source"] == 10
    assert result.metrics["num_characters"] == sum(len(item.text) for item in documents[:10])
    assert result.tables["sources"].rows[0][:4] == ("own", "notes", "CC-BY-4.0", 10)
    for name in ("own.parquet", "sources.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    assert pl.read_parquet(outs[0] / "own.parquet").columns == ["document_id", "text"]


def test_evaluation_sets_feed_mixtures_that_never_see_them(tmp_path: Path):
    documents = make_documents(80, num_words=100, seed=1)
    made = write_corpora(tmp_path / "corpora", {"words": documents})
    sets = tmp_path / "sets"
    result = evaluation_sets.run(
        EvaluationSetsStage(evaluation_sets=SETS, search_task=None, reasoning_tasks=TASKS),
        stage_inputs(tmp_path, corpora=made),
        sets,
    )
    assert load_held_out(sets) == {"words": [item.text for item in documents[:4]]}
    assert load_multiple_choice(sets) == {}
    items = load_reasoning_items(sets)
    assert len({item.question for item in items}) == len(items) == 10
    assert len(load_evaluation_ngrams(sets)) == result.metrics["num_ngrams"]
    assert result.metrics["num_held_out_documents"] == 4
    assert result.metrics["num_reasoning_items"] == 10

    make_random_parent(PARENT, out_dir=tmp_path / "parent")
    inputs = stage_inputs(tmp_path, corpora=made, evaluation_sets=sets, parent_checkpoint=tmp_path / "parent")
    config = MixtureStage(mixture=MIXTURE, ngram_tokens=13)
    for stage in (distillation_mix, pretraining_mix):
        out = tmp_path / stage.__name__
        metrics = stage.run(config, inputs, out).metrics
        assert metrics["num_tokens"] == load_packed(out, "train").num_tokens == 6400
        assert metrics["num_validation_tokens"] == load_packed(out, "validation").num_tokens == 640
        assert metrics["num_held_out_documents"] == len(load_held_out_ids(sets)) == 4
        assert metrics["num_contaminated_documents_left"] == 0
        assert metrics["vocab_size"] >= 256
        record = json.loads((out / "mixture.json").read_text())
        assert record["sources"][0]["num_tokens"] == 6400
        # What it held before there were longer windows: nothing downstream of an older store is made again.
        assert list(record) == [
            "sequence_length",
            "vocab_size",
            "separator",
            "num_tokens",
            "num_validation_tokens",
            "num_contaminated_documents_left",
            "sources",
        ]


def test_mixture_stage_writes_longer_windows_and_sums_domains(tmp_path: Path):
    words = {name: make_documents(60, num_words=100, seed=seed) for seed, name in enumerate(("a", "b", "c"), start=1)}
    made = write_corpora(tmp_path / "corpora", words, domains={"a": "prose", "b": "code", "c": "prose"})
    sets = tmp_path / "sets"
    measured = SETS.model_copy(update={"held_out": (SETS.held_out[0].model_copy(update={"source": "a"}),)})
    evaluation_sets.run(
        EvaluationSetsStage(evaluation_sets=measured, search_task=None, reasoning_tasks=TASKS),
        stage_inputs(tmp_path, corpora=made),
        sets,
    )
    make_random_parent(PARENT, out_dir=tmp_path / "parent")
    mixture = MIXTURE.model_copy(
        update={
            "entries": tuple(
                MixtureEntry(source=name, weight=weight) for name, weight in (("a", 1), ("b", 1), ("c", 2))
            ),
            "long_context": (LongContextTokens(sequence_length=256, tokens=1000),),
        }
    )
    inputs = stage_inputs(tmp_path, corpora=made, evaluation_sets=sets, parent_checkpoint=tmp_path / "parent")
    out = tmp_path / "out"
    result = distillation_mix.run(MixtureStage(mixture=mixture, ngram_tokens=13), inputs, out)
    assert load_packed(out, long_context_split(256)).tokens_NT.shape == (4, 256)
    assert result.metrics["num_tokens_in_windows_of_256"] == 1024
    (longer,) = json.loads((out / "mixture.json").read_text())["long_context"]
    assert (longer["sequence_length"], longer["num_tokens"]) == (256, 1024)
    by_source = {row[0]: row for row in result.tables["sources"].rows}
    columns = result.tables["sources"].columns
    tokens = {name: int(row[columns.index("num_tokens")] or 0) for name, row in by_source.items()}
    domains = {row[0]: row[1:3] for row in result.tables["domains"].rows}
    assert domains.keys() == {"prose", "code"}
    assert domains["code"][0] == tokens["b"]
    assert domains["prose"][0] == tokens["a"] + tokens["c"]
    assert domains["prose"][1] == pytest.approx(0.75, abs=1e-3)


def test_evaluation_sets_wanting_more_documents_than_there_are_is_an_error(tmp_path: Path):
    made = write_corpora(tmp_path / "corpora", {"words": make_documents(3, num_words=60, seed=1)})
    with pytest.raises(DataError, match="wants 4 documents of words, corpora holds 3"):
        evaluation_sets.run(
            EvaluationSetsStage(evaluation_sets=SETS, search_task=None, reasoning_tasks=TASKS),
            stage_inputs(tmp_path, corpora=made),
            tmp_path / "sets",
        )
