"""A closed-form start for block distillation: the last matrix of a variant refitted to its parent's output.

A subblock ends in one matrix W (down_proj, o_proj, or all of a linear one). With z_t what enters it, y_t what it is to
add at token t, and W_0 the matrix that surgery cut,

    min over W   sum_t w_t |W z_t - y_t|^2 + r |W - W_0|^2        w_t = 1 (loss "tensor") or 1 / |parent output_t|^2

    W = W_0 + (sum_t w_t (y_t - W_0 z_t) z_t^T) (sum_t w_t z_t z_t^T + r I)^-1

The curvature of the loss "kl" weighs the rows of W, each of which is a problem by itself: it changes nothing here.
y_t is what the parent's subblock adds. Of a pair, attention is refitted first and then the FFN to what is missing
behind it; a pair without an FFN owes the layer's whole output by its attention.

No gradient and one pass over the tokens, whose hidden states are kept as scoring keeps them: in memory up to a bound.
(Ours; the paper starts from surgery's weights, appendix A.)

Letters: B rows, T tokens, D hidden_size, I what the matrix reads, S tokens of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousDecoderLayer
from pipeline.progress import Reporter
from pipeline.puzzle.activations import ActivationStore, HiddenStates
from pipeline.puzzle.bld_state import Trainee
from pipeline.puzzle.composition import ComposedLayer
from pipeline.puzzle.devices import autocast
from pipeline.puzzle.parent_layers import LayerActivations, ParentLayers
from pipeline.recipe import BlockLibraryConfig

# r as a share of the mean diagonal of sum_t w_t z_t z_t^T: channels that hardly fire keep what surgery gave them.
RIDGE = 1e-2

Half = Literal["attention", "ffn"]
HALVES: tuple[Half, Half] = ("attention", "ffn")


@torch.no_grad()
def refit_blocks(
    parent: ParentLayers,
    by_layer: Mapping[int, Sequence[Trainee]],
    packed: PackedTokens,
    *,
    stop: int,
    settings: BlockLibraryConfig,
    work_dir: Path,
    max_activation_bytes: int,
    reporter: Reporter,
) -> None:
    """Refit the last matrices of every variant in place, layer by layer, so that one layer's sums are held at a time.

    Args:
        parent: this rank's layers.
        by_layer: the variants.
        packed: windows to fit on.
        stop: no rank has a variant in this layer or behind it.
        settings: the recipe's; `loss` decides what tokens weigh.
        work_dir: where hidden states lie that do not fit, those of each rank in a directory of its own.
        max_activation_bytes: how many of them stay in memory.
        reporter: who listens.
    """
    layers = parent.until(stop)
    store = ActivationStore(work_dir / f"activations-{layers.start}", max_bytes=max_activation_bytes)
    states = HiddenStates(store, packed, lambda _, rows: parent.receive(packed.tokens_NT[rows]))
    for number, layer in enumerate(layers, start=1):
        own, trainees = parent.layer(layer), by_layer.get(layer, ())
        # Attention first: what enters a pair's FFN is what its refitted attention gives.
        for half in HALVES:
            systems = [_System(trainee, half) for trainee in trainees if half in halves(trainee)]
            if systems:
                _add_up(parent, layer, systems, states, settings=settings)
            # The widest last, when no other's sums are held beside its solution (pipeline.puzzle.bld_cost counts both).
            systems.sort(key=lambda system: system.matrix.in_features, reverse=True)
            while systems:
                systems.pop().solve()
        states.advance(parent.model, [ComposedLayer(attention=own, ffn=own)])
        reporter.step(number, len(layers), what="layers with a closed-form start")
    if parent.next_rank is not None:
        for hidden_BTD in states:
            parent.send(hidden_BTD, stop=stop)
    states.release()


def halves(trainee: Trainee) -> tuple[Half, ...]:
    """Return the halves that a variant has, in the order in which they run."""
    block = trainee.key.block
    return tuple(half for half in HALVES if getattr(block, half).kind != "no_op")


def last_matrix(module: HeterogeneousDecoderLayer, half: Half) -> nn.Linear:
    """Return the matrix that writes the output of one half of a variant."""
    layer: Any = module
    if half == "ffn":
        return layer.mlp.linear_mlp if module.block.ffn.kind == "linear" else layer.mlp.down_proj
    return layer.self_attn.linear_attn if module.block.attention.kind == "linear" else layer.self_attn.o_proj


class _System:
    """The least-squares problem of one half of a variant: its sums over tokens, and their solution."""

    def __init__(self, trainee: Trainee, half: Half) -> None:
        self.trainee, self.half = trainee, half
        self.matrix = last_matrix(trainee.module, half)
        width = self.matrix.in_features
        self._gram_II = torch.zeros(width, width, dtype=torch.float32, device=self.matrix.weight.device)
        self._cross_DI = torch.zeros_like(self.matrix.weight)

    def add(self, activations: LayerActivations, *, settings: BlockLibraryConfig) -> None:
        """Add one batch of what the parent's layer was given and gave."""
        module, key = self.trainee.module, self.trainee.key
        input_BTD, output_BTD = activations.input_BTD, activations.output_BTD
        with _reading(self.matrix) as seen, autocast(input_BTD.device, settings.precision):
            if self.half == "attention":
                before_BTD = input_BTD
                owes_output = key.subblock == "pair" and key.block.ffn.kind == "no_op"
                after_BTD = output_BTD if owes_output else activations.middle_BTD
                module.attend(input_BTD, **activations.attention_kwargs)
            else:
                # Beside the parent's attention, or behind the pair's own, which may be none.
                before_BTD = activations.middle_BTD
                if key.subblock == "pair":
                    before_BTD = module.attend(input_BTD, **activations.attention_kwargs)
                after_BTD = output_BTD
                module.feed_forward(before_BTD)
        read_SI = seen[0].float().flatten(0, 1)
        wanted_SD = (after_BTD.float() - before_BTD.float()).flatten(0, 1)
        missing_SD = wanted_SD - nn.functional.linear(read_SI, self.matrix.weight, self.matrix.bias)
        weighted_SI = read_SI
        if settings.loss != "tensor":
            weighted_SI = read_SI / output_BTD.float().square().mean(dim=-1).flatten()[:, None]
        self._gram_II += weighted_SI.T @ read_SI
        self._cross_DI += missing_SD.T @ weighted_SI

    def solve(self) -> None:
        """Refit the matrix in place."""
        # Summed in float32, solved in float64: the condition number is that of the activations squared.
        system_II = self._gram_II.double()
        mean_square = system_II.diagonal().mean()
        if not mean_square > 0:
            return  # nothing ever enters the matrix, or something that is no number: the training will tell
        system_II.diagonal().add_(RIDGE * mean_square)
        solution_ID = torch.linalg.solve(system_II, self._cross_DI.double().T)
        self.matrix.weight += solution_ID.T.to(self.matrix.weight.dtype)


def _add_up(
    parent: ParentLayers,
    layer: int,
    systems: Sequence[_System],
    states: HiddenStates,
    *,
    settings: BlockLibraryConfig,
) -> None:
    """Add all windows to the systems of one layer; the parent's layer runs once for all of them."""
    own = parent.layer(layer)
    for rows, input_BTD in states.batches(settings.batch_size):
        kwargs = parent.attention_kwargs(input_BTD, states.packed.position_ids_NT[rows])
        middle_BTD = own.attend(input_BTD, **kwargs)
        activations = LayerActivations(
            layer=layer,
            input_BTD=input_BTD,
            middle_BTD=middle_BTD,
            output_BTD=own.feed_forward(middle_BTD),
            attention_kwargs=kwargs,
        )
        for system in systems:
            system.add(activations, settings=settings)


@contextmanager
def _reading(matrix: nn.Linear) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = matrix.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
