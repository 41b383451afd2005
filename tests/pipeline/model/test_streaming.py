"""Planned and streamed checkpoint files against those of the safetensors library, and what is left when cut short."""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.architecture import LINEAR_ATTENTION, LINEAR_FFN, NO_ATTENTION, NO_FFN, Architecture, gqa, swiglu
from pipeline.errors import CheckpointError
from pipeline.model import shards, streaming
from pipeline.model.checkpoint import TensorReader, load_model, read_architecture
from pipeline.model.heterogeneous import empty_model
from pipeline.model.shards import PlannedTensor, checkpoint_shapes, plan_shards
from pipeline.model.streaming import read_chunks, stored_tensors, stream_checkpoint
from tests.pipeline.model.builders import make_architecture, make_blocks, make_tokenizer_dir

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MIXED = make_blocks(
    (gqa(2), swiglu(48)),
    (gqa(4), NO_FFN),
    (gqa(1), swiglu(20)),
    (NO_ATTENTION, swiglu(7)),
    (LINEAR_ATTENTION, LINEAR_FFN),
    (NO_ATTENTION, NO_FFN),
)


def random_tensors(shapes: dict[str, tuple[int, ...]], *, dtype_of: Callable[[str], str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(DTYPES[dtype_of(name)]) for name, shape in shapes.items()}


def raw_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy())


def reading(tensors: dict[str, Tensor]) -> Callable[[PlannedTensor], Iterable[memoryview]]:
    def read(planned: PlannedTensor) -> Iterator[memoryview]:
        whole = memoryview(raw_bytes(tensors[planned.name]))
        # In pieces that end nowhere in particular.
        for begin in range(0, len(whole), 777):
            yield whole[begin : begin + 777]

    return read


def stream(
    directory: Path, architecture: Architecture, tensors: dict[str, Tensor], *, tokenizer_dir: Path, **given_read: Any
) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    layout = plan_shards(architecture, dtype_of=lambda name: names[tensors[name].dtype])
    stream_checkpoint(
        directory,
        architecture=architecture,
        layout=layout,
        read=given_read.get("read", reading(tensors)),
        tokenizer_dir=tokenizer_dir,
    )


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("tied", "attention_bias", "mlp_bias", "head_dim"),
    list(itertools.product([True, False], [True, False], [True, False], [8, 12])),
)
def test_planned_shapes_are_those_of_a_built_model(tied: bool, attention_bias: bool, mlp_bias: bool, head_dim: int):
    architecture = make_architecture(
        tie_word_embeddings=tied, attention_bias=attention_bias, mlp_bias=mlp_bias, head_dim=head_dim, blocks=MIXED
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(architecture).state_dict().items()}
    if architecture.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert checkpoint_shapes(architecture) == shapes


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 30_000, 1])
@pytest.mark.parametrize("dtypes", [["F32"], ["BF16"], ["F32", "BF16", "F16"]], ids="+".join)
def test_streamed_files_are_byte_for_byte_those_of_the_safetensors_library(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, max_shard_bytes: int, dtypes: list[str]
):
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", max_shard_bytes)
    architecture = make_architecture(tie_word_embeddings=False, attention_bias=True, head_dim=12, blocks=MIXED)
    cycle = itertools.cycle(dtypes)
    wanted = {name: next(cycle) for name in checkpoint_shapes(architecture)}
    tensors = random_tensors(checkpoint_shapes(architecture), dtype_of=wanted.__getitem__)
    stream(tmp_path / "ours", architecture, tensors, tokenizer_dir=tokenizer_dir)

    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_bytes > 30_000)
    held: dict[str, str] = {}
    for path in files:
        names = load_file(path).keys()
        save_file({name: tensors[name] for name in names}, tmp_path / "theirs", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
        held |= dict.fromkeys(names, path.name)
        sizes = [tensors[name].nbytes for name in names]
        assert len(sizes) == 1 or sum(sizes) <= max_shard_bytes
    assert held.keys() == tensors.keys()
    index = tmp_path / "ours/model.safetensors.index.json"
    if len(files) > 1:
        assert json.loads(index.read_text()) == {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": held,
        }
        assert [path.name for path in files] == [
            f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
        ]
    assert index.is_file() == (len(files) > 1)
    reader = TensorReader(tmp_path / "ours")
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_child_in_any_dtypes_and_shard_size_is_streamed_as_the_library_would(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path
):
    attention = st.sampled_from([gqa(1), gqa(2), gqa(4), LINEAR_ATTENTION, NO_ATTENTION])
    ffn = st.one_of(st.integers(1, 60).map(swiglu), st.sampled_from([LINEAR_FFN, NO_FFN]))
    blocks = data.draw(st.lists(st.tuples(attention, ffn), min_size=1, max_size=12))
    architecture = make_architecture(
        tie_word_embeddings=data.draw(st.booleans()),
        attention_bias=data.draw(st.booleans()),
        mlp_bias=data.draw(st.booleans()),
        head_dim=data.draw(st.sampled_from([2, 8, 14])),
        blocks=make_blocks(*blocks),
    )
    shapes = checkpoint_shapes(architecture)
    dtypes = data.draw(st.lists(st.sampled_from(list(DTYPES)), min_size=len(shapes), max_size=len(shapes)))
    tensors = random_tensors(shapes, dtype_of=dict(zip(shapes, dtypes, strict=True)).__getitem__)
    directory = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MAX_SHARD_BYTES", data.draw(st.integers(1, 200_000)))
        stream(directory, architecture, tensors, tokenizer_dir=tokenizer_dir)
    assert {name for path in directory.glob("*.safetensors") for name in load_file(path)} == set(tensors)
    for path in directory.glob("*.safetensors"):
        save_file({name: tensors[name] for name in load_file(path)}, directory / "theirs", metadata={"format": "pt"})
        assert path.read_bytes() == (directory / "theirs").read_bytes()
    loaded = load_model(directory, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize(("stored", "wanted"), list(itertools.product(DTYPES, DTYPES)))
def test_chunks_are_converted_as_torch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, wanted: str):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 64)
    # Beyond float16, below its smallest normal, negative zero: what a conversion can get wrong.
    values = torch.cat([torch.randn(50), torch.tensor([1e30, -1e30, 1e-7, -0.0, 3e-8])]).reshape(5, 11)
    tensor = values.to(DTYPES[stored])
    save_file({"a": torch.ones(3), "b": tensor}, tmp_path / "file")
    found = stored_tensors(tmp_path / "file")["b"]
    assert (found.dtype, found.shape) == (stored, (5, 11))
    read = b"".join(bytes(chunk) for chunk in read_chunks(found, dtype=wanted))
    assert read == raw_bytes(tensor.to(DTYPES[wanted]))


def test_cut_off_and_broken_files_are_refused_before_anything_is_read(tmp_path: Path):
    whole = tmp_path / "whole"
    save_file({"a": torch.ones(40), "b": torch.ones(8, dtype=torch.float64)}, whole)
    content = whole.read_bytes()
    assert set(stored_tensors(whole)) == {"a", "b"}
    for length in (0, 3, 8, 20, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cut off"):
            stored_tensors(tmp_path / "cut")
    for old, new, message in (
        (b'"F32","shape":[40]', b'"F32","shape":[41]', "holds 160 bytes of a"),
        (b'"dtype":"F32"', b'"dtypo":"F32"', "no safetensors header"),
        (b"{", b"[", "no safetensors header"),
    ):
        assert old in content
        (tmp_path / "broken").write_bytes(content.replace(old, new, 1))
        with pytest.raises(CheckpointError, match=message):
            stored_tensors(tmp_path / "broken")
    with pytest.raises(CheckpointError, match="is missing"):
        stored_tensors(tmp_path / "nowhere")


def test_file_that_is_cut_off_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 64)
    path = tmp_path / "file"
    save_file({"a": torch.ones(40_000)}, path)  # more than Python reads ahead
    chunks = read_chunks(stored_tensors(path)["a"], dtype="F32")
    next(chunks)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="was cut off while it was read"):
        list(chunks)


def test_stream_that_gives_other_bytes_than_planned_leaves_nothing_to_load(tmp_path: Path, tokenizer_dir: Path):
    architecture = make_architecture(blocks=MIXED)
    tensors = random_tensors(checkpoint_shapes(architecture), dtype_of=lambda _: "F32")
    stream(tmp_path, architecture, tensors, tokenizer_dir=tokenizer_dir)
    with pytest.raises(CheckpointError, match=r"are planned"):
        stream(tmp_path, architecture, tensors, tokenizer_dir=tokenizer_dir, read=lambda _: [memoryview(b"1234")])
    # The earlier checkpoint is gone too: half of one and half of the other would load.
    with pytest.raises(CheckpointError):
        read_architecture(tmp_path)
    with pytest.raises(CheckpointError):
        load_model(tmp_path, dtype=torch.float32)


KILLED = """
import sys, time
from pathlib import Path
from pipeline.model import shards
from tests.pipeline.model import test_streaming as here

directory, tokenizer_dir = map(Path, sys.argv[1:])
shards.MAX_SHARD_BYTES = 20_000
architecture = here.make_architecture(blocks=here.MIXED)
tensors = here.random_tensors(here.checkpoint_shapes(architecture), dtype_of=lambda _: "F32")
read = here.reading(tensors)

def slow(planned):
    for chunk in read(planned):
        time.sleep(0.002)
        yield chunk

here.stream(directory, architecture, tensors, tokenizer_dir=tokenizer_dir, read=slow)
"""


def _num_shards(directory: Path) -> int:
    return len(list(directory.glob("model-*.safetensors")))


def test_killed_half_way_nothing_can_be_loaded_and_the_next_run_leaves_the_whole(tmp_path: Path, tokenizer_dir: Path):
    directory = tmp_path / "child"
    for num_files in (1, 2):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(directory), str(tokenizer_dir)]) as process:
            # What an earlier run left goes when this one begins to write.
            while not any(directory.glob(".model*.part")) or _num_shards(directory) != num_files:
                assert process.poll() is None
                time.sleep(0.002)
            process.kill()
        assert list(directory.glob("model-*.safetensors"))
        with pytest.raises(CheckpointError, match=r"no architecture\.json"):
            load_model(directory, dtype=torch.float32)
        with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
            TensorReader(directory)
    architecture = make_architecture(blocks=MIXED)
    tensors = random_tensors(checkpoint_shapes(architecture), dtype_of=lambda _: "F32")
    stream(directory, architecture, tensors, tokenizer_dir=tokenizer_dir)
    # One file now: what the killed runs left must be gone.
    assert sorted(path.name for path in directory.glob("*model*")) == ["model.safetensors"]
    assert not list(directory.glob(".*"))
    loaded = load_model(directory, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
