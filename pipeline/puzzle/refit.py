"""A closed-form start for block distillation: the last matrix of a variant refitted to its parent's output.

A variant ends in one matrix W (down_proj, o_proj, or all of a linear one). With z_t what enters it, y_t what the
parent's subblock adds at token t, and W_0 the matrix that surgery cut,

    min over W   sum_t w_t |W z_t - y_t|^2 + r |W - W_0|^2        w_t = 1 (loss "tensor") or 1 / |parent output_t|^2

    W = W_0 + (sum_t w_t (y_t - W_0 z_t) z_t^T) (sum_t w_t z_t z_t^T + r I)^-1

No gradient and one pass over the tokens. (Ours; the paper starts from surgery's weights, appendix A.)

Letters: N windows, B rows, T tokens, D hidden_size, I what the matrix reads, S tokens of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.puzzle.bld_state import Trainee
from pipeline.puzzle.composition import attention_kwargs, compose, embed, run_layers
from pipeline.puzzle.devices import autocast
from pipeline.recipe import BlockLibraryConfig

# r as a share of the mean diagonal of sum_t w_t z_t z_t^T: channels that hardly fire keep what surgery gave them.
RIDGE = 1e-2


@torch.no_grad()
def refit_blocks(
    model: HeterogeneousLlamaForCausalLM,
    by_layer: Mapping[int, Sequence[Trainee]],
    packed: PackedTokens,
    *,
    settings: BlockLibraryConfig,
    reporter: Reporter,
) -> None:
    """Refit the last matrix of every variant in place, layer by layer, so that one layer's sums are held at a time.

    Args:
        model: the parent.
        by_layer: the variants.
        packed: windows to fit on.
        settings: the recipe's; `loss` decides what tokens weigh.
        reporter: who listens.
    """
    hidden_NTD, num_layers = embed(model, packed), max(by_layer, default=-1) + 1
    for layer in range(num_layers):
        layers: Any = model.model.layers
        own = compose(model, layer, layers[layer].block, {})
        for trainee in by_layer.get(layer, ()):
            _refit(model, trainee, hidden_NTD, packed, settings=settings)
        hidden_NTD = run_layers(model, [own], hidden_NTD, packed)
        reporter.step(layer + 1, num_layers, what="layers with a closed-form start")


def last_matrix(trainee: Trainee) -> nn.Linear:
    """Return the matrix that writes a variant's output."""
    module: Any = trainee.module
    if trainee.key.subblock == "ffn":
        return module.mlp.linear_mlp if trainee.key.spec.kind == "linear" else module.mlp.down_proj
    return module.self_attn.linear_attn if trainee.key.spec.kind == "linear" else module.self_attn.o_proj


def _refit(
    model: HeterogeneousLlamaForCausalLM,
    trainee: Trainee,
    hidden_NTD: Tensor,
    packed: PackedTokens,
    *,
    settings: BlockLibraryConfig,
) -> None:
    layers: Any = model.model.layers
    parent, matrix = layers[trainee.key.layer], last_matrix(trainee)
    width = matrix.in_features
    gram_II = torch.zeros(width, width, dtype=torch.float32, device=matrix.weight.device)
    cross_DI = torch.zeros_like(matrix.weight)
    for start in range(0, len(packed), settings.batch_size):
        rows = slice(start, start + settings.batch_size)
        input_BTD = hidden_NTD[rows]
        kwargs = attention_kwargs(model, input_BTD, packed.position_ids_NT[rows])
        middle_BTD = parent.attend(input_BTD, **kwargs)
        output_BTD = parent.feed_forward(middle_BTD)
        with _reading(matrix) as seen, autocast(input_BTD.device, settings.precision):
            if trainee.key.subblock == "ffn":
                before_BTD, after_BTD = middle_BTD, output_BTD
                trainee.module.feed_forward(middle_BTD)
            else:
                before_BTD, after_BTD = input_BTD, middle_BTD
                trainee.module.attend(input_BTD, **kwargs)
        read_SI = seen[0].float().flatten(0, 1)
        wanted_SD = (after_BTD.float() - before_BTD.float()).flatten(0, 1)
        missing_SD = wanted_SD - nn.functional.linear(read_SI, matrix.weight, matrix.bias)
        weighted_SI = read_SI
        if settings.loss == "token":
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
