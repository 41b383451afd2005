"""Writing a model as one GGUF file of llama.cpp's architecture `deci`, with the `gguf` package alone.

deci reads per-layer arrays: head_count 0 is no attention, head_count > 0 with head_count_kv 0 is linear attention, and
feed_forward_length is the FFN's width. A layer with attention and no FFN would lose its attention (its graph goes on to
the next layer before the residual sum), so it gets an FFN whose weights are zero: x + 0.

Hugging Face rotates the two halves of a head against each other, llama.cpp neighbouring pairs: the rows of query and
key matrices are reordered head by head. llama3 scaling is written as the tensor rope_freqs, one divisor per pair.

Letters: D hidden_size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, RopeScaling, swiglu
from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import TORCH_DTYPES, TensorReader, read_architecture
from pipeline.model.gguf_tokenizer import add_tokenizer
from pipeline.model.repacking import RepackedTensors, portable
from pipeline.model.shards import checkpoint_shapes
from pipeline.recipe import GGUFPrecision

ARCHITECTURE_NAME = "deci"
# llama.cpp's blocks of quantised values are 32 wide; less would cost nothing and could not be quantised.
ZERO_FFN_WIDTH = 32

_FILE_TYPES = {
    "fp32": LlamaFileType.ALL_F32,
    "fp16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
}
_STORED_TYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.linear_attn.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _PlannedTensor:
    """One tensor of the file: its shape and dtype are known before its values are read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def export_gguf(checkpoint_dir: Path, path: Path, *, precision: GGUFPrecision) -> None:
    """Write a checkpoint, re-packed, with its tokenizer.

    Raises:
        CheckpointError: for what `write_gguf` refuses, or a tokenizer that llama.cpp cannot be told of.
    """
    repacking = portable(read_architecture(checkpoint_dir))
    write_gguf(
        path,
        architecture=repacking.architecture,
        read=RepackedTensors(TensorReader(checkpoint_dir), repacking).read,
        precision=precision,
        tokenizer_dir=checkpoint_dir,
    )


def write_gguf(
    path: Path,
    *,
    architecture: Architecture,
    read: Callable[[str], Tensor],
    precision: GGUFPrecision,
    tokenizer_dir: Path | None,
) -> None:
    """Write a model, one tensor in memory at a time.

    Args:
        path: the file; its directory is there.
        architecture: a model whose layer 0 has attention; `portable` makes one.
        read: returns a tensor by its Hugging Face name.
        precision: of matrices; norms and rope_freqs are fp32 always, as llama.cpp wants them.
        tokenizer_dir: a checkpoint whose tokenizer is written too; None for a file that takes token ids alone.

    Raises:
        CheckpointError: for linear FFNs and biases, which deci does not have, and for values beyond fp16's range.
    """
    _require_expressible(architecture)
    writer = GGUFWriter(path, ARCHITECTURE_NAME)
    _add_shape(writer, architecture, precision=precision)
    if tokenizer_dir is None:
        writer.add_tokenizer_model("none")
    else:
        add_tokenizer(
            writer, tokenizer_dir, vocab_size=architecture.vocab_size, end_token_ids=architecture.eos_token_ids
        )
    planned = list(_planned_tensors(architecture, read, precision=precision))
    for tensor in planned:
        stored = np.dtype(np.float32 if tensor.dtype == torch.float32 else np.float16)
        num_bytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, stored, num_bytes, raw_dtype=_STORED_TYPES[tensor.dtype])
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(_as_stored(tensor))


def _require_expressible(architecture: Architecture) -> None:
    linear = [layer for layer, block in enumerate(architecture.blocks) if block.ffn.kind == "linear"]
    if linear:
        raise CheckpointError(f"layer {linear[0]} has a linear FFN, which llama.cpp's deci does not have")
    if architecture.attention_bias or architecture.mlp_bias:
        raise CheckpointError("the model has biases, which are not written into GGUF files of architecture deci")
    if architecture.blocks[0].attention == NO_ATTENTION:
        raise CheckpointError(
            "layer 0 has no attention, and llama.cpp would not load the file: re-pack the model first"
        )


def _add_shape(writer: GGUFWriter, architecture: Architecture, *, precision: GGUFPrecision) -> None:
    heads, head_dim = architecture.num_attention_heads, architecture.head_dim
    attention = [block.attention for block in architecture.blocks]
    writer.add_file_type(_FILE_TYPES[precision])
    writer.add_block_count(architecture.num_hidden_layers)
    writer.add_context_length(architecture.max_position_embeddings)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_vocab_size(architecture.vocab_size)
    writer.add_layer_norm_rms_eps(architecture.rms_norm_eps)
    writer.add_rope_freq_base(architecture.rope_theta)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_head_count([0 if spec.kind == "no_op" else heads for spec in attention])
    writer.add_head_count_kv([spec.num_key_value_heads or 0 for spec in attention])
    writer.add_feed_forward_length([block.ffn.intermediate_size or 0 for block in _with_zero_ffns(architecture).blocks])


def _with_zero_ffns(architecture: Architecture) -> Architecture:
    """Return the architecture with an FFN in every layer that has attention and none."""
    return architecture.with_blocks(
        [
            block.model_copy(update={"ffn": swiglu(ZERO_FFN_WIDTH)})
            if block.ffn == NO_FFN and block.attention != NO_ATTENTION
            else block
            for block in architecture.blocks
        ]
    )


def _planned_tensors(
    architecture: Architecture, read: Callable[[str], Tensor], *, precision: GGUFPrecision
) -> Iterator[_PlannedTensor]:
    own = set(checkpoint_shapes(architecture))
    for name, shape in checkpoint_shapes(_with_zero_ffns(architecture)).items():
        yield _PlannedTensor(
            name=_gguf_name(name),
            shape=shape,
            dtype=torch.float32 if len(shape) == 1 else TORCH_DTYPES[precision],
            read=_reading(name, shape, read, architecture=architecture) if name in own else _zeros(shape),
        )
    if architecture.rope_scaling is not None:
        factors = rope_factors(architecture.rope_scaling, theta=architecture.rope_theta, head_dim=architecture.head_dim)
        yield _PlannedTensor(
            name="rope_freqs.weight", shape=tuple(factors.shape), dtype=torch.float32, read=lambda: factors
        )


def _reading(
    name: str, shape: tuple[int, ...], read: Callable[[str], Tensor], *, architecture: Architecture
) -> Callable[[], Tensor]:
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return lambda: read(name)
    return lambda: paired_rows(read(name), num_heads=shape[0] // architecture.head_dim)


def _zeros(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape)


def _as_stored(tensor: _PlannedTensor) -> np.ndarray:
    values = tensor.read().to(tensor.dtype).contiguous()
    if tensor.dtype == torch.float16 and not bool(values.isfinite().all()):
        raise CheckpointError(f"{tensor.name} has values beyond the range of fp16: give bf16 or fp32")
    return (values.view(torch.float16) if tensor.dtype == torch.bfloat16 else values).numpy()


def paired_rows(projection: Tensor, *, num_heads: int) -> Tensor:
    """Return the rows of a query or key matrix with each head's rotary pairs side by side: 0, d/2, 1, d/2 + 1, ..."""
    num_rows, num_columns = projection.shape
    halves = projection.reshape(num_heads, 2, num_rows // num_heads // 2, num_columns)
    return halves.transpose(1, 2).reshape(num_rows, num_columns)


def rope_factors(scaling: RopeScaling, *, theta: float, head_dim: int) -> Tensor:
    """Return, for each rotary pair, what llama3 scaling divides its frequency by.

    With wavelength w = 2 pi theta^(2i/d) and the original context c: 1 for w < c / high, the factor for w > c / low,
    and between them 1 / ((1 - s) / factor + s), s = (c / w - low) / (high - low).
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    turns = scaling.original_max_position_embeddings / (2 * math.pi * theta ** (pairs / head_dim))
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1.0 - share) / scaling.factor + share)).float()


def _gguf_name(name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    layer, _, relative = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER_NAMES[relative]}"
