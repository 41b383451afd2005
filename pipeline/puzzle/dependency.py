"""How much each block needs the blocks before it: the dependency matrix (FFN Fusion, section 3), and what it groups.

Block j adds h_j = f_j(X_j) - X_j to the residual stream. With block i < j removed it reads other states and adds h_j^i:

    M_ij = mean over tokens of 1 - cos(h_j, h_j^i)

A small M_ij says that block j hardly notices whether block i came before it, so that the two may read one input.

The states without block i are the model's own up to block i. One pass over the layers carries the model's states and
those of every removal so far, so each layer is visited once and L layers cost L (L - 1) / 2 runs of a layer.

Letters: B windows, R rows (states x windows), T tokens, D hidden_size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.architecture import Architecture
from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.puzzle import composition
from pipeline.puzzle.composition import attention_kwargs, embed, window_groups

# The paper parallelises full blocks in groups of this size (appendix B).
PARALLEL_GROUP_SIZE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGeometry:
    """Means over tokens of one block's update h against the X it is added to.

    The paper's explanation of why runs may share an input: h is short beside X, and nearly at right angles to it.
    """

    update_norm_ratio: float  # |h| / |X|
    update_cosine_distance: float  # 1 - cos(X, h)
    output_cosine_distance: float  # 1 - cos(X, X + h)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dependencies:
    """M_ij by (i, j), for every pair of blocks i < j that add something; and each such block's geometry."""

    matrix: Mapping[tuple[int, int], float]
    layers: Mapping[int, LayerGeometry]
    num_tokens: int

    def within(self, layers: Sequence[int]) -> list[float]:
        """Return M_ij of every pair among some layers."""
        return [
            self.matrix[first, later]
            for index, first in enumerate(layers)
            for later in layers[index + 1 :]
            if (first, later) in self.matrix
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelGroup:
    """Successive full blocks that depend little on each other, with the largest M_ij among them and their sum."""

    layers: tuple[int, ...]
    max_dependency: float
    sum_dependency: float


@torch.no_grad()
def measure_dependencies(
    model: HeterogeneousLlamaForCausalLM, packed: PackedTokens, *, reporter: Reporter
) -> Dependencies:
    """Return the dependency matrix of a model, averaged over all tokens of `packed`.

    Memory beside the model: the states of one group of windows for each block, L B T D values.
    """
    blocks = model.architecture.blocks
    active = [layer for layer, block in enumerate(blocks) if not block.attention.kind == block.ffn.kind == "no_op"]
    sums = {(first, later): 0.0 for index, first in enumerate(active) for later in active[index + 1 :]}
    geometry = {layer: [0.0, 0.0, 0.0] for layer in active}
    hidden_NTD = embed(model, packed)
    groups = window_groups(packed)
    for index, rows in enumerate(groups):
        base_BTD, positions_BT = hidden_NTD[rows], packed.position_ids_NT[rows]
        without: dict[int, Tensor] = {}  # by the block removed
        for done, layer in enumerate(active, start=1):
            changed = _run_layer(model, layer, [base_BTD, *without.values()], positions_BT)
            update_BTD = changed[0] - base_BTD
            for removed, before_BTD, after_BTD in zip(without, without.values(), changed[1:], strict=True):
                sums[removed, layer] += _sum(cosine_distance(update_BTD, after_BTD - before_BTD))
            norm_ratio = update_BTD.float().norm(dim=-1) / base_BTD.float().norm(dim=-1)
            measures = norm_ratio, cosine_distance(base_BTD, update_BTD), cosine_distance(base_BTD, changed[0])
            geometry[layer] = [total + _sum(one) for total, one in zip(geometry[layer], measures, strict=True)]
            # Removing this block leaves behind it what came before it.
            without = dict(zip(without, changed[1:], strict=True)) | {layer: base_BTD}
            base_BTD = changed[0]
            reporter.step(index * len(active) + done, len(groups) * len(active), what="layers")
    num_tokens = packed.num_tokens
    return Dependencies(
        matrix={pair: total / num_tokens for pair, total in sums.items()},
        layers={
            layer: LayerGeometry(
                update_norm_ratio=ratio / num_tokens,
                update_cosine_distance=update / num_tokens,
                output_cosine_distance=output / num_tokens,
            )
            for layer, (ratio, update, output) in geometry.items()
        },
        num_tokens=num_tokens,
    )


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """Return 1 - cos over the last dimension as |u - v|^2 / 2 of the unit vectors: exact also where it is tiny."""
    units = [torch.nn.functional.normalize(one.float(), dim=-1) for one in (first, second)]
    return (units[0] - units[1]).square().sum(dim=-1) / 2


def parallel_groups(
    dependencies: Dependencies, architecture: Architecture, *, group_size: int = PARALLEL_GROUP_SIZE
) -> list[ParallelGroup]:
    """Return groups of successive blocks that could run side by side, the least dependent first (appendix B).

    Each takes the start whose sub-matrix has the smallest largest entry, ties by its sum, among those that overlap no
    earlier group; blocks without attention are left to FFN fusion.
    """
    candidates = []
    for start in range(architecture.num_hidden_layers - group_size + 1):
        layers = tuple(range(start, start + group_size))
        if all(architecture.blocks[layer].attention.kind != "no_op" for layer in layers):
            entries = dependencies.within(layers)
            candidates.append(ParallelGroup(layers=layers, max_dependency=max(entries), sum_dependency=sum(entries)))
    chosen: list[ParallelGroup] = []
    taken: set[int] = set()
    for group in sorted(candidates, key=lambda one: (one.max_dependency, one.sum_dependency, one.layers)):
        if taken.isdisjoint(group.layers):
            chosen.append(group)
            taken.update(group.layers)
    return chosen


def _run_layer(
    model: HeterogeneousLlamaForCausalLM, layer: int, states: Sequence[Tensor], positions_BT: Tensor
) -> list[Tensor]:
    """Return what one layer makes of each state, several states in one batch."""
    num_windows, num_tokens = positions_BT.shape
    at_once = max(1, composition.MAX_BATCH_TOKENS // (num_windows * num_tokens))
    finished: list[Tensor] = []
    for start in range(0, len(states), at_once):
        part = states[start : start + at_once]
        hidden_RTD = torch.cat(list(part))
        kwargs = attention_kwargs(model, hidden_RTD, positions_BT.repeat(len(part), 1))
        finished += model.model.layers[layer](hidden_RTD, **kwargs).split(num_windows)
    return finished


def _sum(values: Tensor) -> float:
    return values.double().sum().item()
