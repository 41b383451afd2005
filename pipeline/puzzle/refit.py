"""A closed-form start for block distillation: the last matrix of a variant refitted to its parent's output.

A subblock ends in one matrix W (down_proj, o_proj, or all of a linear one). With z_t what enters it, y_t what it is to
add at token t, and W_0 the matrix that surgery cut,

    min over W   sum_t w_t |W z_t - y_t|^2 + r |W - W_0|^2        w_t = 1 (loss "tensor") or 1 / |parent output_t|^2

    W = W_0 + (sum_t w_t (y_t - W_0 z_t) z_t^T) (sum_t w_t z_t z_t^T + r I)^-1

The curvature of the loss "kl" weighs the rows of W, each of which is a problem by itself: it changes nothing here.
y_t is what the parent's subblock adds. Of a pair, attention is refitted first and then the FFN to what is missing
behind it; a pair without an FFN owes the layer's whole output by its attention.

No gradient and one pass over the tokens. (Ours; the paper starts from surgery's weights, appendix A.)

Letters: N windows, B rows, T tokens, D hidden_size, I what the matrix reads, S tokens of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousDecoderLayer
from pipeline.progress import Reporter
from pipeline.puzzle.bld_state import Trainee
from pipeline.puzzle.composition import ComposedLayer, run_layers
from pipeline.puzzle.devices import autocast
from pipeline.puzzle.parent_layers import ParentLayers
from pipeline.recipe import BlockLibraryConfig

# r as a share of the mean diagonal of sum_t w_t z_t z_t^T: channels that hardly fire keep what surgery gave them.
RIDGE = 1e-2

Half = Literal["attention", "ffn"]


@torch.no_grad()
def refit_blocks(
    parent: ParentLayers,
    by_layer: Mapping[int, Sequence[Trainee]],
    packed: PackedTokens,
    *,
    stop: int,
    settings: BlockLibraryConfig,
    reporter: Reporter,
) -> None:
    """Refit the last matrices of every variant in place, layer by layer, so that one layer's sums are held at a time.

    Args:
        parent: this rank's layers.
        by_layer: the variants.
        packed: windows to fit on.
        stop: no rank has a variant in this layer or behind it.
        settings: the recipe's; `loss` decides what tokens weigh.
        reporter: who listens.
    """
    hidden_NTD, layers = parent.receive(packed.tokens_NT), parent.until(stop)
    for number, layer in enumerate(layers, start=1):
        own = parent.layer(layer)
        for trainee in by_layer.get(layer, ()):
            for half in halves(trainee):
                _refit(parent, trainee, half, hidden_NTD, packed, settings=settings)
        hidden_NTD = run_layers(parent.model, [ComposedLayer(attention=own, ffn=own)], hidden_NTD, packed)
        reporter.step(number, len(layers), what="layers with a closed-form start")
    parent.send(hidden_NTD, stop=stop)


def halves(trainee: Trainee) -> tuple[Half, ...]:
    """Return the halves that a variant has, in the order in which they run."""
    block = trainee.key.block
    found: list[Half] = []
    if block.attention.kind != "no_op":
        found.append("attention")
    if block.ffn.kind != "no_op":
        found.append("ffn")
    return tuple(found)


def last_matrix(module: HeterogeneousDecoderLayer, half: Half) -> nn.Linear:
    """Return the matrix that writes the output of one half of a variant."""
    layer: Any = module
    if half == "ffn":
        return layer.mlp.linear_mlp if module.block.ffn.kind == "linear" else layer.mlp.down_proj
    return layer.self_attn.linear_attn if module.block.attention.kind == "linear" else layer.self_attn.o_proj


def _refit(
    parent: ParentLayers,
    trainee: Trainee,
    half: Half,
    hidden_NTD: Tensor,
    packed: PackedTokens,
    *,
    settings: BlockLibraryConfig,
) -> None:
    own, module, matrix = parent.layer(trainee.key.layer), trainee.module, last_matrix(trainee.module, half)
    width = matrix.in_features
    gram_II = torch.zeros(width, width, dtype=torch.float32, device=matrix.weight.device)
    cross_DI = torch.zeros_like(matrix.weight)
    for start in range(0, len(packed), settings.batch_size):
        rows = slice(start, start + settings.batch_size)
        input_BTD = hidden_NTD[rows]
        kwargs = parent.attention_kwargs(input_BTD, packed.position_ids_NT[rows])
        middle_BTD = own.attend(input_BTD, **kwargs)
        output_BTD = own.feed_forward(middle_BTD)
        with _reading(matrix) as seen, autocast(input_BTD.device, settings.precision):
            if half == "attention":
                before_BTD = input_BTD
                owes_output = trainee.key.subblock == "pair" and trainee.key.block.ffn.kind == "no_op"
                after_BTD = output_BTD if owes_output else middle_BTD
                module.attend(input_BTD, **kwargs)
            else:
                # Beside the parent's attention, or behind the pair's own, which may be none.
                before_BTD = module.attend(input_BTD, **kwargs) if trainee.key.subblock == "pair" else middle_BTD
                after_BTD = output_BTD
                module.feed_forward(before_BTD)
        read_SI = seen[0].float().flatten(0, 1)
        wanted_SD = (after_BTD.float() - before_BTD.float()).flatten(0, 1)
        missing_SD = wanted_SD - nn.functional.linear(read_SI, matrix.weight, matrix.bias)
        weighted_SI = read_SI
        if settings.loss != "tensor":
            weighted_SI = read_SI / output_BTD.float().square().mean(dim=-1).flatten()[:, None]
        gram_II += weighted_SI.T @ read_SI
        cross_DI += missing_SD.T @ weighted_SI
    # The sums are float32, the system is solved in float64: its condition number is that of the activations squared.
    system_II = gram_II.double()
    mean_square = system_II.diagonal().mean()
    if not mean_square > 0:
        return  # nothing ever enters the matrix, or something that is no number: the training will tell
    system_II.diagonal().add_(RIDGE * mean_square)
    matrix.weight += torch.linalg.solve(system_II, cross_DI.double().T).T.to(matrix.weight.dtype)


@contextmanager
def _reading(matrix: nn.Linear) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = matrix.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
