"""The architectures that every runtime is held against: each shows one thing that runtimes are known to differ in."""

from pathlib import Path

import torch

from pipeline.architecture import LINEAR_ATTENTION, LINEAR_FFN, NO_ATTENTION, NO_FFN, Architecture, gqa, swiglu
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, build_model
from tests.pipeline.model.builders import LLAMA3_ROPE, make_architecture, make_blocks, make_tokenizer_dir

# vLLM's CPU kernels take heads of 32 dimensions and more.
SHAPE = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 32, "max_position_embeddings": 256}
P, A, F, I = (gqa(4), swiglu(512)), (gqa(4), NO_FFN), (NO_ATTENTION, swiglu(512)), (NO_ATTENTION, NO_FFN)  # noqa: E741

CASES: dict[str, Architecture] = {
    name: make_architecture(**SHAPE | changes, blocks=make_blocks(*layers))
    for name, layers, changes in (
        ("fewer key/value heads", (P, (gqa(1), swiglu(512)), (gqa(2), swiglu(512)), (gqa(8), swiglu(512))), {}),
        ("no attention in the middle", (P, F, F, P), {}),
        ("no attention in layer 0", (F, P, P), {}),
        ("no attention in the last layer", (P, P, F), {}),
        ("no FFN, first, middle and last", (A, P, A, A, P, A), {}),
        ("empty layers", (I, P, I, P, I, I), {}),
        ("no attention, no FFN, fewer heads", (F, A, P, I, A, F, (gqa(1), swiglu(256)), A), {}),
        ("one wide FFN of a fused run", (P, (NO_ATTENTION, swiglu(4096)), I, I, P), {}),
        ("FFN widths of 300 and 48", ((gqa(4), swiglu(300)), (gqa(2), swiglu(48)), P), {}),
        ("linear attention", (P, (LINEAR_ATTENTION, swiglu(512)), P), {}),
        ("linear FFN", (P, (gqa(4), LINEAR_FFN), P), {}),
        ("untied embeddings", (P, F, P), {"tie_word_embeddings": False}),
        ("llama3 rotary scaling", (P, F, P), {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500_000.0}),
        ("head_dim 64 of hidden_size 256 by 8 heads", (P, F, P), {"head_dim": 64}),
        ("biases", (P, F, P), {"attention_bias": True, "mlp_bias": True}),
    )
}


def make_case_model(architecture: Architecture) -> HeterogeneousLlamaForCausalLM:
    """A model whose every tensor is random, drawn so that activations keep their size from layer to layer."""
    model = build_model(architecture, dtype=torch.float32, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, architecture.hidden_size**-0.5, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return model


def write_case(directory: Path, architecture: Architecture) -> HeterogeneousLlamaForCausalLM:
    """Write the checkpoint of a case with the byte tokenizer, and return the model it holds."""
    model = make_case_model(architecture)
    save_checkpoint(
        directory,
        architecture=architecture,
        tensors=model.state_dict(),
        tokenizer_dir=make_tokenizer_dir(directory.with_name(f"{directory.name}-tokenizer")),
    )
    return model
