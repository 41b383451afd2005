"""One step's experience: which prompts, what was sampled, what it earned, what policy and reference say."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.data.chat import generation_prompt_ids, reasoning_messages, stop_token_ids
from pipeline.data.reasoning_items import ReasoningItem
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.reasoning.grpo import group_advantages, share_zero_advantage_groups
from pipeline.reasoning.policy import RowStatistics, SampledRow, row_statistics
from pipeline.reasoning.rewards import Verdict, judge
from pipeline.reasoning.rollout import Completion, sample_completions, seeded_generator
from pipeline.recipe import RLConfig
from pipeline.training.engine import TrainEngine

# Rows per forward pass without gradients: the float32 log-softmax of 16 rows of 100 tokens and 49,152 words is 315 MB.
_SCORED_ROWS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question in one mode."""

    item: ReasoningItem
    thinking: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedRow:
    """A sampled completion with all that its update needs."""

    row: SampledRow
    sampler_logprobs: Tensor
    verdict: Verdict
    reward: float
    advantage: float
    old: RowStatistics
    reference: RowStatistics


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One step's samples on this rank, and some of them in words."""

    rows: tuple[JudgedRow, ...]
    num_groups: int
    num_zero_advantage_groups: float
    samples: tuple[dict[str, Any], ...]


def draw_prompts(items: Sequence[ReasoningItem], *, config: RLConfig, step: int) -> list[Prompt]:
    """Return the prompts of a step, counted from 1: every item comes once before any comes again."""
    num_thinking = round(config.share_thinking_on * config.prompts_per_step)
    prompts = []
    for place in range(config.prompts_per_step):
        epoch, index = divmod((step - 1) * config.prompts_per_step + place, len(items))
        order = random.Random(f"{config.seed}/{epoch}").sample(range(len(items)), len(items))
        prompts.append(Prompt(item=items[order[index]], thinking=place < num_thinking))
    return prompts


def collect_rollout(
    engine: TrainEngine,
    *,
    reference: HeterogeneousLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ReasoningItem],
    config: RLConfig,
    step: int,
) -> Rollout:
    """Sample this rank's share of a step's groups, judge them, and read policy and reference at every token."""
    policy = engine.model
    policy.eval()
    prompts = draw_prompts(items, config=config, step=step)[engine.rank :: engine.world_size]
    prompt_ids = [
        generation_prompt_ids(tokenizer, reasoning_messages(prompt.item.question, thinking=prompt.thinking))
        for prompt in prompts
    ]
    groups = sample_completions(
        policy,
        prompt_ids,
        num_samples=config.samples_per_prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=1.0,
        stop_ids=stop_token_ids(tokenizer, policy.architecture.eos_token_ids),
        generator=seeded_generator("rollout", config.seed, step, engine.rank, device=engine.device),
    )
    texts = [[_text(completion, tokenizer) for completion in group] for group in groups]
    verdicts = [
        judge(text, item=prompt.item, thinking=prompt.thinking, is_terminated=completion.is_terminated)
        for prompt, group, group_texts in zip(prompts, groups, texts, strict=True)
        for completion, text in zip(group, group_texts, strict=True)
    ]
    rewards = [
        verdict.reward(accuracy_reward=config.accuracy_reward, format_reward=config.format_reward)
        for verdict in verdicts
    ]
    rewards_PS = torch.tensor(rewards).reshape(len(prompts), config.samples_per_prompt)
    advantages_PS = group_advantages(rewards_PS, baseline=config.baseline, normalise_by_std=config.normalise_by_std)
    rows = [
        SampledRow(prompt_ids=tuple(ids), completion_ids=completion.ids)
        for ids, group in zip(prompt_ids, groups, strict=True)
        for completion in group
    ]
    old = score_rows(policy, rows, config=config, device=engine.device)
    anchor = score_rows(reference, rows, config=config, device=engine.device)
    completions = [completion for group in groups for completion in group]
    return Rollout(
        rows=tuple(
            JudgedRow(
                row=row,
                sampler_logprobs=torch.tensor(completion.logprobs),
                verdict=verdict,
                reward=reward,
                advantage=advantage,
                old=old_row,
                reference=reference_row,
            )
            for row, completion, verdict, reward, advantage, old_row, reference_row in zip(
                rows, completions, verdicts, rewards, advantages_PS.flatten().tolist(), old, anchor, strict=True
            )
        ),
        num_groups=len(prompts),
        num_zero_advantage_groups=share_zero_advantage_groups(rewards_PS) * len(prompts),
        samples=tuple(
            {
                "task": prompt.item.task,
                "mode": "on" if prompt.thinking else "off",
                "question": prompt.item.question.strip(),
                "answer": prompt.item.answer,
                "completion": group_texts[0],
                "reward": rewards_PS[place, 0].item(),
                "is_terminated": group[0].is_terminated,
            }
            for place, (prompt, group, group_texts) in enumerate(zip(prompts, groups, texts, strict=True))
        ),
    )


def score_rows(
    model: HeterogeneousLlamaForCausalLM, rows: Sequence[SampledRow], *, config: RLConfig, device: torch.device
) -> list[RowStatistics]:
    """Return what a model says of every sampled token, at the recipe's temperature."""
    return row_statistics(model, rows, temperature=config.temperature, batch_size=_SCORED_ROWS, device=device)


def _text(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = completion.ids[:-1] if completion.is_terminated else completion.ids
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))
