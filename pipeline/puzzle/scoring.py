"""Replace-1-block scores (Puzzle, section 4.2): a model with one composed block swapped, against the parent.

The hidden states that reach layer i are the base model's whatever stands in its place, so they are computed once; each
candidate costs its own block, the layers behind it and the head. Several candidates of a layer run as one batch.

The base is the parent itself, or, for scores given the layers already replaced, a child of it: scores of single blocks
add up badly where many layers go, and are measured again around the choice they led to.

Letters: N windows, B rows (candidates x windows), T tokens, D hidden_size.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.architecture import BlockSpec
from pipeline.artifacts import write_atomically
from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.puzzle import composition
from pipeline.puzzle.composition import (
    ComposedLayer,
    LayerVariants,
    LoadVariants,
    attention_kwargs,
    compose,
    embed,
    run_layers,
    window_groups,
)
from pipeline.puzzle.divergence import Divergence, DivergenceSums, add_divergences
from pipeline.puzzle.search_space import SearchSpace


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
    packed: PackedTokens,
    *,
    work_dir: Path,
    reporter: Reporter,
    base: Sequence[BlockSpec] | None = None,
) -> Scores:
    """Score every composed block of every layer, the base's own left out.

    Args:
        model: the parent in the precision to score in.
        space: its candidates.
        load_variants: gives the trained modules of one layer, on the model's device and in its precision.
        packed: validation windows.
        work_dir: finished layers are kept there, so a run that was killed continues with the next.
        reporter: who listens.
        base: the blocks of the model in which one is replaced at a time; None for the parent itself.
    """
    parent_layers = [compose(model, layer, space.parent, {}) for layer in range(len(space.layers))]
    blocks = (space.parent,) * len(space.layers) if base is None else tuple(base)
    layers = (
        parent_layers
        if base is None
        else [compose(model, layer, block, load_variants(layer)) for layer, block in enumerate(blocks)]
    )
    hidden_NTD = embed(model, packed)
    parent_NTD = run_layers(model, parent_layers, hidden_NTD, packed)
    base_NTD = parent_NTD if base is None else run_layers(model, layers, hidden_NTD, packed)
    base_sums = DivergenceSums()
    for rows in window_groups(packed):
        add_divergences([base_sums], model, [base_NTD[rows]], parent_NTD[rows], packed.labels_NT[rows])
    found: list[BlockScore] = []
    num_candidates = sum(len(_others(options.blocks, blocks[layer])) for layer, options in enumerate(space.layers))
    for layer, options in enumerate(space.layers):
        candidates = _others(options.blocks, blocks[layer])
        path = work_dir / f"layer-{layer:03d}.json"
        sums = _read_sums(path, candidates)
        if sums is None:
            sums = _score_layer(
                model,
                load_variants(layer),
                hidden_NTD,
                parent_NTD,
                packed,
                layer=layer,
                candidates=candidates,
                suffix=layers[layer + 1 :],
            )
            _write_sums(path, candidates, sums)
        found += [
            BlockScore(layer=layer, block=block, divergence=one.means)
            for block, one in zip(candidates, sums, strict=True)
        ]
        hidden_NTD = run_layers(model, layers[layer : layer + 1], hidden_NTD, packed)
        reporter.step(len(found), num_candidates, what="candidate blocks")
    return Scores(candidates=tuple(found), base=base_sums.means)


def _score_layer(
    model: HeterogeneousLlamaForCausalLM,
    variants: LayerVariants,
    hidden_NTD: Tensor,
    parent_NTD: Tensor,
    packed: PackedTokens,
    *,
    layer: int,
    candidates: Sequence[BlockSpec],
    suffix: Sequence[ComposedLayer],
) -> list[DivergenceSums]:
    """Return the sums of every candidate of one layer."""
    sums = [DivergenceSums() for _ in candidates]
    for rows in window_groups(packed):
        num_windows = len(packed.tokens_NT[rows])
        group_size = max(1, composition.MAX_BATCH_TOKENS // (num_windows * packed.sequence_length))
        outputs = _candidate_outputs(model, variants, hidden_NTD[rows], packed, rows, layer, candidates)
        for start, stacked in _in_groups(outputs, size=group_size):
            hidden_BTD = torch.cat(stacked)
            kwargs = attention_kwargs(model, hidden_BTD, packed.position_ids_NT[rows].repeat(len(stacked), 1))
            for behind in suffix:
                hidden_BTD = behind(hidden_BTD, **kwargs)
            add_divergences(
                sums[start : start + len(stacked)],
                model,
                list(hidden_BTD.split(num_windows)),
                parent_NTD[rows],
                packed.labels_NT[rows],
            )
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


def _in_groups(tensors: Iterator[Tensor], *, size: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Give lists of `size` tensors, each with the index of its first."""
    start, group = 0, []
    for tensor in tensors:
        group.append(tensor)
        if len(group) == size:
            yield start, group
            start, group = start + size, []
    if group:
        yield start, group


def _others(blocks: Sequence[BlockSpec], base: BlockSpec) -> list[BlockSpec]:
    return [block for block in blocks if block.key != base.key]


def _write_sums(path: Path, blocks: Sequence[BlockSpec], sums: Sequence[DivergenceSums]) -> None:
    rows = {block.key: asdict(one) for block, one in zip(blocks, sums, strict=True)}
    write_atomically(path, json.dumps(rows).encode())


def _read_sums(path: Path, blocks: Sequence[BlockSpec]) -> list[DivergenceSums] | None:
    """Return a finished layer's sums, or None when there are none for just these candidates."""
    if not path.is_file():
        return None
    rows = json.loads(path.read_text(encoding="utf-8"))
    if set(rows) != {block.key for block in blocks}:
        return None
    return [DivergenceSums(**rows[block.key]) for block in blocks]
