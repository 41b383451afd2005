"""Checkpoints that are broken, that lie, or that would like to run code."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.cli import main
from tests.bad_input.command import CANARY, edit_json, refused, write_recipe
from tests.pipeline.model.builders import make_architecture, make_llama, make_tokenizer_dir

SHARD_SIZE = "20KB"


class RunsCode:
    """A pickle that would leave a canary behind when loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self._path,)


@pytest.fixture(scope="session")
def good_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("good") / "hf", shard_size="5GB")


@pytest.fixture(scope="session")
def good_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("shards") / "hf", shard_size=SHARD_SIZE)


def _save(directory: Path, *, shard_size: str) -> Path:
    make_llama(make_architecture()).save_pretrained(directory, max_shard_size=shard_size)
    tokenizer_dir = make_tokenizer_dir(directory / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer_dir / name, directory / name)
    shutil.rmtree(tokenizer_dir)
    return directory


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    edit(index["weight_map"])
    path.write_text(json.dumps(index), encoding="utf-8")


def first_shard(directory: Path) -> Path:
    return min(directory.glob("model-*.safetensors"))


def only_a_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(directory / CANARY)))


def pickle_called_safetensors(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(pickle.dumps(RunsCode(directory / CANARY)))


def header_that_lies(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_value(tensors: dict[str, torch.Tensor], value: float) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value


UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
WHOLE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "pickle alone": (only_a_pickle, ["safetensors"]),
    "pickle called safetensors": (pickle_called_safetensors, ["model.safetensors"]),
    "header length that lies": (header_that_lies, ["model.safetensors"]),
    "truncated weights": (lambda d: cut_in_half(d / "model.safetensors"), ["model.safetensors"]),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), ["model.safetensors"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors"]),
    "auto_map": (
        lambda d: edit_json(d / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        ["auto_map", "never done"],
    ),
    "another family": (lambda d: edit_json(d / "config.json", model_type="qwen2"), ["model_type 'qwen2'"]),
    "another class": (lambda d: edit_json(d / "config.json", architectures=["EvilForCausalLM"]), ["EvilForCausalLM"]),
    "unknown key of the config": (lambda d: edit_json(d / "config.json", sliding_window=512), ["sliding_window"]),
    "quantised": (
        lambda d: edit_json(d / "config.json", quantization_config={"bits": 4}),
        ["quantization_config", "unquantised"],
    ),
    "config that is not JSON": (lambda d: (d / "config.json").write_text("{"), ["config.json is not JSON"]),
    "config nested without end": (
        lambda d: (d / "config.json").write_text("[" * 100_000),
        ["config.json is not JSON"],
    ),
    "config that is a list": (lambda d: (d / "config.json").write_text("[]"), ["holds a list"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json is missing"]),
    "negative size": (lambda d: edit_json(d / "config.json", hidden_size=-32), ["hidden_size is -32"]),
    "size that does not fit memory": (
        lambda d: edit_json(d / "config.json", vocab_size=10**12),
        ["model.embed_tokens.weight"],
    ),
    "token outside the vocabulary": (lambda d: edit_json(d / "config.json", eos_token_id=999_999), ["999999"]),
    "wrong shape": (lambda d: edit_weights(d, lambda t: t.update({UP: t[UP][:-1].clone()})), [UP]),
    "missing tensor": (lambda d: edit_weights(d, lambda t: t.pop(NORM)), [NORM]),
    "tensor too many": (lambda d: edit_weights(d, lambda t: t.update(evil=torch.zeros(2))), ["evil"]),
    "integer weights": (lambda d: edit_weights(d, lambda t: t.update({UP: t[UP].to(torch.int8)})), [UP]),
    "tied flag that lies": (
        lambda d: edit_weights(d, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        ["lm_head.weight"],
    ),
    "untied without a head": (lambda d: edit_json(d / "config.json", tie_word_embeddings=False), ["lm_head.weight"]),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), ["tokenizer"]),
}
SHARDED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "path out of the directory": (
        lambda d: edit_index(d, lambda m: m.update({NORM: "../../etc/passwd"})),
        ["../../etc/passwd"],
    ),
    "absolute path": (lambda d: edit_index(d, lambda m: m.update({NORM: "/etc/passwd"})), ["/etc/passwd"]),
    "missing shard": (lambda d: first_shard(d).unlink(), ["model-00001"]),
    "truncated shard": (lambda d: cut_in_half(first_shard(d)), ["model-00001"]),
    "tensor in another shard": (
        lambda d: edit_index(d, lambda m: m.update({NORM: first_shard(d).name, min(m): max(m.values())})),
        ["model"],
    ),
    "index that is not JSON": (lambda d: (d / "model.safetensors.index.json").write_text("x"), ["index.json"]),
    "index without its map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), ["index.json"]),
}


def recipe_of(directory: Path, *, tmp_path: Path) -> Path:
    """Write the recipe of a parent in that directory, with a search that fits any Llama."""
    changes = {
        "parent": {"kind": "local", "path": str(directory), "licence": "none"},
        "search_space": {"attention": ["parent"], "ffn": ["parent", "no_op"], "overrides": [], "portable": False},
        "targets": {"light": {"description": "", "limits": [], "pins": []}},
        "default_target": "light",
    }
    return write_recipe(tmp_path, changes)


def run(
    source: Path,
    spoil: Callable[[Path], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    directory = tmp_path / "hf"
    shutil.copytree(source, directory)
    spoil(directory)
    recipe = recipe_of(directory, tmp_path=tmp_path)
    arguments = ["materialize", "--recipe", str(recipe), "parent_checkpoint"]
    return refused(arguments, tmp_path=tmp_path, monkeypatch=monkeypatch, capsys=capsys, stage_name="parent_checkpoint")


@pytest.mark.parametrize("name", WHOLE)
def test_checkpoint_is_refused(
    name: str,
    good_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    spoil, wanted = WHOLE[name]
    message = run(good_checkpoint, spoil, tmp_path, monkeypatch, capsys)
    assert all(text in message for text in wanted), message


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_checkpoint_is_refused(
    name: str,
    good_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    spoil, wanted = SHARDED[name]
    message = run(good_shards, spoil, tmp_path, monkeypatch, capsys)
    assert all(text in message for text in wanted), message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_stops_every_reader(
    value: float,
    good_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    directory = tmp_path / "hf"
    shutil.copytree(good_checkpoint, directory)
    edit_weights(directory, lambda tensors: one_value(tensors, value))
    recipe = recipe_of(directory, tmp_path=tmp_path)
    monkeypatch.setenv("REFIT_HOME", str(tmp_path / "home"))
    main(["materialize", "--recipe", str(recipe), "parent_checkpoint"])
    message = refused(
        ["materialize", "--recipe", str(recipe), "block_profile"],
        tmp_path=tmp_path,
        monkeypatch=monkeypatch,
        capsys=capsys,
        stage_name="block_profile",
    )
    assert "parent_checkpoint failed its blocking check weights_are_finite: num_non_finite_weights is 1" in message
