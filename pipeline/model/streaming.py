"""Writing a planned checkpoint straight from the files that hold its tensors, one chunk of bytes in memory at a time.

Every tensor is read once and written once, into the place that the plan gives it. Files are read plainly: the pages of
a mapped parent would count as this process's memory.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.architecture import Architecture
from pipeline.artifacts import write_atomically
from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import ARCHITECTURE_FILE, SAFETENSORS_DTYPES, copy_tokenizer, write_architecture
from pipeline.model.shards import DTYPE_BYTES, INDEX_FILE, PlannedTensor, Shard, ShardLayout

CHUNK_BYTES = 16 * 2**20
_MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor in a safetensors file: `offset` is that of its first byte, `dtype` as the file spells it."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a safetensors file lies; its header alone is read.

    Raises:
        CheckpointError: when the file is missing, cut off or not safetensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: make or download it again")
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        data_begin = 8 + header_bytes
        if not 0 < header_bytes <= min(_MAX_HEADER_BYTES, size_bytes - 8):
            raise CheckpointError(f"{path} ({size_bytes:,} bytes) is cut off or not safetensors: make it again")
        text = file.read(header_bytes)
    tensors = {}
    try:
        for name, entry in json.loads(text).items():
            if name != "__metadata__":
                begin, end = map(int, entry["data_offsets"])
                shape = tuple(map(int, entry["shape"]))
                tensor = StoredTensor(path=path, offset=data_begin + begin, dtype=str(entry["dtype"]), shape=shape)
                tensors[name] = tensor, range(begin, end)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{path} has no safetensors header: make it again") from err
    for name, (tensor, place) in tensors.items():
        _require_whole(name, tensor, place, data_bytes=size_bytes - data_begin)
    return {name: tensor for name, (tensor, _) in tensors.items()}


def read_chunks(stored: StoredTensor, *, dtype: str) -> Iterator[memoryview]:
    """Read a tensor's values as `dtype` in chunks of at most 16 MiB; a chunk is valid until the next one is taken.

    Raises:
        CheckpointError: when the file ends before the tensor does.
    """
    left_bytes = math.prod(stored.shape) * DTYPE_BYTES[stored.dtype]
    buffer = bytearray(min(CHUNK_BYTES, left_bytes))
    with stored.path.open("rb") as file:
        file.seek(stored.offset)
        while left_bytes:
            chunk = memoryview(buffer)[: min(len(buffer), left_bytes)]
            if file.readinto(chunk) != len(chunk):
                raise CheckpointError(f"{stored.path} was cut off while it was read: make it again")
            left_bytes -= len(chunk)
            yield chunk if dtype == stored.dtype else _converted(chunk, stored.dtype, dtype)


def stream_checkpoint(
    directory: Path,
    *,
    architecture: Architecture,
    layout: ShardLayout,
    read: Callable[[PlannedTensor], Iterable[memoryview]],
    tokenizer_dir: Path,
) -> None:
    """Write a checkpoint tensor by tensor; until its last file is there, nothing in the directory can be loaded.

    A shard gets its name when it is complete, the index follows the shards, and architecture.json comes last. An
    earlier checkpoint in the directory is removed first, in the opposite order.

    Args:
        directory: where the files go; made where it is missing.
        architecture: what the tensors are.
        layout: the files to write, from `plan_shards` of that architecture.
        read: gives the bytes of a tensor in the planned dtype, in turn; each tensor is asked for once.
        tokenizer_dir: a checkpoint to copy the tokenizer files from.

    Raises:
        CheckpointError: when `read` gives another number of bytes than is planned, or the tokenizer is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _remove_checkpoint(directory)
    for shard in layout.shards:
        _write_shard(directory, shard, read)
    if layout.index is not None:
        write_atomically(directory / INDEX_FILE, layout.index)
    copy_tokenizer(tokenizer_dir, directory)
    write_architecture(directory, architecture)


def _require_whole(name: str, tensor: StoredTensor, place: range, *, data_bytes: int) -> None:
    if not 0 <= place.start <= place.stop <= data_bytes:
        raise CheckpointError(
            f"{tensor.path} has {data_bytes:,} bytes of tensors, its header puts {name} at {place.start:,} to "
            f"{place.stop:,}: it is cut off, make it again"
        )
    # A dtype that is not a weight's is refused by whoever wants the tensor.
    if tensor.dtype in DTYPE_BYTES and len(place) != DTYPE_BYTES[tensor.dtype] * math.prod(tensor.shape):
        raise CheckpointError(
            f"{tensor.path} holds {len(place):,} bytes of {name}, which is {tensor.dtype} of shape {tensor.shape}: it "
            "is not safetensors, make it again"
        )


def _remove_checkpoint(directory: Path) -> None:
    (directory / ARCHITECTURE_FILE).unlink(missing_ok=True)
    (directory / INDEX_FILE).unlink(missing_ok=True)
    for pattern in ("model*.safetensors", ".model*.safetensors.part"):
        for old in directory.glob(pattern):
            old.unlink()  # an earlier checkpoint may have had more shards


def _write_shard(directory: Path, shard: Shard, read: Callable[[PlannedTensor], Iterable[memoryview]]) -> None:
    part = directory / f".{shard.file_name}.part"
    with part.open("wb") as file:
        file.write(shard.header)
        for tensor in shard.tensors:
            written_bytes = sum(file.write(chunk) for chunk in read(tensor))
            if written_bytes != tensor.num_bytes:
                raise CheckpointError(
                    f"{part}: {tensor.name} was read as {written_bytes:,} bytes, {tensor.num_bytes:,} are planned"
                )
    part.replace(directory / shard.file_name)


def _converted(chunk: memoryview, stored: str, wanted: str) -> memoryview:
    values = torch.frombuffer(chunk, dtype=SAFETENSORS_DTYPES[stored])
    converted = bytearray(values.numel() * DTYPE_BYTES[wanted])
    torch.frombuffer(converted, dtype=SAFETENSORS_DTYPES[wanted]).copy_(values)
    return memoryview(converted)
