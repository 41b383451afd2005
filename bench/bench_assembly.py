"""What assembling a child of Llama-3.1-8B takes: python bench/bench_assembly.py [--layers 32] [--dir DIRECTORY].

The parent is random bf16 in shards, the library random fp32 blocks; every fourth layer is the parent's, the others take
an FFN of half or a quarter of the width, half the key/value heads, or no attention. A process of its own assembles the
child, from disk to disk: sources are dropped from the page cache first, and what is written is flushed before the clock
stops. The same is asked of a plain copy of the child's files. 32 layers need 50 GB of disk.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from pipeline.architecture import NO_ATTENTION, Architecture, BlockSpec, gqa, swiglu
from pipeline.artifacts import ArtifactStore
from pipeline.hardware import describe_hardware
from pipeline.model.architecture_files import load_architecture
from pipeline.model.checkpoint import TensorReader
from pipeline.model.random_parent import make_random_parent
from pipeline.model.shards import PlannedTensor, checkpoint_shapes, plan_shards
from pipeline.model.streaming import CHUNK_BYTES, stream_checkpoint
from pipeline.puzzle.assemble import assemble_child
from pipeline.puzzle.library import (
    BlockKey,
    BlockRecord,
    LibraryEntry,
    LibraryIndex,
    Subblock,
    load_block,
    publish_block,
    trained_entry,
)
from pipeline.recipe import RandomParent

SHAPE = "llama-3.1-8b-instruct"
MAX_RSS_GIB = 2.0
TOKENIZER = RandomParent(
    kind="random",
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
    initializer_range=0.02,
    tie_word_embeddings=True,
    seed=0,
)


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """What one assembly took, as the process that did it was told by the kernel."""

    wall_s: float
    peak_rss_bytes: int
    read_bytes: int
    written_bytes: int


def main() -> None:
    """Make the parent and the library, assemble, copy, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="layers of the 8B shape, at most 32 (default: 8)")
    parser.add_argument("--dir", type=Path, default=None, help="where the temporary files go (default: $TMPDIR)")
    arguments = parser.parse_args()
    whole = load_architecture(SHAPE)
    parent = whole.with_blocks(whole.blocks[: arguments.layers])
    with tempfile.TemporaryDirectory(prefix="refit-bench-", dir=arguments.dir) as directory:
        root = Path(directory)
        make_parent(root, parent)
        blocks = child_blocks(parent)
        index, num_blocks = make_library(ArtifactStore(root / "store"), parent.with_blocks(blocks), parent)
        forget(root)
        # The high-water mark is that of the process, so it must have done nothing else.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            assembly = executor.submit(assemble, root, blocks, index).result()
        weights = sorted((root / "child").glob("*.safetensors"))
        child_bytes = sum(path.stat().st_size for path in weights)
        copy_s = copy_plainly(weights, root / "copy")
        check_library_tensors(root, blocks, index)
    peak_gib, child_gb = assembly.peak_rss_bytes / 2**30, child_bytes / 1e9
    print(describe_hardware())
    print(f"{SHAPE} at {arguments.layers} layers: child of {child_gb:.2f} GB, {num_blocks} blocks of the library")
    print(f"peak RSS {peak_gib:.2f} GiB of the whole process ({MAX_RSS_GIB / peak_gib:.1f} times below 2 GiB)")
    print(
        f"bytes written / child {assembly.written_bytes / child_bytes:.4f}, bytes read / child "
        f"{assembly.read_bytes / child_bytes:.4f} (fp32 blocks are twice what they become)"
    )
    print(
        f"{assembly.wall_s:.1f} s: {child_gb / assembly.wall_s:.2f} GB/s; plain copy of the same bytes {copy_s:.1f} s: "
        f"{child_gb / copy_s:.2f} GB/s; assembly / copy {assembly.wall_s / copy_s:.2f}"
    )


def child_blocks(parent: Architecture) -> tuple[BlockSpec, ...]:
    """Return a child that takes each kind of block from the library in turn."""
    attention, ffn = parent.blocks[0].attention, parent.blocks[0].ffn
    assert attention.num_key_value_heads is not None
    assert ffn.intermediate_size is not None
    kinds = (
        (attention, ffn),
        (attention, swiglu(ffn.intermediate_size // 2)),
        (gqa(attention.num_key_value_heads // 2), ffn),
        (NO_ATTENTION, swiglu(ffn.intermediate_size // 4)),
    )
    return tuple(
        BlockSpec(attention=kinds[layer % 4][0], ffn=kinds[layer % 4][1], parent_layers=(layer,))
        for layer in range(parent.num_hidden_layers)
    )


def make_parent(root: Path, parent: Architecture) -> None:
    """Write a bf16 checkpoint of random bits."""
    make_random_parent(TOKENIZER, out_dir=root / "tokenizer")
    stream_checkpoint(
        root / "parent",
        architecture=parent,
        layout=plan_shards(parent, dtype_of=lambda _: "BF16"),
        read=random_bits,
        tokenizer_dir=root / "tokenizer",
    )


def random_bits(tensor: PlannedTensor) -> Iterator[memoryview]:
    """Return as many random bytes as the tensor has."""
    for begin in range(0, tensor.num_bytes, CHUNK_BYTES):
        yield memoryview(os.urandom(min(CHUNK_BYTES, tensor.num_bytes - begin)))


def make_library(store: ArtifactStore, child: Architecture, parent: Architecture) -> tuple[LibraryIndex, int]:
    """Publish a random fp32 block for each subblock that is not the parent's; return the index and their number."""
    shapes, generator = checkpoint_shapes(child), torch.Generator().manual_seed(0)
    layers: dict[str, dict[Subblock, dict[str, LibraryEntry]]] = {}
    num_blocks = 0
    for key, starts in library_keys(child.blocks, parent.blocks[0]):
        prefix = f"model.layers.{key.layer}."
        tensors = {
            name.removeprefix(prefix): torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
            if name.startswith(tuple(prefix + start for start in starts))
        }
        record = BlockRecord(
            layer=key.layer, subblock=key.subblock, variant=key.variant, initial_loss=1.0, final_loss=1.0, curve=()
        )
        artifact = publish_block(store, f"block-{num_blocks}", tensors=tensors, record=record, wall_s=0.0)
        layers.setdefault(str(key.layer), {}).setdefault(key.subblock, {})[key.variant] = trained_entry(artifact)
        num_blocks += 1
    return LibraryIndex(layers=layers), num_blocks


def library_keys(blocks: tuple[BlockSpec, ...], parent: BlockSpec) -> Iterator[tuple[BlockKey, tuple[str, ...]]]:
    """Return what the child takes from the library, each with the starts of its tensors' names."""
    for layer, block in enumerate(blocks):
        if block.attention != parent.attention and block.attention.kind != "no_op":
            key = BlockKey(layer=layer, subblock="attention", variant=block.attention.key)
            yield key, ("input_layernorm.", "self_attn.")
        if block.ffn != parent.ffn:
            yield BlockKey(layer=layer, subblock="ffn", variant=block.ffn.key), ("mlp.", "post_attention_layernorm.")


def assemble(root: Path, blocks: tuple[BlockSpec, ...], index: LibraryIndex) -> Assembly:
    """Assemble and flush the child; runs in a process of its own."""
    before, began = io_bytes(), time.perf_counter()
    assemble_child(root / "child", blocks, parent_dir=root / "parent", index=index, store=ArtifactStore(root / "store"))
    after = io_bytes()
    flush(root / "child")
    return Assembly(
        wall_s=time.perf_counter() - began,
        # Not getrusage: its peak is inherited from whatever process started this one.
        peak_rss_bytes=1024 * int(proc_field("status", "VmHWM").removesuffix(" kB")),
        read_bytes=after[0] - before[0],
        written_bytes=after[1] - before[1],
    )


def io_bytes() -> tuple[int, int]:
    """Return the bytes that this process has read and written by system calls, whatever the page cache held."""
    return int(proc_field("io", "rchar")), int(proc_field("io", "wchar"))


def proc_field(file: str, name: str) -> str:
    """Return one field of what the kernel says of this process."""
    lines = (Path("/proc/self") / file).read_text(encoding="ascii").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))


def copy_plainly(files: list[Path], directory: Path) -> float:
    """Return the seconds that copying and flushing the files takes."""
    directory.mkdir()
    forget(files[0].parent)
    began = time.perf_counter()
    for path in files:
        shutil.copyfile(path, directory / path.name)
    flush(directory)
    return time.perf_counter() - began


def flush(directory: Path) -> None:
    """Wait until every file is on the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def forget(directory: Path) -> None:
    """Drop every file from the page cache."""
    flush(directory)
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_library_tensors(root: Path, blocks: tuple[BlockSpec, ...], index: LibraryIndex) -> None:
    """Hold every tensor from the library against torch's own conversion of it."""
    child, store = TensorReader(root / "child"), ArtifactStore(root / "store")
    for key, _ in library_keys(blocks, blocks[0]):
        for name, tensor in load_block(store, index, key).items():
            assert torch.equal(child.read(f"model.layers.{key.layer}.{name}"), tensor.to(torch.bfloat16)), (key, name)


if __name__ == "__main__":
    main()
