"""Several children of one parent scored as whole models, in one walk over the layers.

Layer by layer, each distinct prefix of blocks is run once and each library block is loaded once, so that a pool of
children costs little more memory than its hidden states and a child that shares its first layers costs only the rest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pipeline.architecture import BlockSpec
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.puzzle.activations import ActivationStore, embedded
from pipeline.puzzle.composition import LoadVariants, compose
from pipeline.puzzle.divergence import Divergence
from pipeline.puzzle.score_functions import ScoreFunction, divergence_of


@torch.no_grad()
def score_models(
    model: HeterogeneousLlamaForCausalLM,
    children: Mapping[str, Sequence[BlockSpec]],
    load_variants: LoadVariants,
    functions: Sequence[ScoreFunction],
    *,
    work_dir: Path,
    max_activation_bytes: int,
    reporter: Reporter,
) -> dict[str, Divergence]:
    """Return how far each named child is from the parent.

    Args:
        model: the parent in the precision to score in.
        children: one block per parent layer each.
        load_variants: gives the modules of one layer that are not the parent's own.
        functions: what is measured, each on its own windows.
        work_dir: where hidden states lie that do not fit.
        max_activation_bytes: how many of them stay in memory.
        reporter: who listens.
    """
    parent_blocks = tuple(layer.block for layer in model.model.layers)
    parent = ""
    wanted = {parent: parent_blocks, **children}
    store = ActivationStore(work_dir / "activations", max_bytes=max_activation_bytes)
    # Children that are equal so far share their hidden states, one set per function.
    prefixes = [(list(wanted), [embedded(store, model, function.packed) for function in functions])]
    for layer in range(len(parent_blocks)):
        variants = load_variants(layer)
        split = []
        for names, states in prefixes:
            by_block: dict[str, list[str]] = {}
            for name in names:
                by_block.setdefault(wanted[name][layer].key, []).append(name)
            for alike in by_block.values():
                composed = compose(model, layer, wanted[alike[0]][layer], variants)
                split.append((alike, [one.behind(model, [composed]) for one in states]))
            for one in states:
                one.release()
        prefixes = split
        reporter.step(layer + 1, len(parent_blocks), what=f"layers of {len(children)} children")
    sums = [[function.sums_type() for function in functions] for _ in prefixes]
    own = next(states for names, states in prefixes if parent in names)
    for place, function in enumerate(functions):
        for number, rows in enumerate(own[place].groups):
            finals = [states[place][number] for _, states in prefixes]
            function.add([one[place] for one in sums], model, finals, own[place][number], rows)
    found = {
        name: divergence_of(functions, one) for (names, _), one in zip(prefixes, sums, strict=True) for name in names
    }
    for _, states in prefixes:
        for one in states:
            one.release()
    return {name: found[name] for name in children}
