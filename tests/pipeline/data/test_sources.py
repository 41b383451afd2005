"""Sources: what becomes a document, and what a file that cannot be read says."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest
from pydantic import ValidationError

from pipeline.data.documents import MIN_CHARACTERS, read_documents, select_documents, write_documents
from pipeline.data.embedded import EMBEDDED
from pipeline.data.sources import read_source, source_licence, source_origin
from pipeline.errors import DataError
from pipeline.recipe import DatasetSource, EmbeddedSource, FileSource, SourceConfig

TEXTS = [f"document {number} " + "word " * 60 for number in range(8)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha1(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def jsonl_source(path: Path | str, *, max_documents: int = 100, text_field: str = "text") -> FileSource:
    return FileSource(
        kind="jsonl",
        name="own",
        domain="d",
        licence="CC0",
        path=str(path),
        text_field=text_field,
        max_documents=max_documents,
    )


def dataset_source(path: Path | str, **fields: Any) -> DatasetSource:
    whole = {"name": "own", "domain": "d", "licence": "CC0", "text_field": "text", "max_documents": 6}
    whole |= {"kind": "datasets", "path": str(path), "split": "train", "revision": None, "config_name": None}
    return DatasetSource.model_validate(whole | fields)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("max_documents", [1, 3, 8, 100])
def test_documents_selected_are_the_smallest_ids_whatever_the_order(max_documents: int):
    wanted = sorted(sha1(text.strip()) for text in TEXTS)[:max_documents]
    for texts in (TEXTS, TEXTS[::-1], TEXTS + TEXTS, [f"\n{text}\n" for text in TEXTS]):
        documents = select_documents(texts, max_documents=max_documents)
        assert [document.document_id for document in documents] == wanted
        assert all(document.document_id == sha1(document.text) for document in documents)


def test_documents_that_are_short_or_not_unicode_are_handled(tmp_path: Path):
    long = "x" * MIN_CHARACTERS
    documents = select_documents([long[1:], long, " " * 500, "\ud800" + long], max_documents=9)
    assert sorted(document.text for document in documents) == ["?" + long, long]
    write_documents(tmp_path / "d.parquet", documents)
    assert read_documents(tmp_path / "d.parquet") == documents


def test_file_sources_of_every_kind_give_the_same_documents(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:5])
    write_jsonl(tmp_path / "b.jsonl", TEXTS[5:])
    pl.DataFrame({"text": TEXTS}).write_parquet(tmp_path / "all.parquet")
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "split"))
    shared = {"name": "own", "domain": "d", "licence": "CC0", "text_field": "text", "max_documents": 6}
    sources: list[SourceConfig] = [
        FileSource(kind="jsonl", path=str(tmp_path / "*.jsonl"), **shared),
        FileSource(kind="parquet", path=str(tmp_path / "all.parquet"), **shared),
        dataset_source(tmp_path / "one", **shared),
        dataset_source(tmp_path / "split", **shared),
    ]
    wanted = select_documents(TEXTS, max_documents=6)
    for source in sources:
        assert list(read_source(source, downloads=tmp_path)) == wanted
        assert source_licence(source) == "CC0"


def test_file_source_that_cannot_be_read_names_what_is_wrong(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for source, match in (
        (jsonl_source(tmp_path / "none*.jsonl"), r"source own: no file matches .*none\*\.jsonl"),
        (jsonl_source(path, text_field="body"), r"a\.jsonl line 1 has no field 'body'; it has \['other', 'text'\]"),
        (jsonl_source(path, text_field="other"), "other in .*a.jsonl line 1 is a int, not text"),
    ):
        with pytest.raises(DataError, match=match):
            list(read_source(source, downloads=tmp_path))
    path.write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl line 2 is not JSON"):
        list(read_source(jsonl_source(path), downloads=tmp_path))


def test_hub_dataset_is_streamed_at_its_commit_and_read_no_further_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The hub is out of reach of a test; what is asked of `datasets`, and how much is read of its answer, is not."""
    asked: list[tuple[str, dict[str, Any]]] = []
    read: list[str] = []

    def rows() -> Iterator[dict[str, str]]:
        for text in ["short", TEXTS[0], *TEXTS]:
            read.append(text)
            yield {"text": text}

    def load_dataset(path: str, **options: Any) -> datasets.IterableDataset:
        asked.append((path, options))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = dataset_source("owner/set", revision=COMMIT, config_name="en", max_documents=3)
    assert list(read_source(source, downloads=tmp_path)) == select_documents(TEXTS[:3], max_documents=3)
    assert len(read) == 5  # the short one, the first twice, and two more
    options = {"name": "en", "split": "train", "revision": COMMIT, "streaming": True}
    assert asked == [("owner/set", options | {"cache_dir": str(tmp_path / "datasets")})]
    assert source_origin(source) == f"datasets owner/set en [train] at {COMMIT[:12]}"


def test_dataset_source_without_its_commit_or_with_a_directorys_is_refused(tmp_path: Path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "one"))
    for source, match in (
        (dataset_source("owner/set"), "revision is null, and owner/set is no directory written by save_to_disk"),
        (dataset_source(tmp_path / "one", revision=COMMIT), "has no commits: set revision to null"),
        (dataset_source(tmp_path / "one", config_name="en"), "set config_name to null"),
    ):
        with pytest.raises(DataError, match=match):
            list(read_source(source, downloads=tmp_path))
    with pytest.raises(ValidationError, match="revision"):
        dataset_source("owner/set", revision="main")


def test_embedded_source_unknown_lists_the_names(tmp_path: Path):
    source = EmbeddedSource(kind="embedded", name="sharegpt", domain="d", max_documents=1)
    with pytest.raises(DataError, match="no embedded source 'sharegpt'; there are python-stdlib, boolq-wiki"):
        list(read_source(source, downloads=tmp_path))


def test_python_stdlib_is_read_without_downloads_or_tests(tmp_path: Path):
    source = EmbeddedSource(kind="embedded", name="python-stdlib", domain="code", max_documents=10_000)
    documents = list(read_source(source, downloads=tmp_path / "absent"))
    assert len(documents) > 300
    assert any("class JSONDecoder" in document.text for document in documents)
    assert not any("class TestCase(unittest.TestCase)" in document.text for document in documents)
    assert not (tmp_path / "absent").exists()


def test_boolq_drops_passages_that_benchmarks_ask_about():
    def lines(*passages: str) -> bytes:
        return "\n".join(json.dumps({"passage": passage}) for passage in passages).encode()

    combined = lines("Cat -- A cat.", "Dog -- A dog.", "Elk -- An elk.")
    kept = EMBEDDED["boolq-wiki"].parse([combined, lines("A cat."), lines("Dog -- A dog.")])
    assert list(kept) == ["Elk -- An elk."]


def test_chitchat_names_speakers_in_order():
    turns = [[{"text": "hi", "sender": "y"}, {"text": "you", "sender": "y"}], [], [{"text": "hello", "sender": "x"}]]
    (text,) = EMBEDDED["chitchat"].parse([json.dumps({"c": {"messages": turns}}).encode()])
    assert text == "A: hi you\nB: hello"
