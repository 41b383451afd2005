"""Which FFNs become one: runs of attention-free layers chosen by the dependency matrix. Pure; no tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.architecture import Architecture
from pipeline.costs import ffn_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionRun:
    """Layers that become one: `layers` are replaced, `ffn_layers` among them have an FFN, the rest are identities."""

    layers: tuple[int, ...]
    ffn_layers: tuple[int, ...]

    @property
    def label(self) -> str:
        """First and last layer: 4-7."""
        return f"{self.layers[0]}-{self.layers[-1]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRules:
    """What a run must be.

    Attributes:
        min_run_layers: the fewest FFNs worth joining.
        max_run_layers: the most FFNs to join into one.
        max_dependency: the largest M_ij between any two of its blocks.
        max_parameters: the largest sum of its FFNs' parameters: what a device holds of one layer.
        keep_last_ffn: the last FFN of each stretch stays as it is, as the paper's ablation recommends (table 5).
    """

    min_run_layers: int
    max_run_layers: int
    max_dependency: float
    max_parameters: float
    keep_last_ffn: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Division:
    """The best division of a stretch's first FFNs into runs: first by layers saved, then by the runs' dependencies."""

    num_saved: int
    dependency: float
    runs: tuple[tuple[int, ...], ...]

    @property
    def rank(self) -> tuple[int, float]:
        return self.num_saved, -self.dependency


def ffn_stretches(architecture: Architecture, *, keep_last_ffn: bool) -> list[tuple[int, ...]]:
    """Return the FFN layers of each stretch, a longest succession of layers without attention.

    A stretch holds gated FFNs and identities; a linear FFN ends it. With `keep_last_ffn` its last FFN is left out.
    """
    stretches, stretch = [], []
    for layer, block in enumerate((*architecture.blocks, None)):
        if block is not None and block.attention.kind == "no_op" and block.ffn.kind != "linear":
            if block.ffn.kind == "swiglu":
                stretch.append(layer)
            continue
        stretches.append(tuple(stretch[:-1] if keep_last_ffn else stretch))
        stretch = []
    return [stretch for stretch in stretches if stretch]


def find_runs(
    architecture: Architecture, *, dependencies: Mapping[tuple[int, int], float], rules: RunRules
) -> list[FusionRun]:
    """Return the runs to fuse, first layer first.

    Each stretch is divided so that the fewest layers are left; among such divisions, the one whose runs' largest M_ij
    have the smallest sum. A run is judged by the largest entry of its sub-matrix, as the paper judges groups of full
    blocks (FFN Fusion, appendix B); of FFNs it says that their region has low dependency (section 4), without a number.
    Split by memory is its section 4 too: 49 FFNs of Ultra became four runs.

    Args:
        architecture: the model.
        dependencies: M_ij by (i, j) of every two blocks that add something (pipeline.puzzle.dependency).
        rules: what a run must be.
    """
    runs = []
    for stretch in ffn_stretches(architecture, keep_last_ffn=rules.keep_last_ffn):
        for ffn_layers in _divide(stretch, architecture, dependencies=dependencies, rules=rules):
            runs.append(FusionRun(layers=tuple(range(ffn_layers[0], ffn_layers[-1] + 1)), ffn_layers=ffn_layers))
    return runs


def runs_between(before: Architecture, after: Architecture) -> list[FusionRun]:
    """Return the runs that were joined, read off the parent layers that fused blocks name."""
    owner = {parent: layer for layer, block in enumerate(before.blocks) for parent in block.parent_layers}
    runs = []
    for block in after.blocks:
        layers = sorted({owner[parent] for parent in block.parent_layers})
        if len(layers) > 1:
            ffn_layers = tuple(layer for layer in layers if before.blocks[layer].ffn.kind == "swiglu")
            runs.append(FusionRun(layers=tuple(layers), ffn_layers=ffn_layers))
    return runs


def max_dependency(ffn_layers: Sequence[int], dependencies: Mapping[tuple[int, int], float]) -> float:
    """Return the largest M_ij between two of these layers."""
    return max(
        dependencies[first, later] for index, first in enumerate(ffn_layers) for later in ffn_layers[index + 1 :]
    )


def _divide(
    stretch: Sequence[int],
    architecture: Architecture,
    *,
    dependencies: Mapping[tuple[int, int], float],
    rules: RunRules,
) -> tuple[tuple[int, ...], ...]:
    """Return the best runs of one stretch, by dynamic programming over where the last of them begins."""
    parameters = [ffn_parameters(architecture, architecture.blocks[layer].ffn) for layer in stretch]
    best = [_Division(num_saved=0, dependency=0.0, runs=())]
    for end in range(1, len(stretch) + 1):
        found = best[end - 1]  # the last FFN stays alone
        for start in range(max(0, end - rules.max_run_layers), end - rules.min_run_layers + 1):
            run = tuple(stretch[start:end])
            dependency = max_dependency(run, dependencies)
            if dependency <= rules.max_dependency and sum(parameters[start:end]) <= rules.max_parameters:
                with_run = _Division(
                    num_saved=best[start].num_saved + len(run) - 1,
                    dependency=best[start].dependency + dependency,
                    runs=(*best[start].runs, run),
                )
                found = max(found, with_run, key=lambda division: division.rank)
        best.append(found)
    return best[-1].runs
