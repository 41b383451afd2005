"""Initial weights of a variant from its parent's weights (Puzzle, appendix A). Pure: tensors in, tensors out.

Tensors are named relative to their layer: `self_attn.q_proj.weight`, `input_layernorm.weight`. A no-op has none.

Letters: D hidden_size, F intermediate_size, N query heads, K key/value heads, H head_dim.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.architecture import Architecture, AttentionSpec, FFNSpec
from pipeline.errors import RecipeError

_ATTENTION_NORM = "input_layernorm.weight"
_FFN_NORM = "post_attention_layernorm.weight"


def initial_attention(
    parent_tensors: Mapping[str, Tensor],
    *,
    architecture: Architecture,
    parent_spec: AttentionSpec,
    spec: AttentionSpec,
    head_order_K: Tensor | None,
) -> dict[str, Tensor]:
    """Return the attention subblock of `spec` cut from the parent's.

    Fewer key/value heads: each new head is the mean of a group of consecutive parent heads; or the first heads of
    `head_order_K` stay as they are, and each takes an equal share of the other heads' queries, whose columns of W_O
    are zero, so that the output is that of the kept heads alone and training may give the queries new work. Linear:
    W_O W_V, every token attending to itself alone, each V head repeated for the query heads that share it.

    Args:
        parent_tensors: the parent layer's tensors, named relative to the layer; others in it are left alone.
        architecture: the parent's sizes.
        parent_spec: what the parent's subblock is.
        spec: what the variant's is to be.
        head_order_K: the parent's key/value heads, most important first; None to average them.

    Raises:
        RecipeError: when the parent's heads cannot be grouped into the variant's.
    """
    if spec.kind == "no_op":
        return {}
    if spec == parent_spec:
        return _copy(parent_tensors, ("self_attn.", _ATTENTION_NORM))
    parent_heads = parent_spec.num_key_value_heads
    assert parent_heads is not None, "a parent's attention is never linear or a no-op"
    norm = {_ATTENTION_NORM: parent_tensors[_ATTENTION_NORM].clone()}
    if spec.kind == "linear":
        return norm | _linear_attention(parent_tensors, architecture=architecture, num_heads=parent_heads)
    heads = spec.num_key_value_heads
    assert heads is not None
    if parent_heads % heads:
        raise RecipeError(
            f"search_space.attention: {heads} key/value heads cannot be pooled from the parent's {parent_heads}; "
            f"give a divisor of {parent_heads}"
        )
    if head_order_K is not None:
        assert head_order_K.numel() == parent_heads
        return norm | _keep_heads(parent_tensors, architecture=architecture, order_K=head_order_K, num_heads=heads)
    tensors = _copy(parent_tensors, ("self_attn.q_proj.", "self_attn.o_proj."))
    for name in ("k_proj", "v_proj"):
        for part in _parts(architecture.attention_bias):
            tensors[f"self_attn.{name}.{part}"] = _pool_heads(
                parent_tensors[f"self_attn.{name}.{part}"], num_heads=heads, head_dim=architecture.head_dim
            )
    return norm | tensors


def initial_ffn(
    parent_tensors: Mapping[str, Tensor],
    *,
    architecture: Architecture,
    parent_spec: FFNSpec,
    spec: FFNSpec,
    channel_order_F: Tensor,
) -> dict[str, Tensor]:
    """Return the FFN subblock of `spec` cut from the parent's.

    Narrower: the most important channels stay, in their parent order. Linear: W_down W_up, the gate ignored.

    Args:
        parent_tensors: the parent layer's tensors, named relative to the layer; others in it are left alone.
        architecture: the parent's sizes.
        parent_spec: what the parent's subblock is.
        spec: what the variant's is to be.
        channel_order_F: the parent's channels, most important first.

    Raises:
        RecipeError: when the variant is wider than the parent.
    """
    if spec.kind == "no_op":
        return {}
    if spec == parent_spec:
        return _copy(parent_tensors, ("mlp.", _FFN_NORM))
    norm = {_FFN_NORM: parent_tensors[_FFN_NORM].clone()}
    if spec.kind == "linear":
        return norm | _linear_ffn(parent_tensors, has_bias=architecture.mlp_bias)
    width, parent_width = spec.intermediate_size, parent_spec.intermediate_size
    assert width is not None
    assert parent_width is not None, "a parent's FFN is never linear or a no-op"
    if width > parent_width:
        raise RecipeError(
            f"search_space.ffn: width {width} is above the parent's {parent_width}; variants are cut from the parent"
        )
    assert channel_order_F.numel() == parent_width
    kept_F = channel_order_F[:width].sort().values
    tensors = {"mlp.down_proj.weight": parent_tensors["mlp.down_proj.weight"][:, kept_F].clone()}
    for name in ("gate_proj", "up_proj"):
        for part in _parts(architecture.mlp_bias):
            tensors[f"mlp.{name}.{part}"] = parent_tensors[f"mlp.{name}.{part}"][kept_F].clone()
    if architecture.mlp_bias:
        tensors["mlp.down_proj.bias"] = parent_tensors["mlp.down_proj.bias"].clone()
    return norm | tensors


def _linear_attention(
    parent_tensors: Mapping[str, Tensor], *, architecture: Architecture, num_heads: int
) -> dict[str, Tensor]:
    group = architecture.num_attention_heads // num_heads
    output_DX, value_XD = parent_tensors["self_attn.o_proj.weight"], parent_tensors["self_attn.v_proj.weight"]
    precise = torch.promote_types(output_DX.dtype, torch.float32)

    def repeated(value: Tensor) -> Tensor:
        by_head = value.to(precise).unflatten(0, (num_heads, architecture.head_dim))
        return by_head.repeat_interleave(group, dim=0).flatten(0, 1)

    weight_DD = output_DX.to(precise) @ repeated(value_XD)
    tensors = {"self_attn.linear_attn.weight": weight_DD.to(output_DX.dtype)}
    if architecture.attention_bias:
        bias_D = output_DX.to(precise) @ repeated(parent_tensors["self_attn.v_proj.bias"])
        bias_D += parent_tensors["self_attn.o_proj.bias"].to(precise)
        tensors["self_attn.linear_attn.bias"] = bias_D.to(output_DX.dtype)
    return tensors


def _linear_ffn(parent_tensors: Mapping[str, Tensor], *, has_bias: bool) -> dict[str, Tensor]:
    down_DF, up_FD = parent_tensors["mlp.down_proj.weight"], parent_tensors["mlp.up_proj.weight"]
    precise = torch.promote_types(down_DF.dtype, torch.float32)
    tensors = {"mlp.linear_mlp.weight": (down_DF.to(precise) @ up_FD.to(precise)).to(down_DF.dtype)}
    if has_bias:
        bias_D = down_DF.to(precise) @ parent_tensors["mlp.up_proj.bias"].to(precise)
        bias_D += parent_tensors["mlp.down_proj.bias"].to(precise)
        tensors["mlp.linear_mlp.bias"] = bias_D.to(down_DF.dtype)
    return tensors


def _pool_heads(projection: Tensor, *, num_heads: int, head_dim: int) -> Tensor:
    """Return the mean of consecutive heads; `projection` is [K*H, D] or, for a bias, [K*H]."""
    precise = torch.promote_types(projection.dtype, torch.float32)  # a bf16 mean would round at every addition
    grouped = projection.to(precise).unflatten(0, (num_heads, -1, head_dim))
    return grouped.mean(dim=1).flatten(0, 1).to(projection.dtype)


def _keep_heads(
    parent_tensors: Mapping[str, Tensor], *, architecture: Architecture, order_K: Tensor, num_heads: int
) -> dict[str, Tensor]:
    """Return the projections with the first `num_heads` of `order_K` and all query heads, the orphaned ones silent."""
    kept, dropped = order_K[:num_heads].sort().values, order_K[num_heads:].sort().values
    # Query heads that share a key/value head stand together: a kept head's own first, then those it takes over.
    served_by_kept = torch.cat([kept[:, None], dropped.reshape(num_heads, -1)], dim=1).flatten()
    group = architecture.num_attention_heads // order_K.numel()
    queries_N = (served_by_kept[:, None] * group + torch.arange(group)).flatten()
    silent_N = torch.isin(served_by_kept, dropped).repeat_interleave(group)

    def by_head(name: str, dim: int) -> Tensor:
        return parent_tensors[f"self_attn.{name}"].unflatten(dim, (-1, architecture.head_dim))

    tensors = {}
    for part in _parts(architecture.attention_bias):
        tensors[f"self_attn.q_proj.{part}"] = by_head(f"q_proj.{part}", 0)[queries_N].flatten(0, 1)
        for name in ("k_proj", "v_proj"):
            tensors[f"self_attn.{name}.{part}"] = by_head(f"{name}.{part}", 0)[kept].flatten(0, 1)
    output_DNH = by_head("o_proj.weight", 1)[:, queries_N]
    output_DNH[:, silent_N] = 0
    tensors["self_attn.o_proj.weight"] = output_DNH.flatten(1, 2)
    if architecture.attention_bias:
        tensors["self_attn.o_proj.bias"] = parent_tensors["self_attn.o_proj.bias"].clone()
    return tensors


def _copy(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items() if name.startswith(prefixes)}


def _parts(has_bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if has_bias else ("weight",)
