"""What each FFN channel, each key/value head and each layer of the parent contributes, over calibration tokens.

Channels (Puzzle, appendix A): zeroing channel i changes the FFN's output at a token by X_i * W_down[:, i], so

    C_i = mean over tokens of |X_i| * ||W_down[:, i]||_2

That is the contribution of a channel removed alone. With R `channel_rounds` the channels go in R steps of equal size,
and each step measures the ones still there in the company of P, those already removed:

    E = sum over p in P of X_p * W_down[:, p]          C_i = mean over tokens of ||E + X_i * W_down[:, i]||_2
    ||E + X_i w_i||^2 = ||E||^2 + 2 X_i (E . w_i) + X_i^2 ||w_i||^2

The channels with the smallest C_i go next; R = 1 is the paper's rule, larger R is its authors' iterative one.

Key/value heads: the mean over tokens of ||W_o[:, columns of head k's queries] y_k||_2, y_k being what those query heads
read from the cache.

Layers (block influence, ShortGPT): 1 - cos(x, y) averaged over tokens, x and y being what goes in and what comes out.

Letters: B batch, T tokens, S tokens of a batch, D hidden_size, F intermediate_size, P removed channels,
K key/value heads.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.data.packed import PackedTokens
from pipeline.errors import ArtifactError, RecipeError
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.puzzle.activations import ActivationStore, embedded
from pipeline.puzzle.composition import compose
from pipeline.recipe import ImportanceConfig, KVHeadMode

IMPORTANCE_FILE = "importance.safetensors"
_FFN, _KV, _ORDER, _MODE = "ffn_contribution_F", "kv_contribution_K", "channel_order_F", "kv_heads"
_CURVATURE = "output_curvature_D"

_Hook = tuple[nn.Module, Callable[[Any, tuple[Tensor]], None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """Statistics of every layer, and how variants are cut by them.

    `ffn_contribution` is each channel's when it is removed alone and `kv_contribution` each head's, float32;
    `channel_order` lists the channels from the last to be removed to the first. `output_curvature` weighs the channels
    of a layer's output in the block loss "kl" (pipeline.puzzle.block_loss); None where nothing asks for it.
    """

    ffn_contribution: tuple[Tensor, ...]
    kv_contribution: tuple[Tensor, ...]
    channel_order: tuple[Tensor, ...]
    kv_heads: KVHeadMode
    output_curvature: tuple[Tensor, ...] | None = None

    def head_order(self, layer: int) -> Tensor | None:
        """Return the layer's key/value heads, most contributing first, or None where heads are averaged."""
        if self.kv_heads == "mean":
            return None
        return torch.argsort(self.kv_contribution[layer], descending=True, stable=True)


@torch.no_grad()
def measure_importance(
    model: HeterogeneousLlamaForCausalLM, packed: PackedTokens, *, settings: ImportanceConfig, reporter: Reporter
) -> Importance:
    """Return the contribution of every channel and key/value head over all tokens of `packed`.

    Each round of `settings.channel_rounds` passes all tokens through the parent once.
    """
    layers: list[Any] = list(model.model.layers)
    num_channels = layers[0].mlp.down_proj.in_features
    if settings.channel_rounds > num_channels:
        raise RecipeError(
            f"channel_importance.channel_rounds is {settings.channel_rounds}; the parent's FFNs have {num_channels} "
            "channels, and each round removes at least one: give fewer rounds"
        )
    progress = _Progress(reporter, total=settings.channel_rounds * len(range(0, len(packed), settings.batch_size)))
    heads = model.architecture.homogeneous_block().attention.num_key_value_heads
    assert heads is not None
    alone: list[Tensor] = []
    device = next(model.parameters()).device
    kv_sums = [torch.zeros(heads, dtype=torch.float64, device=device) for _ in layers]
    removed: list[list[int]] = [[] for _ in layers]
    for number in range(1, settings.channel_rounds + 1):
        sums = [torch.zeros(num_channels, dtype=torch.float64, device=device) for _ in layers]
        hooks: list[_Hook] = [
            (
                layer.mlp.down_proj,
                partial(_add_channels, total_F=total_F, removed=torch.tensor(gone, dtype=torch.long, device=device)),
            )
            for layer, total_F, gone in zip(layers, sums, removed, strict=True)
        ]
        if number == 1:
            hooks += [
                (layer.self_attn.o_proj, partial(_add_heads, total_K=total_K))
                for layer, total_K in zip(layers, kv_sums, strict=True)
            ]
        with _watching_inputs(hooks):
            _pass_tokens(model, packed, batch_size=settings.batch_size, progress=progress)
        if number == 1:
            alone = [(total_F / packed.num_tokens).float().cpu() for total_F in sums]
        num_gone = num_channels * number // settings.channel_rounds
        for total_F, gone in zip(sums, removed, strict=True):
            order_F = _least_first(total_F.float().cpu(), gone)
            gone += order_F[: num_gone - len(gone)].tolist()
    return Importance(
        ffn_contribution=tuple(alone),
        kv_contribution=tuple((total_K / packed.num_tokens).float().cpu() for total_K in kv_sums),
        channel_order=tuple(torch.tensor(gone[::-1]) for gone in removed),
        kv_heads=settings.kv_heads,
    )


@torch.no_grad()
def block_influence(
    model: HeterogeneousLlamaForCausalLM, packed: PackedTokens, *, work_dir: Path, max_activation_bytes: int
) -> tuple[float, ...]:
    """Return every layer's influence on the hidden states that pass through it.

    States beyond `max_activation_bytes` lie in files below `work_dir` meanwhile.
    """
    store = ActivationStore(work_dir / "activations", max_bytes=max_activation_bytes)
    states, found = embedded(store, model, packed), []
    for index, layer in enumerate(model.model.layers):
        block: Any = layer.block
        total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        states.advance(model, [compose(model, index, block, {})], watch=partial(_add_change, total=total))
        found.append(total.item() / packed.num_tokens)
    states.release()
    return tuple(found)


def save_importance(importance: Importance, directory: Path) -> None:
    """Write the statistics as `layers.{i}.{name}`, with the letter of what they count."""
    tensors = {
        f"layers.{layer}.{name}": tensor
        for name, by_layer in (
            (_FFN, importance.ffn_contribution),
            (_KV, importance.kv_contribution),
            (_ORDER, importance.channel_order),
            (_CURVATURE, importance.output_curvature or ()),
        )
        for layer, tensor in enumerate(by_layer)
    }
    save_file(tensors, directory / IMPORTANCE_FILE, metadata={_MODE: importance.kv_heads})


def load_importance(directory: Path) -> Importance:
    """Read the statistics of a channel_importance artifact.

    Raises:
        ArtifactError: when the file is of a version that this code does not write.
    """
    path = directory / IMPORTANCE_FILE
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        num_layers = sum(name.endswith(_FFN) for name in names)
        mode: Any = (file.metadata() or {}).get(_MODE)
        if mode not in get_args(KVHeadMode) or f"layers.0.{_ORDER}" not in names:
            raise ArtifactError(f"{path} was written by another version: materialize channel_importance again")

        def read(name: str) -> tuple[Tensor, ...]:
            return tuple(file.get_tensor(f"layers.{layer}.{name}") for layer in range(num_layers))

        return Importance(
            ffn_contribution=read(_FFN),
            kv_contribution=read(_KV),
            channel_order=read(_ORDER),
            kv_heads=mode,
            output_curvature=read(_CURVATURE) if f"layers.0.{_CURVATURE}" in names else None,
        )


def count_non_finite(importance: Importance) -> int:
    """Return how many statistics are NaN or infinite."""
    everything = (*importance.ffn_contribution, *importance.kv_contribution, *(importance.output_curvature or ()))
    return sum(int((~torch.isfinite(tensor)).sum()) for tensor in everything)


class _Progress:
    """Counts batches over all rounds."""

    def __init__(self, reporter: Reporter, *, total: int) -> None:
        self._reporter, self._total, self._done = reporter, total, 0

    def step(self) -> None:
        self._done += 1
        self._reporter.step(self._done, self._total, what="calibration batches")


def _pass_tokens(
    model: HeterogeneousLlamaForCausalLM, packed: PackedTokens, *, batch_size: int, progress: _Progress
) -> None:
    device = next(model.parameters()).device
    for start in range(0, len(packed), batch_size):
        rows = slice(start, start + batch_size)
        model(
            input_ids=packed.tokens_NT[rows].to(device),
            position_ids=packed.position_ids_NT[rows].to(device),
            use_cache=False,
            logits_to_keep=1,
        )
        progress.step()


def _least_first(contribution_F: Tensor, gone: list[int]) -> Tensor:
    """Return the channels not yet gone from the least to the most contributing; of equal ones the higher index first.

    NaN counts as the most contributing, so that a broken channel is seen in what is kept.
    """
    last = contribution_F.numel() - 1
    order_F = last - torch.argsort(contribution_F.flip(0), stable=True)
    return order_F[~torch.isin(order_F, torch.tensor(gone, dtype=torch.long))]


@contextmanager
def _watching_inputs(hooks: Iterable[_Hook]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(watch) for module, watch in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_change(input_BTD: Tensor, output_BTD: Tensor, *, total: Tensor) -> None:
    # In float32: two bf16 vectors that hardly differ have a cosine that rounds to 1.
    cosine_BT = nn.functional.cosine_similarity(input_BTD.float(), output_BTD.float(), dim=-1)
    total += (1 - cosine_BT).double().sum()


def _add_channels(projection: nn.Linear, inputs: tuple[Tensor], *, total_F: Tensor, removed: Tensor) -> None:
    """Add every channel's contribution in the company of the removed ones, summed over the batch's tokens."""
    input_SF = inputs[0].flatten(0, 1)
    squared_norms_F = projection.weight.float().square().sum(dim=0)
    if not len(removed):
        # Summed in float64 over batches; within one batch float32 keeps the copy small.
        total_F += input_SF.float().abs().sum(dim=0) * squared_norms_F.sqrt()
        return
    weight_DF = projection.weight
    error_SD = input_SF[:, removed] @ weight_DF[:, removed].T
    read_SF, product_SF = input_SF.float(), (error_SD @ weight_DF).float()
    squares_SF = error_SD.float().square().sum(dim=-1, keepdim=True) + read_SF * (
        2 * product_SF + read_SF * squared_norms_F
    )
    total_F += squares_SF.clamp(min=0).sqrt().sum(dim=0)


def _add_heads(projection: nn.Linear, inputs: tuple[Tensor], *, total_K: Tensor) -> None:
    (input_BTD,) = inputs
    num_heads = total_K.numel()
    columns = projection.weight.chunk(num_heads, dim=1)
    for head, (read_BTH, weight_DH) in enumerate(zip(input_BTD.chunk(num_heads, dim=-1), columns, strict=True)):
        total_K[head] += (read_BTH @ weight_DH.T).float().norm(dim=-1).sum()
