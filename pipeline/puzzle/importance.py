"""What each FFN channel, each key/value head and each layer of the parent contributes, over calibration tokens.

Channels (Puzzle, appendix A): zeroing channel i changes the FFN's output at a token by X_i * W_down[:, i], so

    C_i = mean over tokens of |X_i| * ||W_down[:, i]||_2

Key/value heads: the mean over tokens of ||W_o[:, columns of head k's queries] y_k||_2, y_k being what those query heads
read from the cache.

Layers (block influence, ShortGPT): 1 - cos(x, y) averaged over tokens, x and y being what goes in and what comes out.

Letters: B batch, T tokens, D hidden_size, F intermediate_size, K key/value heads.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.puzzle.composition import compose, embed, run_layers

IMPORTANCE_FILE = "importance.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """Statistics of every layer, float32."""

    ffn_contribution: tuple[Tensor, ...]
    kv_contribution: tuple[Tensor, ...]

    def channel_order(self, layer: int) -> Tensor:
        """Return the layer's channels from the most to the least contributing; ties keep the lower index first."""
        return torch.argsort(self.ffn_contribution[layer], descending=True, stable=True)


@torch.no_grad()
def measure_importance(
    model: HeterogeneousLlamaForCausalLM, packed: PackedTokens, *, batch_size: int, reporter: Reporter
) -> Importance:
    """Return the contribution of every channel and key/value head over all tokens of `packed`."""
    device = next(model.parameters()).device
    layers: list[Any] = list(model.model.layers)
    heads = model.architecture.homogeneous_block().attention.num_key_value_heads
    assert heads is not None
    sums = [
        (
            torch.zeros(layer.mlp.down_proj.in_features, dtype=torch.float64, device=device),
            torch.zeros(heads, dtype=torch.float64, device=device),
        )
        for layer in layers
    ]
    hooks = [
        hook
        for layer, (channels_F, heads_K) in zip(layers, sums, strict=True)
        for hook in (
            (layer.mlp.down_proj, partial(_add_channels, total_F=channels_F)),
            (layer.self_attn.o_proj, partial(_add_heads, total_K=heads_K)),
        )
    ]
    with _watching_inputs(hooks):
        steps = range(0, len(packed), batch_size)
        for step, start in enumerate(steps, start=1):
            rows = slice(start, start + batch_size)
            model(
                input_ids=packed.tokens_NT[rows].to(device),
                position_ids=packed.position_ids_NT[rows].to(device),
                use_cache=False,
                logits_to_keep=1,
            )
            reporter.step(step, len(steps), what="calibration batches")
    return Importance(
        ffn_contribution=tuple(
            (channels_F / packed.num_tokens * _column_norms(layer.mlp.down_proj)).float().cpu()
            for layer, (channels_F, _) in zip(layers, sums, strict=True)
        ),
        kv_contribution=tuple((heads_K / packed.num_tokens).float().cpu() for _, heads_K in sums),
    )


@torch.no_grad()
def block_influence(model: HeterogeneousLlamaForCausalLM, packed: PackedTokens) -> tuple[float, ...]:
    """Return every layer's influence on the hidden states that pass through it."""
    hidden_NTD, found = embed(model, packed), []
    for index, layer in enumerate(model.model.layers):
        block: Any = layer.block
        output_NTD = run_layers(model, [compose(model, index, block, {})], hidden_NTD, packed)
        # In float32: two bf16 vectors that hardly differ have a cosine that rounds to 1.
        cosine = torch.nn.functional.cosine_similarity(hidden_NTD.float(), output_NTD.float(), dim=-1)
        found.append((1 - cosine).double().mean().item())
        hidden_NTD = output_NTD
    return tuple(found)


def save_importance(importance: Importance, directory: Path) -> None:
    """Write the statistics as `layers.{i}.ffn_contribution_F` and `layers.{i}.kv_contribution_K`."""
    tensors: dict[str, Tensor] = {}
    for layer, tensor_F in enumerate(importance.ffn_contribution):
        tensors[f"layers.{layer}.ffn_contribution_F"] = tensor_F
    for layer, tensor_K in enumerate(importance.kv_contribution):
        tensors[f"layers.{layer}.kv_contribution_K"] = tensor_K
    save_file(tensors, directory / IMPORTANCE_FILE)


def load_importance(directory: Path) -> Importance:
    """Read the statistics of a channel_importance artifact."""
    tensors = load_file(directory / IMPORTANCE_FILE)
    num_layers = len(tensors) // 2
    return Importance(
        ffn_contribution=tuple(tensors[f"layers.{layer}.ffn_contribution_F"] for layer in range(num_layers)),
        kv_contribution=tuple(tensors[f"layers.{layer}.kv_contribution_K"] for layer in range(num_layers)),
    )


def count_non_finite(importance: Importance) -> int:
    """Return how many statistics are NaN or infinite."""
    everything = (*importance.ffn_contribution, *importance.kv_contribution)
    return sum(int((~torch.isfinite(tensor)).sum()) for tensor in everything)


@contextmanager
def _watching_inputs(hooks: Iterable[tuple[nn.Module, Callable[[Any, tuple[Tensor]], None]]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(watch) for module, watch in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_channels(_: nn.Linear, inputs: tuple[Tensor], *, total_F: Tensor) -> None:
    (input_BTF,) = inputs
    # Summed in float64 over batches; within one batch float32 keeps the copy small.
    total_F += input_BTF.float().abs().sum(dim=(0, 1))


def _add_heads(projection: nn.Linear, inputs: tuple[Tensor], *, total_K: Tensor) -> None:
    (input_BTD,) = inputs
    num_heads = total_K.numel()
    columns = projection.weight.chunk(num_heads, dim=1)
    for head, (read_BTH, weight_DH) in enumerate(zip(input_BTD.chunk(num_heads, dim=-1), columns, strict=True)):
        total_K[head] += (read_BTH @ weight_DH.T).float().norm(dim=-1).sum()


def _column_norms(projection: nn.Linear) -> Tensor:
    return projection.weight.detach().double().norm(dim=0)
