"""Checkpoint directories: what is written is what is read, and broken ones are refused."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.model import checkpoint
from pipeline.model.checkpoint import (
    TensorReader,
    load_model,
    load_tokenizer,
    read_architecture,
    save_checkpoint,
)
from pipeline.model.shards import checkpoint_shapes
from tests.pipeline.model.builders import (
    layer_tensors,
    make_architecture,
    make_model,
    make_tokenizer_dir,
    random_ids,
)


def saved(directory: Path, **changes: object) -> Path:
    architecture = make_architecture(**changes)
    tensors = make_model(architecture).state_dict()
    save_checkpoint(directory, architecture=architecture, tensors=tensors, tokenizer_dir=None)
    return directory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 20_000])
@torch.no_grad()
def test_round_trip_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, max_shard_bytes: int):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", max_shard_bytes)
    architecture = make_architecture(tie_word_embeddings=tied)
    saved(tmp_path, tie_word_embeddings=tied)
    model = load_model(tmp_path, dtype=torch.float32)
    ids_BT = random_ids(9)
    assert torch.equal(model(ids_BT).logits, make_model(architecture)(ids_BT).logits)
    assert read_architecture(tmp_path) == architecture
    assert set(TensorReader(tmp_path).names) == set(checkpoint_shapes(architecture))
    assert ("lm_head.weight" in TensorReader(tmp_path).names) == (not tied)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (max_shard_bytes == 20_000)
    assert not list(tmp_path.glob(".*"))


def test_load_model_converts_dtype_and_owns_its_memory(tmp_path: Path):
    saved(tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert load_model(tmp_path, dtype=torch.bfloat16).model.norm.weight.abs().sum() > 0


def test_saving_twice_gives_the_same_bytes(tmp_path: Path):
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b")
    for name in ("model.safetensors", "architecture.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_read_prefix_names_tensors_relative_to_it(tmp_path: Path):
    saved(tmp_path)
    expected = layer_tensors(make_model(make_architecture()), 1)
    got = TensorReader(tmp_path).read_prefix("model.layers.1.")
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_head_that_differs_from_a_tied_embedding_is_refused(tmp_path: Path):
    architecture = make_architecture()
    tensors = dict(make_model(architecture).state_dict())
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        save_checkpoint(tmp_path, architecture=architecture, tensors=tensors, tokenizer_dir=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "1 of 29 tensors are missing, the first is model.norm"),
        (lambda tensors: tensors.update({"model.extra": torch.ones(1)}), "model.extra is not part"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), r"has shape \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: object, message: str):
    architecture = make_architecture()
    tensors = dict(make_model(architecture).state_dict())
    assert callable(change)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, architecture=architecture, tensors=tensors, tokenizer_dir=None)


def test_truncated_weights_are_refused(tmp_path: Path):
    path = saved(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off"):
        load_model(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "weights.bin", "sub/x.safetensors"])
def test_index_that_points_elsewhere_is_refused(tmp_path: Path, shard: str):
    index = {"weight_map": {"model.norm.weight": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names the shard"):
        TensorReader(tmp_path)


def test_missing_shard_is_refused(tmp_path: Path):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors is missing"):
        TensorReader(tmp_path)


def test_directory_that_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no architecture\.json"):
        load_model(tmp_path, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="neither"):
        TensorReader(tmp_path)


def test_tokenizer_files_are_copied(tmp_path: Path):
    source = make_tokenizer_dir(tmp_path / "source")
    architecture = make_architecture()
    tensors = make_model(architecture).state_dict()
    save_checkpoint(tmp_path / "copy", architecture=architecture, tensors=tensors, tokenizer_dir=source)
    text = "detailed thinking on"
    assert load_tokenizer(tmp_path / "copy")(text).input_ids == load_tokenizer(source)(text).input_ids
    assert load_tokenizer(tmp_path / "copy").chat_template == load_tokenizer(source).chat_template
