"""Closed-form parameters, bytes and FLOPs of any block or model; exact for ties, biases and explicit head_dim.

Where devices share a model, each holds a key/value head at least: n devices hold max(n, h) of h heads, and as many
projections and caches of them. `num_devices` counts what all of them hold together. Norms, which every device holds
whole, are counted once: seven more of each are 0.01% of a Llama-70B's block.

Every count is checked against hand-counted tensors in tests/pipeline/test_costs.py.
"""

from dataclasses import dataclass

from pipeline.architecture import Architecture, AttentionSpec, BlockSpec, FFNSpec

BYTES_PER_PARAMETER = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0}
# What runs between matmuls stays in 16 bits where weights and caches are narrower; norms compute in 32.
LEAST_ACTIVATION_BYTES = 2.0
NORM_BYTES = 4.0
MIB = 2**20


def attention_parameters(model: Architecture, spec: AttentionSpec, *, num_devices: int = 1) -> int:
    """Return the parameters of one attention subblock with its norm; zero for a no-op."""
    if spec.kind == "no_op":
        return 0
    hidden, bias = model.hidden_size, model.attention_bias
    if spec.kind == "linear":
        return hidden * hidden + hidden + hidden * bias
    query = model.num_attention_heads * model.head_dim
    key_value = kv_values_per_token(model, spec, num_devices=num_devices)
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


def block_parameters(model: Architecture, block: BlockSpec, *, num_devices: int = 1) -> int:
    """Return the parameters of one layer."""
    attention = attention_parameters(model, block.attention, num_devices=num_devices)
    return attention + ffn_parameters(model, block.ffn)


def embedding_parameters(model: Architecture) -> int:
    """Return the parameters outside the layers: embeddings, final norm, and the head where it is not tied."""
    table = model.vocab_size * model.hidden_size
    return table * (1 if model.tie_word_embeddings else 2) + model.hidden_size


def num_parameters(model: Architecture, *, num_devices: int = 1) -> int:
    """Return the parameters of the whole model, tied tensors counted once."""
    blocks = sum(block_parameters(model, block, num_devices=num_devices) for block in model.blocks)
    return embedding_parameters(model) + blocks


def kv_values_per_token(model: Architecture, spec: AttentionSpec, *, num_devices: int = 1) -> int:
    """Return how many cache values one attention subblock keeps for each token; times bytes per value gives bytes."""
    heads = spec.num_key_value_heads
    return 0 if heads is None else 2 * max(heads, num_devices) * model.head_dim


def kv_bytes_per_token(model: Architecture, *, bytes_per_value: float, num_devices: int = 1) -> float:
    """Return the key/value cache bytes of the whole model for each cached token."""
    values = sum(kv_values_per_token(model, block.attention, num_devices=num_devices) for block in model.blocks)
    return bytes_per_value * values


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedMemory:
    """What a model needs while it serves a batch, in bytes: what stays, and the most that it computes with at once."""

    weights_bytes: float
    cache_bytes: float
    activation_bytes: float

    @property
    def weights_and_cache_mib(self) -> float:
        """What stays for as long as the batch is served."""
        return (self.weights_bytes + self.cache_bytes) / MIB

    @property
    def total_mib(self) -> float:
        """All three."""
        return (self.weights_bytes + self.cache_bytes + self.activation_bytes) / MIB


def served_memory(
    model: Architecture,
    *,
    batch_size: int,
    prompt_tokens: int,
    generation_tokens: int,
    bytes_per_value: float,
    num_devices: int,
) -> ServedMemory:
    """Return the memory of all devices together; activations are those of the prefill, which a decode step is below."""
    prefill = {
        "batch_size": batch_size,
        "prompt_tokens": prompt_tokens,
        "bytes_per_value": bytes_per_value,
        "num_devices": num_devices,
    }
    blocks = max(block_activation_bytes(model, block, **prefill) for block in model.blocks)
    tokens = batch_size * (prompt_tokens + generation_tokens)
    return ServedMemory(
        weights_bytes=bytes_per_value * num_parameters(model, num_devices=num_devices),
        cache_bytes=tokens * kv_bytes_per_token(model, bytes_per_value=bytes_per_value, num_devices=num_devices),
        activation_bytes=max(blocks, outer_activation_bytes(model, **prefill)),
    )


def block_activation_bytes(
    model: Architecture,
    block: BlockSpec,
    *,
    batch_size: int,
    prompt_tokens: int,
    bytes_per_value: float,
    num_devices: int,
) -> float:
    """Return the most that one layer holds at once in the prefill of a batch, weights and cache aside.

    As PyTorch's eager modules hold it, with an attention that never writes its scores out; fused kernels hold less. Two
    hidden vectors per token, those of the embedding and of the layer's input, are held by who calls the layer. On top:

        norm        two hidden vectors in fp32
        attention   the normed one; queries, keys, values; then turning the queries by their positions, three more of
                    them, or the turned queries and three more of the keys
        FFN         what attention returned, unless it is a no-op; the normed one; gate, up and their product

    Over several devices each holds all hidden vectors, and its share of what is wider.
    """
    size = max(LEAST_ACTIVATION_BYTES, bytes_per_value)
    hidden = num_devices * model.hidden_size
    norm = 2 * hidden * NORM_BYTES
    held = 2 * hidden
    stages = [0.0]
    if block.attention.kind != "no_op":
        stages.append(size * held + norm)
    if block.attention.kind == "gqa":
        queries = model.num_attention_heads * model.head_dim
        both = kv_values_per_token(model, block.attention, num_devices=num_devices)
        turned = max(3 * queries, queries + 3 * both / 2)
        stages.append(size * (held + hidden + queries + both + turned))
    if block.ffn.kind != "no_op":
        held += hidden * (block.attention.kind != "no_op")
        stages.append(size * held + norm)
        stages.append(size * (held + hidden + 3 * (block.ffn.intermediate_size or 0)))
    positions = 2 * size * num_devices * model.head_dim * prompt_tokens  # cosines and sines
    return batch_size * prompt_tokens * max(stages) + positions


def outer_activation_bytes(
    model: Architecture, *, batch_size: int, prompt_tokens: int, bytes_per_value: float, num_devices: int
) -> float:
    """Return the most held at once outside the layers: at the final norm, or the logits of each prompt's last token."""
    size = max(LEAST_ACTIVATION_BYTES, bytes_per_value)
    hidden, tokens = num_devices * model.hidden_size, batch_size * prompt_tokens
    at_norm = tokens * (2 * size + 2 * NORM_BYTES) * hidden + 2 * size * num_devices * model.head_dim * prompt_tokens
    return max(at_norm, size * (tokens * hidden + batch_size * model.vocab_size))
