"""Greedy answers to chat prompts, in left-padded batches. Models in, token ids out: no files.

B batch, T tokens
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a model wrote behind one prompt, without its end token."""

    ids: tuple[int, ...]
    has_ended: bool


@torch.inference_mode()
def complete_greedily(
    model: HeterogeneousLlamaForCausalLM,
    *,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """Return the most likely continuation of each prompt, token by token, in the order given.

    It ends before the first of `stop_ids`, of which there must be one at least.
    Prompts of like length share a batch; padding stands on the left and is masked. A batch ends when all its rows have.
    """
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],  # masked on the left, cut off on the right
        use_cache=True,
    )
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    completions: dict[int, Completion] = {}
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        width = max(len(prompts[index]) for index in batch)
        padded_BT = torch.zeros(len(batch), width, dtype=torch.long)
        mask_BT = torch.zeros(len(batch), width, dtype=torch.long)
        for row, index in enumerate(batch):
            padded_BT[row, width - len(prompts[index]) :] = torch.tensor(prompts[index], dtype=torch.long)
            mask_BT[row, width - len(prompts[index]) :] = 1
        output_BT = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            inputs=padded_BT.to(model.device), attention_mask=mask_BT.to(model.device), generation_config=settings
        )
        assert isinstance(output_BT, torch.Tensor)
        for index, row in zip(batch, output_BT[:, width:].tolist(), strict=True):
            completions[index] = _until_end(row, stop_ids=stop_ids)
        on_batch()
    return [completions[index] for index in range(len(prompts))]


def _until_end(ids: Sequence[int], *, stop_ids: Sequence[int]) -> Completion:
    for position, token in enumerate(ids):
        if token in stop_ids:
            return Completion(ids=tuple(ids[:position]), has_ended=True)
    return Completion(ids=tuple(ids), has_ended=False)
