"""Batched sampling that keeps the sampler's own log-probabilities: prompts padded on the left, finished rows leave.

Written out instead of calling `generate`, which pads finished rows until the last one ends, appends to its cache by
copying it, and returns scores of the whole vocabulary where one number per token is wanted.

Letters: B rows still being sampled, T tokens, V vocab_size, K most likely words.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from pipeline.fingerprint import fingerprint
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM

# Rows that have ended leave when they are more than one in so many: every leaving copies the cache.
_LEAVING = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What was sampled after a prompt: its tokens, end token included, and their log-probabilities in the sampler."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_terminated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTokens:
    """One token per row and its log-probability in the distribution it was drawn from."""

    ids_B: Tensor
    logprobs_B: Tensor


def seeded_generator(*seed: int | str, device: torch.device | str) -> torch.Generator:
    """Return a generator whose stream depends on these values alone, so a resumed step samples the same."""
    return torch.Generator(device).manual_seed(int(fingerprint(list(seed))[:15], 16))


@torch.no_grad()
def sample_completions(
    model: HeterogeneousLlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_ids: Collection[int],
    generator: torch.Generator | None,
) -> list[list[Completion]]:
    """Sample `num_samples` completions of every prompt in one batch; each prompt is read once.

    A completion ends with the first of `stop_ids`, or after `max_new_tokens`. At temperature 0 every token is the most
    likely one, and no generator is needed.

    Returns:
        One list per prompt, in order.
    """
    device = model.device
    prompt_ids_BT, attended_BT = _pad_left(prompts, device=device)
    new_layer: Any = functools.partial(_CacheLayer, prompt_ids_BT.shape[1] + max_new_tokens)
    cache = Cache(layer_class_to_replicate=new_layer)
    position_ids_BT = (attended_BT.cumsum(dim=1) - 1).clamp(min=0)
    logits_BV = _next_logits(model, prompt_ids_BT, attended_BT, position_ids_BT, cache)
    cache.batch_repeat_interleave(num_samples)
    logits_BV = logits_BV.repeat_interleave(num_samples, dim=0)
    attended_BT = attended_BT.repeat_interleave(num_samples, dim=0)
    next_position_B = attended_BT.sum(dim=1)

    rows = list(range(len(prompts) * num_samples))
    ids: list[list[int]] = [[] for _ in rows]
    logprobs: list[list[float]] = [[] for _ in rows]
    is_terminated = [False] * len(rows)
    for num_done in range(1, max_new_tokens + 1):
        sampled = sample_tokens(logits_BV, temperature=temperature, top_p=top_p, generator=generator)
        for row, id_, logprob in zip(rows, sampled.ids_B.tolist(), sampled.logprobs_B.tolist(), strict=True):
            if not is_terminated[row]:
                ids[row].append(id_)
                logprobs[row].append(logprob)
                is_terminated[row] = id_ in stop_ids
        if num_done == max_new_tokens or all(is_terminated):
            break
        going = [place for place, row in enumerate(rows) if not is_terminated[row]]
        ids_B = sampled.ids_B
        if len(rows) - len(going) > len(rows) // _LEAVING:
            going_B = torch.tensor(going, device=device)
            cache.batch_select_indices(going_B)
            ids_B, attended_BT, next_position_B = ids_B[going_B], attended_BT[going_B], next_position_B[going_B]
            rows = [rows[place] for place in going]
        attended_BT = torch.cat([attended_BT, attended_BT.new_ones(len(rows), 1)], dim=1)
        logits_BV = _next_logits(model, ids_B.unsqueeze(1), attended_BT, next_position_B.unsqueeze(1), cache)
        next_position_B = next_position_B + 1

    completions = [
        Completion(ids=tuple(ids[row]), logprobs=tuple(logprobs[row]), is_terminated=is_terminated[row])
        for row in range(len(ids))
    ]
    return [completions[start : start + num_samples] for start in range(0, len(completions), num_samples)]


def sample_tokens(
    logits_BV: Tensor, *, temperature: float, top_p: float, generator: torch.Generator | None
) -> SampledTokens:
    """Draw one token per row from softmax(logits / temperature), cut to the smallest set with probability `top_p`.

    At temperature 0 the most likely one is taken, and its log-probability is that of softmax(logits).
    """
    if temperature == 0:
        logprobs_BV = logits_BV.float().log_softmax(dim=1)
        best = logprobs_BV.max(dim=1)
        return SampledTokens(ids_B=best.indices, logprobs_B=best.values)
    logprobs_BV = (logits_BV.float() if temperature == 1 else logits_BV.float() / temperature).log_softmax(dim=1)
    if top_p < 1:
        logprobs_BV = _nucleus(logprobs_BV, top_p=top_p)
    # By the inverse of the distribution function: torch.multinomial draws one exponential per word of the vocabulary,
    # 28% of the time of a decoding step of 64 rows. float64, so that 49,152 terms add up.
    cumulative_BV = logprobs_BV.exp().cumsum(dim=1, dtype=torch.float64)
    uniform_B1 = torch.rand(len(logprobs_BV), 1, dtype=torch.float64, device=logprobs_BV.device, generator=generator)
    ids_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
    ids_B1 = ids_B1.clamp(max=logprobs_BV.shape[1] - 1)
    return SampledTokens(ids_B=ids_B1.squeeze(1), logprobs_B=logprobs_BV.gather(1, ids_B1).squeeze(1))


def _nucleus(logprobs_BV: Tensor, *, top_p: float) -> Tensor:
    num_words = logprobs_BV.shape[1]
    num_ordered = min(256, num_words)
    # The most likely few hundred nearly always hold top_p, and are found without ordering the whole vocabulary.
    ordered = logprobs_BV.topk(num_ordered, dim=1)
    while num_ordered < num_words and bool((ordered.values.exp().sum(dim=1) < top_p).any()):
        num_ordered = min(4 * num_ordered, num_words)
        ordered = logprobs_BV.topk(num_ordered, dim=1)
    before_BK = ordered.values.exp().cumsum(dim=1) - ordered.values.exp()
    kept_BK = ordered.values.masked_fill(before_BK >= top_p, float("-inf")).log_softmax(dim=1)
    return torch.full_like(logprobs_BV, float("-inf")).scatter_(1, ordered.indices, kept_BK)


class _CacheLayer(DynamicLayer):
    """Keys and values of one layer with room for `capacity` tokens: new ones are written behind the old in place."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._rooms: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values, [B, heads, T, head_dim] each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms = [self._room(states) for states in (key_states, value_states)]
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:stop] = states
        return self._show(stop)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, in rooms of its own."""
        if self.is_initialized:
            length = self.get_seq_length()
            repeated = [room[:, :, :length].repeat_interleave(repeats, dim=0) for room in self._rooms]
            self._rooms = [self._room(states) for states in repeated]
            for room, states in zip(self._rooms, repeated, strict=True):
                room[:, :, :length] = states
            self._show(length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, which stand in ascending order."""
        if self.is_initialized:
            length = self.get_seq_length()
            for place, room in enumerate(self._rooms):
                room[: len(indices), :, :length] = room[indices, :, :length]
                self._rooms[place] = room[: len(indices)]
            self._show(length)

    def _room(self, states: Tensor) -> Tensor:
        batch_size, num_heads, _, head_dim = states.shape
        return states.new_empty(batch_size, num_heads, self._capacity, head_dim)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (room[:, :, :length] for room in self._rooms)
        self.keys, self.values = keys, values
        return keys, values


def _pad_left(prompts: Sequence[Sequence[int]], *, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    attended = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(attended, device=device)


def _next_logits(
    model: HeterogeneousLlamaForCausalLM,
    ids_BT: Tensor,
    attended_BT: Tensor,
    position_ids_BT: Tensor,
    cache: Cache,
) -> Tensor:
    output = model(
        input_ids=ids_BT,
        attention_mask=attended_BT,
        position_ids=position_ids_BT,
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
