"""Small architectures and checkpoints made by hand for the model tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.architecture import Architecture, AttentionSpec, BlockSpec, FFNSpec, RopeScaling, gqa, swiglu
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, build_model, rope_parameters
from pipeline.model.random_parent import make_random_parent
from pipeline.recipe import RandomParent

LLAMA3_ROPE = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)


def make_blocks(*specs: tuple[AttentionSpec, FFNSpec]) -> tuple[BlockSpec, ...]:
    return tuple(
        BlockSpec(attention=attention, ffn=ffn, parent_layers=(layer,)) for layer, (attention, ffn) in enumerate(specs)
    )


def make_architecture(**changes: Any) -> Architecture:
    """A parent of three layers, 4 heads over 2, FFN 48; `changes` are fields of Architecture."""
    fields = {
        "vocab_size": 320,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "pad_token_id": 2,
        "blocks": make_blocks(*[(gqa(2), swiglu(48))] * 3),
    }
    return Architecture(**(fields | changes))


def make_model(architecture: Architecture, *, seed: int = 0) -> HeterogeneousLlamaForCausalLM:
    """A model whose every tensor is random, norms and biases included, so that none can be mixed up unseen."""
    model = build_model(architecture, dtype=torch.float32, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.15, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return model


def make_llama(architecture: Architecture, *, seed: int = 0) -> LlamaForCausalLM:
    """The Llama of transformers, of the same shape and weights as `make_model`."""
    block = architecture.homogeneous_block()
    config = LlamaConfig(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=block.ffn.intermediate_size,
        num_hidden_layers=architecture.num_hidden_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_key_value_heads=block.attention.num_key_value_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_position_embeddings,
        rms_norm_eps=architecture.rms_norm_eps,
        rope_parameters=rope_parameters(architecture),
        tie_word_embeddings=architecture.tie_word_embeddings,
        attention_bias=architecture.attention_bias,
        mlp_bias=architecture.mlp_bias,
        bos_token_id=architecture.bos_token_id,
        eos_token_id=list(architecture.eos_token_ids),
        pad_token_id=architecture.pad_token_id,
    )
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(make_model(architecture, seed=seed).state_dict(), strict=True)
    return llama


def random_ids(num_tokens: int, *, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, (batch_size, num_tokens), generator=torch.Generator().manual_seed(seed))


def make_tokenizer_dir(directory: Path) -> Path:
    """A directory with the byte-level tokenizer of the random parent (320 tokens)."""
    config = RandomParent(
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
    make_random_parent(config, out_dir=directory)
    return directory


def layer_tensors(model: HeterogeneousLlamaForCausalLM, layer: int) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.model.layers[layer].state_dict().items()}


def num_elements(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
