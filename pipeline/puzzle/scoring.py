"""Replace-1-block scores (Puzzle, section 4.2): the parent with one composed block swapped, against the parent.

    kl       mean over tokens of KL(P || Q) = sum_v p (log p - log q)        P the parent's next-token distribution
    lm_loss  mean over predicted tokens of -log q(next token)

The hidden states that reach layer i are the parent's whatever stands in its place, so they are computed once; each
candidate costs its own block, the layers behind it and the head. Several candidates of a layer run as one batch.

Letters: N windows, B rows (candidates x windows), T tokens, D hidden_size, V vocab_size, S tokens in a slice.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.architecture import BlockSpec
from pipeline.artifacts import write_atomically
from pipeline.data.packed import IGNORED_LABEL, PackedTokens
from pipeline.model.heterogeneous import HeterogeneousDecoderLayer, HeterogeneousLlamaForCausalLM, attention_inputs
from pipeline.progress import Reporter
from pipeline.puzzle.library import Subblock
from pipeline.puzzle.search_space import SearchSpace

# Candidates are batched up to this many tokens: enough that Python's share vanishes, few enough to stay in cache.
MAX_BATCH_TOKENS = 2048
# Logits are held for this many tokens at a time: 128 x 49,152 float32 values are 24 MiB.
SLICE_TOKENS = 128

LayerVariants = Mapping[tuple[Subblock, str], HeterogeneousDecoderLayer]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockScore:
    """The score of one composed block in one layer."""

    layer: int
    block: BlockSpec
    kl: float
    lm_loss: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Every candidate's score, and the parent's own loss on the same tokens."""

    candidates: tuple[BlockScore, ...]
    parent_lm_loss: float
    num_tokens: int


@dataclass(slots=True)
class _Sums:
    """Sums over tokens of one candidate, added up window by window."""

    kl: float = 0.0
    lm_loss: float = 0.0
    num_tokens: int = 0
    num_predicted: int = 0


@torch.no_grad()
def score_blocks(
    model: HeterogeneousLlamaForCausalLM,
    space: SearchSpace,
    load_variants: Callable[[int], LayerVariants],
    packed: PackedTokens,
    *,
    work_dir: Path,
    reporter: Reporter,
) -> Scores:
    """Score every composed block of every layer, the parent's own left out.

    Args:
        model: the parent in the precision to score in.
        space: its candidates.
        load_variants: gives the trained modules of one layer, on the model's device and in its precision.
        packed: validation windows.
        work_dir: finished layers are kept there, so a run that was killed continues with the next.
        reporter: who listens.
    """
    hidden_NTD = torch.cat([_embed(model, packed.tokens_NT[rows]) for rows in _window_groups(packed)])
    final_NTD = _run_windows(model, hidden_NTD, packed, layers=range(len(space.layers)))
    parent = _Sums()
    for rows in _window_groups(packed):
        _add_sums([parent], model, [final_NTD[rows]], final_NTD[rows], packed.labels_NT[rows])
    found: list[BlockScore] = []
    for layer, options in enumerate(space.layers):
        blocks = [block for block in options.blocks if not _is_parent(block, space)]
        path = work_dir / f"layer-{layer:03d}.json"
        sums = _read_sums(path, blocks)
        if sums is None:
            sums = _score_layer(
                model, load_variants(layer), hidden_NTD, final_NTD, packed, layer=layer, blocks=blocks, space=space
            )
            _write_sums(path, blocks, sums)
        found += [_score(layer, block, one) for block, one in zip(blocks, sums, strict=True)]
        hidden_NTD = _run_windows(model, hidden_NTD, packed, layers=range(layer, layer + 1))
        reporter.step(len(found), space.num_candidates, what="candidate blocks")
    return Scores(
        candidates=tuple(found),
        parent_lm_loss=parent.lm_loss / parent.num_predicted,
        num_tokens=parent.num_tokens,
    )


def _score_layer(
    model: HeterogeneousLlamaForCausalLM,
    variants: LayerVariants,
    hidden_NTD: Tensor,
    final_NTD: Tensor,
    packed: PackedTokens,
    *,
    layer: int,
    blocks: Sequence[BlockSpec],
    space: SearchSpace,
) -> list[_Sums]:
    """Return the sums of every candidate of one layer."""
    suffix: list[Any] = list(model.model.layers)[layer + 1 :]
    sums = [_Sums() for _ in blocks]
    for rows in _window_groups(packed):
        num_windows = len(packed.tokens_NT[rows])
        group_size = max(1, MAX_BATCH_TOKENS // (num_windows * packed.sequence_length))
        outputs = _candidate_outputs(model, variants, hidden_NTD[rows], packed, rows, layer, blocks, space)
        for start, stacked in _in_groups(outputs, size=group_size):
            hidden_BTD = torch.cat(stacked)
            kwargs = _attention_kwargs(model, hidden_BTD, packed.position_ids_NT[rows].repeat(len(stacked), 1))
            for behind in suffix:
                hidden_BTD = behind.feed_forward(behind.attend(hidden_BTD, **kwargs))
            _add_sums(
                sums[start : start + len(stacked)],
                model,
                list(hidden_BTD.split(num_windows)),
                final_NTD[rows],
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
    blocks: Sequence[BlockSpec],
    space: SearchSpace,
) -> Iterator[Tensor]:
    """Give the layer's output under each candidate; each attention variant runs once for all FFNs behind it."""
    layers: Any = model.model.layers
    kwargs = _attention_kwargs(model, hidden_BTD, packed.position_ids_NT[rows])
    attended: dict[str, Tensor] = {}
    for block in blocks:
        key = block.attention.key
        if key not in attended:
            attended.clear()  # blocks come attention by attention
            if block.attention.kind == "no_op":
                attended[key] = hidden_BTD
            elif block.attention == space.parent.attention:
                attended[key] = layers[layer].attend(hidden_BTD, **kwargs)
            else:
                attended[key] = variants["attention", key].attend(hidden_BTD, **kwargs)
        if block.ffn.kind == "no_op":
            yield attended[key]
        elif block.ffn == space.parent.ffn:
            yield layers[layer].feed_forward(attended[key])
        else:
            yield variants["ffn", block.ffn.key].feed_forward(attended[key])


def _add_sums(
    sums: Sequence[_Sums],
    model: HeterogeneousLlamaForCausalLM,
    finals: Sequence[Tensor],
    parent_BTD: Tensor,
    labels_BT: Tensor,
) -> None:
    """Add KL to the parent and next-token loss of each candidate's final hidden states.

    With logits z, KL(P || Q) = sum_v p (z_p - z_q) - logsumexp(z_p) + logsumexp(z_q): differences of logits keep a
    small KL exact, and no log-softmax of the candidate is ever written out.
    """
    next_BT = torch.full_like(labels_BT, IGNORED_LABEL)
    next_BT[:, :-1] = labels_BT[:, 1:]
    next_all = next_BT.flatten().to(parent_BTD.device)
    parent_hidden = model.model.norm(parent_BTD).flatten(0, 1)
    hidden = [model.model.norm(final_BTD).flatten(0, 1) for final_BTD in finals]
    for start in range(0, len(next_all), SLICE_TOKENS):
        part = slice(start, start + SLICE_TOKENS)
        next_S = next_all[part]
        is_predicted_S = next_S != IGNORED_LABEL
        parent_SV = model.lm_head(parent_hidden[part]).float()
        parent_lse_S = parent_SV.logsumexp(dim=-1)
        probability_SV = (parent_SV - parent_lse_S[:, None]).exp()
        for one, final in zip(sums, hidden, strict=True):
            logits_SV = model.lm_head(final[part]).float()
            lse_S = logits_SV.logsumexp(dim=-1)
            target_S = logits_SV.gather(-1, next_S.clamp(min=0)[:, None])[:, 0]
            kl_S = torch.linalg.vecdot(probability_SV, parent_SV - logits_SV) - parent_lse_S + lse_S
            one.kl += kl_S.double().sum().item()
            one.lm_loss += (lse_S - target_S)[is_predicted_S].double().sum().item()
            one.num_tokens += len(next_S)
            one.num_predicted += int(is_predicted_S.sum())


def _run_windows(
    model: HeterogeneousLlamaForCausalLM, hidden_NTD: Tensor, packed: PackedTokens, *, layers: range
) -> Tensor:
    """Return the parent's hidden states behind some of its layers."""
    modules: Any = model.model.layers
    finished = []
    for rows in _window_groups(packed):
        hidden_BTD = hidden_NTD[rows]
        kwargs = _attention_kwargs(model, hidden_BTD, packed.position_ids_NT[rows])
        for layer in layers:
            hidden_BTD = modules[layer].feed_forward(modules[layer].attend(hidden_BTD, **kwargs))
        finished.append(hidden_BTD)
    return torch.cat(finished)


def _embed(model: HeterogeneousLlamaForCausalLM, tokens_BT: Tensor) -> Tensor:
    return model.model.embed_tokens(tokens_BT.to(next(model.parameters()).device))


def _attention_kwargs(
    model: HeterogeneousLlamaForCausalLM, hidden_BTD: Tensor, position_ids_BT: Tensor
) -> dict[str, Any]:
    return attention_inputs(
        model,
        batch_size=hidden_BTD.shape[0],
        num_tokens=hidden_BTD.shape[1],
        device=hidden_BTD.device,
        dtype=hidden_BTD.dtype,
        position_ids_BT=position_ids_BT.to(hidden_BTD.device),
    )


def _window_groups(packed: PackedTokens) -> list[slice]:
    """Return groups of windows that fit one batch."""
    size = max(1, MAX_BATCH_TOKENS // packed.sequence_length)
    return [slice(start, min(start + size, len(packed))) for start in range(0, len(packed), size)]


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


def _is_parent(block: BlockSpec, space: SearchSpace) -> bool:
    return (block.attention, block.ffn) == (space.parent.attention, space.parent.ffn)


def _score(layer: int, block: BlockSpec, sums: _Sums) -> BlockScore:
    return BlockScore(
        layer=layer,
        block=block,
        kl=sums.kl / sums.num_tokens,
        lm_loss=sums.lm_loss / sums.num_predicted,
        num_tokens=sums.num_tokens,
    )


def _write_sums(path: Path, blocks: Sequence[BlockSpec], sums: Sequence[_Sums]) -> None:
    rows = {
        block.key: [one.kl, one.lm_loss, one.num_tokens, one.num_predicted]
        for block, one in zip(blocks, sums, strict=True)
    }
    write_atomically(path, json.dumps(rows).encode())


def _read_sums(path: Path, blocks: Sequence[BlockSpec]) -> list[_Sums] | None:
    """Return a finished layer's sums, or None when there are none for just these candidates."""
    if not path.is_file():
        return None
    rows: dict[str, tuple[float, float, int, int]] = json.loads(path.read_text(encoding="utf-8"))
    if set(rows) != {block.key for block in blocks}:
        return None
    return [
        _Sums(kl=kl, lm_loss=lm_loss, num_tokens=num_tokens, num_predicted=num_predicted)
        for kl, lm_loss, num_tokens, num_predicted in (rows[block.key] for block in blocks)
    ]
