"""Replace-1-block scores (Puzzle, section 4.2): a model with one composed block swapped, against the parent.

The hidden states that reach layer i are the base model's whatever stands in its place, so they are computed once; each
candidate costs its own block, the layers behind it and the head. Several candidates of a layer run as one batch.
What is measured is any number of functions, each on its own windows; all share one walk over the layers.

The base is the parent itself, or, for scores given the layers already replaced, a child of it: scores of single blocks
add up badly where many layers go, and are measured again around the choice they led to.

Letters: B rows (candidates x windows), T tokens, D hidden_size.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.architecture import Architecture, BlockSpec
from pipeline.artifacts import write_atomically
from pipeline.costs import forward_flops_per_token
from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.puzzle import composition
from pipeline.puzzle.activations import ActivationStore, HiddenStates, embedded
from pipeline.puzzle.composition import (
    ComposedLayer,
    LayerVariants,
    LoadVariants,
    attention_kwargs,
    compose,
)
from pipeline.puzzle.divergence import Divergence
from pipeline.puzzle.score_functions import ScoreFunction, divergence_of, sums_from_json, sums_to_json
from pipeline.puzzle.search_space import SearchSpace

LayerBlock = tuple[int, str]
"""A layer, and the key of a block that may stand there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockScore:
    """How far the base model is from the parent with this block in this layer."""

    layer: int
    block: BlockSpec
    divergence: Divergence


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Every candidate's score, and the base model's own on the same tokens."""

    candidates: tuple[BlockScore, ...]
    base: Divergence


@torch.no_grad()
def score_blocks(
    model: HeterogeneousLlamaForCausalLM,
    space: SearchSpace,
    load_variants: LoadVariants,
    functions: Sequence[ScoreFunction],
    *,
    work_dir: Path,
    max_activation_bytes: int,
    reporter: Reporter,
    base: Sequence[BlockSpec] | None = None,
    known: Mapping[LayerBlock, Divergence] | None = None,
) -> Scores:
    """Score every composed block of every layer, the base's own left out.

    Progress and its ETA are counted in the arithmetic behind the candidates: those of the first layers cost most.

    Args:
        model: the parent in the precision to score in.
        space: its candidates.
        load_variants: gives the trained modules of one layer, on the model's device and in its precision.
        functions: what is measured, each on its own windows.
        work_dir: finished layers are kept there, so a run that was killed continues with the next.
        max_activation_bytes: hidden states beyond these lie in files below `work_dir`.
        reporter: who listens.
        base: the blocks of the model in which one is replaced at a time; None for the parent itself.
        known: scores around the same base that are there already; they are returned with the rest.
    """
    parent_layers = [compose(model, layer, space.parent, {}) for layer in range(len(space.layers))]
    blocks = (space.parent,) * len(space.layers) if base is None else tuple(base)
    layers = (
        parent_layers
        if base is None
        else [compose(model, layer, block, load_variants(layer)) for layer, block in enumerate(blocks)]
    )
    store = ActivationStore(work_dir / "activations", max_bytes=max_activation_bytes)
    reached = [embedded(store, model, function.packed) for function in functions]
    parents = [states.behind(model, parent_layers) for states in reached]
    base_sums = [function.sums_type() for function in functions]
    for function, states, parent, one in zip(functions, reached, parents, base_sums, strict=True):
        ends = parent if base is None else states.behind(model, layers)
        for rows, end_BTD, parent_BTD in zip(ends.groups, ends, parent, strict=True):
            function.add([one], model, [end_BTD], parent_BTD, rows)
        if ends is not parent:
            ends.release()
    found = dict(known or {})
    wanted = [_others(options.blocks, blocks[layer]) for layer, options in enumerate(space.layers)]
    candidates = [[block for block in ones if (layer, block.key) not in found] for layer, ones in enumerate(wanted)]
    paths = [work_dir / f"layer-{layer:03d}.json" for layer in range(len(space.layers))]
    finished = [_read_sums(path, ones, functions) for path, ones in zip(paths, candidates, strict=True)]
    work = [_work(model.architecture, blocks, layer, ones, functions) for layer, ones in enumerate(candidates)]
    done = sum(one for one, sums in zip(work, finished, strict=True) if sums is not None)
    if any(candidates):
        # What an earlier run did stands in the first report, so that no rate is taken from it.
        reporter.step(done, sum(work), what="MFLOP of candidates")
    for layer, ones in enumerate(candidates):
        sums = finished[layer] if ones else []
        if sums is None:
            sums = _score_layer(
                model,
                load_variants(layer),
                reached,
                parents,
                functions,
                layer=layer,
                candidates=ones,
                suffix=layers[layer + 1 :],
            )
            _write_sums(paths[layer], ones, sums)
            done += work[layer]
            reporter.step(done, sum(work), what="MFLOP of candidates", num_layers_scored=layer + 1)
        for block, of_block in zip(ones, sums, strict=True):
            found[layer, block.key] = divergence_of(functions, of_block)
        for states in reached:
            states.advance(model, layers[layer : layer + 1])
    for states in (*reached, *parents):
        states.release()
    return Scores(
        candidates=tuple(
            BlockScore(layer=layer, block=block, divergence=found[layer, block.key])
            for layer, ones in enumerate(wanted)
            for block in ones
        ),
        base=divergence_of(functions, base_sums),
    )


def _work(
    architecture: Architecture,
    blocks: Sequence[BlockSpec],
    layer: int,
    candidates: Sequence[BlockSpec],
    functions: Sequence[ScoreFunction],
) -> int:
    """Return the MFLOPs of one layer's candidates: their own blocks, the layers behind them and the head."""
    total = 0.0
    for block in candidates:
        child = architecture.with_blocks([block, *blocks[layer + 1 :]])
        for function in functions:
            tokens = function.packed.num_tokens
            total += tokens * forward_flops_per_token(child, context_tokens=function.packed.sequence_length)
    return math.ceil(total / 1e6)


def _score_layer(
    model: HeterogeneousLlamaForCausalLM,
    variants: LayerVariants,
    reached: Sequence[HiddenStates],
    parents: Sequence[HiddenStates],
    functions: Sequence[ScoreFunction],
    *,
    layer: int,
    candidates: Sequence[BlockSpec],
    suffix: Sequence[ComposedLayer],
) -> list[list[Any]]:
    """Return the sums of every candidate of one layer, function by function."""
    sums = [[function.sums_type() for function in functions] for _ in candidates]
    for place, (function, states, parent) in enumerate(zip(functions, reached, parents, strict=True)):
        packed = function.packed
        for rows, hidden_BTD, parent_BTD in zip(states.groups, states, parent, strict=True):
            num_windows = len(hidden_BTD)
            group_size = max(1, composition.MAX_BATCH_TOKENS // (num_windows * packed.sequence_length))
            outputs = _candidate_outputs(model, variants, hidden_BTD, packed, rows, layer, candidates)
            finals: list[Tensor] = []
            for stacked in _in_groups(outputs, size=group_size):
                behind_BTD = torch.cat(stacked)
                kwargs = attention_kwargs(model, behind_BTD, packed.position_ids_NT[rows].repeat(len(stacked), 1))
                for module in suffix:
                    behind_BTD = module(behind_BTD, **kwargs)
                finals += behind_BTD.split(num_windows)
            # All at once: what a function needs of the parent at these windows is computed once.
            function.add([of_block[place] for of_block in sums], model, finals, parent_BTD, rows)
    return sums


def _candidate_outputs(
    model: HeterogeneousLlamaForCausalLM,
    variants: LayerVariants,
    hidden_BTD: Tensor,
    packed: PackedTokens,
    rows: slice,
    layer: int,
    candidates: Sequence[BlockSpec],
) -> Iterator[Tensor]:
    """Give the layer's output under each candidate; each attention module runs once for all FFNs behind it."""
    kwargs = attention_kwargs(model, hidden_BTD, packed.position_ids_NT[rows])
    attention, attended_BTD = None, hidden_BTD
    for block in candidates:
        composed = compose(model, layer, block, variants)
        if composed.attention is not attention:  # blocks come attention by attention
            attention, attended_BTD = composed.attention, composed.attend(hidden_BTD, **kwargs)
        yield composed.feed_forward(attended_BTD)


def _in_groups(tensors: Iterator[Tensor], *, size: int) -> Iterator[list[Tensor]]:
    """Give lists of `size` tensors, the last one shorter."""
    while group := list(itertools.islice(tensors, size)):
        yield group


def _others(blocks: Sequence[BlockSpec], base: BlockSpec) -> list[BlockSpec]:
    return [block for block in blocks if block.key != base.key]


def _write_sums(path: Path, blocks: Sequence[BlockSpec], sums: Sequence[Sequence[Any]]) -> None:
    rows = {block.key: sums_to_json(one) for block, one in zip(blocks, sums, strict=True)}
    write_atomically(path, json.dumps(rows).encode())


def _read_sums(path: Path, blocks: Sequence[BlockSpec], functions: Sequence[ScoreFunction]) -> list[list[Any]] | None:
    """Return a finished layer's sums of these candidates, or None when any of theirs is missing."""
    if not path.is_file():
        return None
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not {block.key for block in blocks} <= set(rows):
        return None
    return [sums_from_json(functions, rows[block.key]) for block in blocks]
