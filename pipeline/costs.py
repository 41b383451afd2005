"""Closed-form parameters, bytes and FLOPs of any block or model; exact for ties, biases and explicit head_dim.

Every count is checked against hand-counted tensors in tests/pipeline/test_costs.py.
"""

from pipeline.architecture import Architecture, AttentionSpec, BlockSpec, FFNSpec

BYTES_PER_PARAMETER = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0}
MIB = 2**20


def attention_parameters(model: Architecture, spec: AttentionSpec) -> int:
    """Return the parameters of one attention subblock with its norm; zero for a no-op."""
    if spec.kind == "no_op":
        return 0
    hidden, bias = model.hidden_size, model.attention_bias
    if spec.kind == "linear":
        return hidden * hidden + hidden + hidden * bias
    query = model.num_attention_heads * model.head_dim
    assert spec.num_key_value_heads is not None
    key_value = 2 * spec.num_key_value_heads * model.head_dim
    weights = hidden * (query + key_value) + query * hidden
    return weights + hidden + (query + key_value + hidden) * bias


def ffn_parameters(model: Architecture, spec: FFNSpec) -> int:
    """Return the parameters of one FFN subblock with its norm; zero for a no-op."""
    if spec.kind == "no_op":
        return 0
    hidden, bias = model.hidden_size, model.mlp_bias
    if spec.kind == "linear":
        return hidden * hidden + hidden + hidden * bias
    assert spec.intermediate_size is not None
    return 3 * hidden * spec.intermediate_size + hidden + (2 * spec.intermediate_size + hidden) * bias


def block_parameters(model: Architecture, block: BlockSpec) -> int:
    """Return the parameters of one layer."""
    return attention_parameters(model, block.attention) + ffn_parameters(model, block.ffn)


def embedding_parameters(model: Architecture) -> int:
    """Return the parameters outside the layers: embeddings, final norm, and the head where it is not tied."""
    table = model.vocab_size * model.hidden_size
    return table * (1 if model.tie_word_embeddings else 2) + model.hidden_size


def num_parameters(model: Architecture) -> int:
    """Return the parameters of the whole model, tied tensors counted once."""
    return embedding_parameters(model) + sum(block_parameters(model, block) for block in model.blocks)


def kv_values_per_token(model: Architecture, spec: AttentionSpec) -> int:
    """Return how many cache values one attention subblock keeps for each token; times bytes per value gives bytes."""
    return 2 * (spec.num_key_value_heads or 0) * model.head_dim


def kv_bytes_per_token(model: Architecture, *, bytes_per_value: float) -> float:
    """Return the key/value cache bytes of the whole model for each cached token."""
    return bytes_per_value * sum(kv_values_per_token(model, block.attention) for block in model.blocks)


def weight_mib(num_parameters: int, *, bytes_per_parameter: float) -> float:
    """Return the memory of that many parameters in MiB."""
    return num_parameters * bytes_per_parameter / MIB


def forward_flops_per_token(model: Architecture, *, context_tokens: int) -> float:
    """Return the multiply-add FLOPs of one token's forward pass that attends to `context_tokens`, head included.

    Two per weight of every matrix (norms and the embedding look-up are left out), plus 4 * heads * head_dim * context
    for the scores and the weighted sum of each attention layer.
    """
    flops = 2.0 * model.vocab_size * model.hidden_size
    for block in model.blocks:
        matrices = block_parameters(model, block) - model.hidden_size * (
            (block.attention.kind != "no_op") + (block.ffn.kind != "no_op")
        )
        flops += 2.0 * matrices
        if block.attention.kind == "gqa":
            flops += 4.0 * model.num_attention_heads * model.head_dim * context_tokens
    return flops
