"""In which order whole layers may be left out: each time the one without which the model stays closest to the parent.

What a layer is worth depends on which others stay, so after each the rest are measured again, for as many steps as the
recipe asks. (Left out one by one: SLEB, arXiv:2402.09025, by KL here; all by one measurement: Shortened LLaMA,
arXiv:2402.02834. Neither distils a block or solves a programme: it is what `drop_by_score` in baselines.py does.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.architecture import BlockSpec
from pipeline.fingerprint import fingerprint
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.puzzle.divergence import Divergence
from pipeline.puzzle.score_functions import ScoreFunction
from pipeline.puzzle.scoring import LayerBlock, score_blocks
from pipeline.puzzle.search_space import LayerOptions, SearchSpace, dropped
from pipeline.puzzle.tables import DEPTH, SCHEMAS, read_table

KnownWithout = Callable[[Sequence[int]], Mapping[LayerBlock, Divergence]]
"""Given which layers are gone, the measures that are there already of leaving out one more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthStep:
    """What leaving out each remaining layer did to the model without the layers that had gone before."""

    gone: tuple[int, ...]
    found: Mapping[int, Divergence]

    @property
    def order(self) -> list[int]:
        """The remaining layers by KL; among equals the later goes first, and what is not finite last."""

        def rank(layer: int) -> tuple[float, int]:
            kl = self.found[layer].kl
            return kl if math.isfinite(kl) else math.inf, -layer

        return sorted(self.found, key=rank)


def measure_depth(
    model: HeterogeneousLlamaForCausalLM,
    parent: BlockSpec,
    functions: Sequence[ScoreFunction],
    *,
    num_steps: int,
    known: KnownWithout,
    work_dir: Path,
    max_activation_bytes: int,
    reporter: Reporter,
) -> list[DepthStep]:
    """Return the steps in which layers went, one at each but the last, whose order is that of all that remain.

    A step of which all is known runs nothing.

    Args:
        model: the parent in the precision to score in.
        parent: its block.
        functions: what is measured, each on its own windows.
        num_steps: measurements; no more than there are layers are made.
        known: what need not be measured again.
        work_dir: finished layers of a step are kept there, so a run that was killed continues.
        max_activation_bytes: hidden states beyond these lie in files below `work_dir`.
        reporter: who listens.
    """
    num_layers = len(model.model.layers)
    whole = [parent.model_copy(update={"parent_layers": (layer,)}) for layer in range(num_layers)]
    gone: list[int] = []
    steps: list[DepthStep] = []
    for number in range(min(num_steps, num_layers)):
        left = [layer for layer in range(num_layers) if layer not in gone]
        there = known(gone)
        if any((layer, dropped(layer).key) not in there for layer in left):
            reporter.note(f"leaving out one of {len(left)} layers, {number} gone before")
            options = [
                LayerOptions(attention=(), ffn=(), blocks=(dropped(layer),) if layer in left else ())
                for layer in range(num_layers)
            ]
            scores = score_blocks(
                model,
                SearchSpace(parent=parent, layers=tuple(options)),
                lambda _: {},
                functions,
                # Named after what is gone: a run that was killed may find more known, and another layer gone by now.
                work_dir=work_dir / f"depth-{number}-{fingerprint(sorted(gone))}",
                max_activation_bytes=max_activation_bytes,
                reporter=reporter,
                base=[dropped(layer) if layer in gone else block for layer, block in enumerate(whole)]
                if gone
                else None,
                known=there,
            )
            found = {one.layer: one.divergence for one in scores.candidates}
        else:
            found = {layer: there[layer, dropped(layer).key] for layer in left}
        steps.append(DepthStep(gone=tuple(gone), found=found))
        gone.append(steps[-1].order[0])
    return steps


def depth_table(steps: Sequence[DepthStep]) -> pl.DataFrame:
    """Return one row per layer, the first to go first: how far the model is without it and those gone before."""
    went = [(step, step.order[0]) for step in steps[:-1]]
    went += [(steps[-1], layer) for layer in steps[-1].order]
    rows = [
        (place, layer, len(step.gone), step.found[layer].kl, step.found[layer].num_tokens)
        for place, (step, layer) in enumerate(went)
    ]
    return pl.DataFrame(rows, schema=SCHEMAS[DEPTH], orient="row")


def read_depth_order(directory: Path) -> list[int]:
    """Return the layers of a block_scores artifact in the order in which they go."""
    return read_table(directory, DEPTH).sort("place")["layer"].to_list()
