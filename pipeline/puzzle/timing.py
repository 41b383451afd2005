"""Timing one generation: a prefill that fills a KV cache, then decode steps behind it. Wall clock; no model building.

On a GPU the clock is read after the queue has run dry, so a time is that of the work and not of its submission.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import DynamicCache

from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.puzzle.calibration import Phase
from pipeline.recipe import Scenario

# Enough decode steps that one timing outlasts the clock's and the scheduler's grain; few enough that the context hardly
# grows meanwhile.
MAX_DECODE_STEPS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationTiming:
    """One timing of one scenario: the whole prefill, and one decode step of the whole batch, half-way through."""

    prefill_ms: float
    decode_ms: float
    num_decode_steps: int

    def of(self, phase: Phase) -> float:
        """Return the time of one phase."""
        return self.prefill_ms if phase == "prefill" else self.decode_ms


def decode_work(scenario: Scenario) -> tuple[int, int]:
    """Return how many tokens stand before the decode steps that are timed, and how many steps those are.

    A step behind the prompt and half of the generated tokens costs what the steps of the whole generation cost on
    average, since attention's work grows by the same amount with each.
    """
    num_steps = min(scenario.generation_tokens, MAX_DECODE_STEPS)
    return scenario.prompt_tokens + (scenario.generation_tokens - num_steps) // 2, num_steps


@torch.inference_mode()
def time_generation(
    model: HeterogeneousLlamaForCausalLM,
    scenario: Scenario,
    *,
    after: Callable[[Literal["prefill", "filling"]], None] = lambda _: None,
) -> GenerationTiming:
    """Time one prefill, and decode steps in the middle of the generation; the tokens' values do not change the work.

    `after` is called outside the clocks: when the prompt is in the cache, and when the tokens before the timed steps
    are.
    """
    device = next(model.parameters()).device
    vocab_size = model.architecture.vocab_size
    shape = (scenario.batch_size, scenario.prompt_tokens)
    prompt_BT = torch.arange(shape[0] * shape[1], device=device).reshape(shape) % vocab_size
    num_before, num_steps = decode_work(scenario)
    cache = DynamicCache()

    began = now_s(device)
    logits_BTV = model(input_ids=prompt_BT, cache=cache, use_cache=True, logits_to_keep=1).logits
    prefill_s = now_s(device) - began
    after("prefill")

    if num_before > scenario.prompt_tokens:
        filler_BT = prompt_BT[:, :1].expand(-1, num_before - scenario.prompt_tokens)
        model(input_ids=filler_BT, cache=cache, use_cache=True, logits_to_keep=1)
    after("filling")

    token_BT = logits_BTV[:, -1].argmax(dim=-1, keepdim=True)
    steps_s = []
    for _ in range(num_steps):
        began = now_s(device)
        model(input_ids=token_BT, cache=cache, use_cache=True, logits_to_keep=1)
        steps_s.append(now_s(device) - began)
    return GenerationTiming(
        prefill_ms=1000 * prefill_s, decode_ms=1000 * statistics.fmean(steps_s), num_decode_steps=num_steps
    )


def now_s(device: torch.device) -> float:
    """Return the wall clock in seconds, on a GPU once its queue has run dry."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
