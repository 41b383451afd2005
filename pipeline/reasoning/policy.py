"""What a model says of sampled completions: log-probabilities and entropies, row by row, and their batches.

Rows with the same prompt share its computation. They stand behind one copy of it in one sequence, and a mask keeps
them apart: a token attends to the prompt and to its own completion alone, at the positions it would have by itself.

    sequence    p1 p2 p3 | a1 a2 | b1 b2 b3      of the rows  p a  and  p b
    positions    0  1  2 |  3  4 |  3  4  5
    b2 attends   *  *  * |       |  *  *

Prompts are padded on the left, so that all end at one place, and sequences on the right.

Letters: B rows, G sequences, T tokens, J tokens behind the prompts, K tokens of the longest completion, V vocab_size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.reasoning.grpo import token_logprobs, token_statistics

# Completions share a sequence up to this length: attention over a sequence grows with its square, what sharing saves
# does not. Of a token, a layer of SmolLM2 takes 3.5 M multiplications, attention over 512 tokens 0.6 M more.
MAX_SHARED_TOKENS = 512

_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledRow:
    """A prompt and one completion of it."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBatch:
    """Rows as sequences for a model, and where in its answer each row's tokens are.

    `next_ids_GJ` is the token after each one behind the prompts, and `has_next_GJ` says where there is one of the same
    completion; what the sequences predict at their prompts' ends are first tokens, `first_ids_B1` of `sequence_B`.
    `places` are those of first tokens, then of the others, in [B, K] flattened. `sampled_BK` marks rows' own tokens.
    """

    input_ids_GT: Tensor
    position_ids_GT: Tensor
    attended_G1TT: Tensor
    sequence_B: Tensor
    first_ids_B1: Tensor
    next_ids_GJ: Tensor
    has_next_GJ: Tensor
    places: Tensor
    sampled_BK: Tensor

    def by_row(self, first_B1: Tensor, others_GJ: Tensor) -> Tensor:
        """Return values of first and of other tokens in the places of their rows, [B, K], zero elsewhere."""
        values = torch.cat([first_B1.squeeze(1), others_GJ[self.has_next_GJ]])
        return values.new_zeros(self.sampled_BK.numel()).index_copy(0, self.places, values).view(self.sampled_BK.shape)

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """Return values of each row's completion tokens in their places, [B, K], zero elsewhere."""
        spread_BK = torch.zeros(self.sampled_BK.shape, dtype=torch.float32, device=self.sampled_BK.device)
        spread_BK[self.sampled_BK] = torch.cat(list(values)).to(spread_BK.device)
        return spread_BK


@dataclass(frozen=True, kw_only=True, slots=True)
class RowStatistics:
    """Log-probability and entropy at each completion token of one row, float32, on the CPU."""

    logprobs: Tensor
    entropies: Tensor


def batch_rows(rows: Sequence[SampledRow], *, device: torch.device) -> RowBatch:
    """Return rows as one batch, those of one prompt next to each other where they fit one sequence."""
    sequences = _sequences(rows)
    prompt_end = max(len(rows[places[0]].prompt_ids) for places in sequences)
    longest = max(len(row.completion_ids) for row in rows)
    width = prompt_end + max(sum(len(rows[place].completion_ids) for place in places) for places in sequences)
    input_ids, position_ids, branches, next_ids, has_next, places_of_others = [], [], [], [], [], []
    sequence_of: dict[int, int] = {}
    for index, places in enumerate(sequences):
        prompt = rows[places[0]].prompt_ids
        padding = prompt_end - len(prompt)
        ids, positions = [0] * padding + list(prompt), [0] * padding + list(range(len(prompt)))
        branch, following, follows = [-1] * padding + [0] * len(prompt), list[int](), list[bool]()
        for number, place in enumerate(places, start=1):
            completion = rows[place].completion_ids
            sequence_of[place] = index
            ids += completion
            positions += range(len(prompt), len(prompt) + len(completion))
            branch += [number] * len(completion)
            following += [*completion[1:], 0]
            follows += [True] * (len(completion) - 1) + [False]
            places_of_others += range(place * longest + 1, place * longest + len(completion))
        rest = width - len(ids)
        input_ids.append(ids + [0] * rest)
        position_ids.append(positions + [0] * rest)
        branches.append(branch + [-1] * rest)
        next_ids.append(following + [0] * rest)
        has_next.append(follows + [False] * rest)
    branch_GT = torch.tensor(branches, device=device)
    is_visible_GTT = (branch_GT.unsqueeze(2) == branch_GT.unsqueeze(1)) | (branch_GT.unsqueeze(1) == 0)
    lengths = torch.tensor([len(row.completion_ids) for row in rows], device=device)
    return RowBatch(
        input_ids_GT=torch.tensor(input_ids, device=device),
        position_ids_GT=torch.tensor(position_ids, device=device),
        attended_G1TT=is_visible_GTT.tril().unsqueeze(1),
        sequence_B=torch.tensor([sequence_of[place] for place in range(len(rows))], device=device),
        first_ids_B1=torch.tensor([row.completion_ids[:1] for row in rows], device=device),
        next_ids_GJ=torch.tensor(next_ids, device=device),
        has_next_GJ=torch.tensor(has_next, device=device),
        places=torch.tensor([*range(0, len(rows) * longest, longest), *places_of_others], device=device),
        sampled_BK=torch.arange(longest, device=device) < lengths.unsqueeze(1),
    )


def batch_logprobs(forward: Callable[..., object], batch: RowBatch, *, temperature: float) -> Tensor:
    """Return the log-probability of every sampled token, [B, K], float32; `forward` is a causal language model."""
    first_B1V, others_GJV = _logits(forward, batch)
    return batch.by_row(
        token_logprobs(first_B1V, ids_BT=batch.first_ids_B1, temperature=temperature),
        token_logprobs(others_GJV, ids_BT=batch.next_ids_GJ, temperature=temperature),
    )


@torch.no_grad()
def row_statistics(
    forward: Callable[..., object],
    rows: Sequence[SampledRow],
    *,
    temperature: float,
    batch_size: int,
    device: torch.device,
) -> list[RowStatistics]:
    """Return what a model says of every row, without gradients; `batch_size` rows share a pass."""
    found: dict[int, RowStatistics] = {}
    order = by_prompt(range(len(rows)), row_of=lambda index: rows[index])
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = batch_rows([rows[index] for index in indices], device=device)
        first_B1V, others_GJV = _logits(forward, batch)
        of_first = token_statistics(first_B1V, ids_BT=batch.first_ids_B1, temperature=temperature)
        of_others = token_statistics(others_GJV, ids_BT=batch.next_ids_GJ, temperature=temperature)
        # One transfer a batch: a GPU waits for each.
        lengths = [len(rows[index].completion_ids) for index in indices]
        logprobs, entropies = (
            batch.by_row(first_B1, others_GJ)[batch.sampled_BK].cpu().split(lengths)
            for first_B1, others_GJ in zip(of_first, of_others, strict=True)
        )
        for index, row_logprobs, row_entropies in zip(indices, logprobs, entropies, strict=True):
            found[index] = RowStatistics(logprobs=row_logprobs, entropies=row_entropies)
    return [found[index] for index in range(len(rows))]


def by_prompt(items: Iterable[_Item], *, row_of: Callable[[_Item], SampledRow]) -> list[_Item]:
    """Return items in an order in which those of one prompt are neighbours, and prompts of like length are."""
    groups: dict[tuple[int, ...], list[_Item]] = {}
    for item in items:
        groups.setdefault(row_of(item).prompt_ids, []).append(item)
    ordered = sorted(groups.values(), key=lambda group: sum(row_of(item).num_tokens for item in group))
    return [item for group in ordered for item in group]


def _sequences(rows: Sequence[SampledRow]) -> list[list[int]]:
    """Return the places of rows that share a sequence, for each sequence."""
    sequences: list[list[int]] = []
    newest: dict[tuple[int, ...], int] = {}
    num_tokens: list[int] = []
    for place, row in enumerate(rows):
        index = newest.get(row.prompt_ids)
        if index is None or num_tokens[index] + len(row.completion_ids) > MAX_SHARED_TOKENS:
            newest[row.prompt_ids] = index = len(sequences)
            sequences.append([])
            num_tokens.append(len(row.prompt_ids))
        sequences[index].append(place)
        num_tokens[index] += len(row.completion_ids)
    return sequences


def _logits(forward: Callable[..., object], batch: RowBatch) -> tuple[Tensor, Tensor]:
    """Return the logits that predict first tokens, [B, 1, V], and those behind every other token, [G, J, V]."""
    output = forward(
        input_ids=batch.input_ids_GT,
        attention_mask=batch.attended_G1TT,
        position_ids=batch.position_ids_GT,
        use_cache=False,
        logits_to_keep=batch.next_ids_GJ.shape[1] + 1,
    )
    logits_GJV: Tensor = output.logits  # pyright: ignore[reportAttributeAccessIssue]
    return logits_GJV[:, :1][batch.sequence_B], logits_GJV[:, 1:]
