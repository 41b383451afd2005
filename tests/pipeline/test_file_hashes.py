"""Hashes of local files: read once while they stay as they are, in this process and in the next."""

import os
from pathlib import Path

import pytest

from pipeline import file_hashes
from pipeline.artifacts import sha256_file
from pipeline.execution import stage_fingerprint
from pipeline.file_hashes import hashes_of
from pipeline.recipe import LocalParent
from pipeline.recipe_file import load_recipe
from pipeline.stages.registry import get_stage
from tests.dagster.stores import open_tiny


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read from here on; a file may be as young as it likes."""
    found: list[str] = []

    def reading(path: Path) -> str:
        found.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(file_hashes, "SETTLED_S", 0.0)
    monkeypatch.setattr(file_hashes, "sha256_file", reading)
    monkeypatch.setattr(file_hashes, "_READ_HERE", {})
    return found


def next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "_READ_HERE", {})


def _files(directory: Path, *names: str) -> list[Path]:
    for name in names:
        (directory / name).write_text(name)
    return [directory / name for name in names]


def test_a_file_is_read_once_and_by_the_next_process_not_at_all(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
):
    files, kept = _files(tmp_path, "a", "b"), tmp_path / "home" / "hashes.json"
    first = hashes_of(files, kept_in=kept)
    assert first == {str(file): sha256_file(file) for file in files}
    assert hashes_of(files, kept_in=kept) == first
    next_process(monkeypatch)
    assert hashes_of(files, kept_in=kept) == first
    assert read == ["a", "b"]


def test_a_file_of_the_same_size_and_time_but_other_bytes_is_read_again(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
):
    (file,), kept = _files(tmp_path, "a"), tmp_path / "hashes.json"
    os.utime(file, ns=(0, 0))
    first = hashes_of([file], kept_in=kept)
    file.write_text("b")
    os.utime(file, ns=(0, 0))  # as an archive whose files all have one time leaves it
    next_process(monkeypatch)
    assert hashes_of([file], kept_in=kept) != first
    assert read == ["a", "a"]


def test_a_file_written_a_moment_ago_is_not_kept(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file_hashes, "SETTLED_S", 60.0)
    kept = tmp_path / "hashes.json"
    hashes_of(_files(tmp_path, "a"), kept_in=kept)
    assert not kept.exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"/a": {"state": {}, "sha256": "x"}}', "\udcff"])
def test_a_damaged_file_is_written_anew(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, text: str):
    files, kept = _files(tmp_path, "a"), tmp_path / "hashes.json"
    kept.write_bytes(text.encode("utf-8", "surrogateescape"))
    first = hashes_of(files, kept_in=kept)
    next_process(monkeypatch)
    assert hashes_of(files, kept_in=kept) == first
    assert read == ["a"]


def test_what_another_process_kept_stays_and_what_is_gone_goes(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
):
    (a, b, c), kept = _files(tmp_path, "a", "b", "c"), tmp_path / "hashes.json"
    for file in (a, b):
        hashes_of([file], kept_in=kept)
        next_process(monkeypatch)
    b.unlink()
    hashes_of([c], kept_in=kept)
    assert str(a) in kept.read_text()
    assert str(b) not in kept.read_text()
    next_process(monkeypatch)
    hashes_of([a, c], kept_in=kept)
    assert read == ["a", "b", "c"]


def test_a_home_that_cannot_be_written_costs_no_error(tmp_path: Path, read: list[str]):
    (tmp_path / "home").write_text("a file where a directory should be")
    assert hashes_of(_files(tmp_path, "a"), kept_in=tmp_path / "home" / "hashes.json")


def test_the_weights_of_a_local_parent_are_read_once_for_all_commands(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "parent").mkdir()
    _files(tmp_path / "parent", "model.safetensors")
    parent = LocalParent(kind="local", path=str(tmp_path / "parent"), licence="test")
    workspace = open_tiny(tmp_path, recipe=load_recipe("tiny").model_copy(update={"parent": parent}))
    keys = set()
    for _ in range(2):
        keys.add(stage_fingerprint(workspace, get_stage("parent_checkpoint"), "fused"))
        next_process(monkeypatch)
    assert len(keys) == 1
    assert read == ["model.safetensors"]
    assert (tmp_path / "file_hashes.json").is_file()
