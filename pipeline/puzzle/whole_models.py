"""Several children of one parent scored as whole models, in one walk over the layers.

Layer by layer, each distinct prefix of blocks is run once and each library block is loaded once, so that a pool of
children costs little more memory than its hidden states and a child that shares its first layers costs only the rest.

Letters: N windows, T tokens, D hidden_size.
"""

from collections.abc import Mapping, Sequence

import torch

from pipeline.architecture import BlockSpec
from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.puzzle.composition import LoadVariants, compose, embed, run_layers, window_groups
from pipeline.puzzle.divergence import Divergence, DivergenceSums, add_divergences


@torch.no_grad()
def score_models(
    model: HeterogeneousLlamaForCausalLM,
    children: Mapping[str, Sequence[BlockSpec]],
    load_variants: LoadVariants,
    packed: PackedTokens,
    *,
    reporter: Reporter,
) -> dict[str, Divergence]:
    """Return how far each named child is from the parent.

    Args:
        model: the parent in the precision to score in.
        children: one block per parent layer each.
        load_variants: gives the modules of one layer that are not the parent's own.
        packed: validation windows.
        reporter: who listens.
    """
    parent_blocks = tuple(layer.block for layer in model.model.layers)
    parent = ""
    wanted = {parent: parent_blocks, **children}
    # Children that are equal so far share their hidden states.
    states = [(list(wanted), embed(model, packed))]
    for layer in range(len(parent_blocks)):
        variants = load_variants(layer)
        split = []
        for names, hidden_NTD in states:
            by_block: dict[str, list[str]] = {}
            for name in names:
                by_block.setdefault(wanted[name][layer].key, []).append(name)
            for alike in by_block.values():
                composed = compose(model, layer, wanted[alike[0]][layer], variants)
                split.append((alike, run_layers(model, [composed], hidden_NTD, packed)))
        states = split
        reporter.step(layer + 1, len(parent_blocks), what=f"layers of {len(children)} children")
    parent_NTD = next(hidden_NTD for names, hidden_NTD in states if parent in names)
    sums = [DivergenceSums() for _ in states]
    for rows in window_groups(packed):
        finals = [hidden_NTD[rows] for _, hidden_NTD in states]
        add_divergences(sums, model, finals, parent_NTD[rows], packed.labels_NT[rows])
    found = {name: one.means for (names, _), one in zip(states, sums, strict=True) for name in names}
    return {name: found[name] for name in children}
