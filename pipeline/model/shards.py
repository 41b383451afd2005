"""Where every tensor of a checkpoint lies: files, headers and byte ranges, from shapes alone. No torch, no files.

A safetensors file is 8 bytes with the length of its header (little-endian), the header (JSON: dtype, shape and byte
range of each tensor by name), then the tensors' bytes: https://github.com/huggingface/safetensors#format. Planned files
are byte for byte those that the safetensors library writes for the same tensors.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.architecture import Architecture, BlockSpec

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SUBBLOCKS_DIR = "subblocks_safetensors"  # where AnyModel checkpoints have their shards; nothing here writes there
MAX_SHARD_BYTES = 5 * 10**9

# The dtypes of weights, as safetensors spells them and in the order in which its files hold them.
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_DTYPE_ORDER = tuple(DTYPE_BYTES)
_HEADER_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTensor:
    """One tensor of a checkpoint to be written; `dtype` is a key of DTYPE_BYTES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of weights; its tensors in the order of their bytes."""

    file_name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def header(self) -> bytes:
        """Everything before the first tensor's bytes, the header's length included."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for tensor in self.tensors:
            end = begin + tensor.num_bytes
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """The size of the file, header included."""
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLayout:
    """The weight files of one checkpoint; one alone is model.safetensors and has no index."""

    shards: tuple[Shard, ...]

    @property
    def tensor_bytes(self) -> int:
        """The size of all tensors, headers left out: `total_size` in the index."""
        return sum(tensor.num_bytes for shard in self.shards for tensor in shard.tensors)

    @property
    def num_bytes(self) -> int:
        """The size of all shards on disk."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def index(self) -> bytes | None:
        """The content of model.safetensors.index.json, or None where there is a single file."""
        if len(self.shards) == 1:
            return None
        weight_map = {tensor.name: shard.file_name for shard in self.shards for tensor in shard.tensors}
        return index_json(weight_map, tensor_bytes=self.tensor_bytes)


def index_json(weight_map: dict[str, str], *, tensor_bytes: int) -> bytes:
    """Return the index of a sharded checkpoint, from the file of each tensor."""
    index = {"metadata": {"total_size": tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=1) + "\n").encode()


def shard_name(number: int, *, num_shards: int) -> str:
    """Return the name of shard `number` of `num_shards`, counted from 1."""
    return f"model-{number:05d}-of-{num_shards:05d}.safetensors"


def plan_shards(architecture: Architecture, *, dtype_of: Callable[[str], str]) -> ShardLayout:
    """Return the files that a checkpoint of this architecture is written as, none above 5 GB of tensors if it can be.

    Args:
        architecture: parent or child; a tied head is stored once, as the embedding.
        dtype_of: the dtype of the tensor of that name, a key of DTYPE_BYTES.
    """
    groups: list[list[PlannedTensor]] = [[]]
    group_bytes = 0
    for name, shape in checkpoint_shapes(architecture).items():
        tensor = PlannedTensor(name=name, dtype=dtype_of(name), shape=shape)
        if groups[-1] and group_bytes + tensor.num_bytes > MAX_SHARD_BYTES:
            groups.append([])
            group_bytes = 0
        groups[-1].append(tensor)
        group_bytes += tensor.num_bytes
    names = [WEIGHTS_FILE]
    if len(groups) > 1:
        names = [shard_name(number, num_shards=len(groups)) for number in range(1, len(groups) + 1)]
    return ShardLayout(
        shards=tuple(
            Shard(file_name=name, tensors=tuple(sorted(group, key=_place_in_file)))
            for name, group in zip(names, groups, strict=True)
        )
    )


def checkpoint_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape by its name, in the order in which tensors are dealt to the shards.

    First what lies outside the layers, then layer by layer the attention subblock and the FFN, each by name.
    """
    hidden = architecture.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    if not architecture.tie_word_embeddings:
        shapes["lm_head.weight"] = (architecture.vocab_size, hidden)
    shapes["model.embed_tokens.weight"] = (architecture.vocab_size, hidden)
    shapes["model.norm.weight"] = (hidden,)
    for layer, block in enumerate(architecture.blocks):
        for subblock in (_attention_shapes(architecture, block), _ffn_shapes(architecture, block)):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in sorted(subblock)}
    return shapes


def _attention_shapes(model: Architecture, block: BlockSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, spec = model.hidden_size, block.attention
    if spec.kind == "no_op":
        return
    yield "input_layernorm.weight", (hidden,)
    if spec.kind == "linear":
        yield from _linear("self_attn.linear_attn", hidden, hidden, bias=model.attention_bias)
        return
    assert spec.num_key_value_heads is not None
    query, key_value = model.num_attention_heads * model.head_dim, spec.num_key_value_heads * model.head_dim
    for projection, num_out, num_in in (
        ("q_proj", query, hidden),
        ("k_proj", key_value, hidden),
        ("v_proj", key_value, hidden),
        ("o_proj", hidden, query),
    ):
        yield from _linear(f"self_attn.{projection}", num_out, num_in, bias=model.attention_bias)


def _ffn_shapes(model: Architecture, block: BlockSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, spec = model.hidden_size, block.ffn
    if spec.kind == "no_op":
        return
    yield "post_attention_layernorm.weight", (hidden,)
    if spec.kind == "linear":
        yield from _linear("mlp.linear_mlp", hidden, hidden, bias=model.mlp_bias)
        return
    assert spec.intermediate_size is not None
    yield from _linear("mlp.gate_proj", spec.intermediate_size, hidden, bias=model.mlp_bias)
    yield from _linear("mlp.up_proj", spec.intermediate_size, hidden, bias=model.mlp_bias)
    yield from _linear("mlp.down_proj", hidden, spec.intermediate_size, bias=model.mlp_bias)


def _linear(name: str, num_out: int, num_in: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (num_out, num_in)
    if bias:
        yield f"{name}.bias", (num_out,)


def _place_in_file(tensor: PlannedTensor) -> tuple[int, str]:
    return _DTYPE_ORDER.index(tensor.dtype), tensor.name
