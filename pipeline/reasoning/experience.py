"""One step's experience: which prompts, what was sampled, what it earned, what policy and reference say."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.data.chat import generation_prompt_ids, reasoning_messages, stop_token_ids
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.model.sampling import Completion
from pipeline.reasoning.algorithms import JudgedRow, with_advantages
from pipeline.reasoning.curriculum import Batch
from pipeline.reasoning.grpo import share_zero_advantage_groups
from pipeline.reasoning.policy import RowStatistics, SampledRow, row_statistics
from pipeline.reasoning.prompts import RLItem
from pipeline.reasoning.reward_model import RewardModel
from pipeline.reasoning.rewards import Verdict, judge
from pipeline.reasoning.samplers import OwnSampler, Sampler
from pipeline.recipe import RPO, RLConfig
from pipeline.training.engine import TrainEngine


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question in one mode."""

    item: RLItem
    thinking: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One completion, what it says, and what it earns; `model_reward` is the reward model's part of `reward`."""

    row: SampledRow
    completion: Completion
    text: str
    verdict: Verdict
    model_reward: float
    reward: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One step's samples on this rank, and some of them in words."""

    rows: tuple[JudgedRow, ...]
    num_groups: int
    num_zero_advantage_groups: float
    samples: tuple[dict[str, Any], ...]


def is_sampled_by_reference(config: RLConfig) -> bool:
    """Return whether rollouts are replies of the reference, as in offline RPO, and not of the policy."""
    return isinstance(config.algorithm, RPO) and not config.algorithm.online


def draw_prompts(
    items: Sequence[RLItem], *, config: RLConfig, step: int, curriculum: Sequence[Batch] | None
) -> list[Prompt]:
    """Return the prompts of a step, counted from 1; without a curriculum every item comes once before any comes again.

    The first `share_thinking_on` of them think.
    """
    num_thinking = round(config.share_thinking_on * config.prompts_per_step)
    if curriculum is not None:
        places = curriculum[step - 1].places
    else:
        first = (step - 1) * config.prompts_per_step
        drawn = (divmod(place, len(items)) for place in range(first, first + config.prompts_per_step))
        places = [_order(len(items), config.seed, epoch)[index] for epoch, index in drawn]
    return [Prompt(item=items[place], thinking=number < num_thinking) for number, place in enumerate(places)]


def longest_prompt(items: Sequence[RLItem], *, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens of the longest prompt, in whichever mode."""
    return max(
        len(generation_prompt_ids(tokenizer, reasoning_messages(item.question, thinking=thinking)))
        for item in items
        for thinking in (True, False)
    )


def sample_judged(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    *,
    eos_token_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    reward_model: RewardModel | None,
    config: RLConfig,
    num_samples: int,
    seed: Sequence[int | str],
) -> list[list[Judged]]:
    """Sample every prompt `num_samples` times at the recipe's temperature and judge the replies."""
    if not prompts:
        return []
    prompt_ids = [
        generation_prompt_ids(tokenizer, reasoning_messages(prompt.item.question, thinking=prompt.thinking))
        for prompt in prompts
    ]
    groups = sampler.sample(
        prompt_ids,
        num_samples=num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_ids=stop_token_ids(tokenizer, eos_token_ids),
        seed=seed,
    )
    prompted = [
        (prompt, ids, completion, _text(completion, tokenizer))
        for prompt, ids, group in zip(prompts, prompt_ids, groups, strict=True)
        for completion in group
    ]
    verdicts = [
        judge(
            text,
            item=prompt.item,
            thinking=prompt.thinking,
            is_terminated=completion.is_terminated,
            instruction_reward=config.instruction_reward,
        )
        for prompt, _, completion, text in prompted
    ]
    model_rewards = [0.0] * len(prompted)
    if reward_model is not None:
        model_rewards = reward_model.rewards(
            [
                (prompt.item.question, verdict.answer if verdict.is_well_formed else "")
                for (prompt, *_), verdict in zip(prompted, verdicts, strict=True)
            ]
        )
    judged = [
        Judged(
            row=SampledRow(prompt_ids=tuple(ids), completion_ids=completion.ids),
            completion=completion,
            text=text,
            verdict=verdict,
            model_reward=model_reward,
            reward=model_reward
            + verdict.reward(accuracy_reward=config.accuracy_reward, format_reward=config.format_reward),
        )
        for (_, ids, completion, text), verdict, model_reward in zip(prompted, verdicts, model_rewards, strict=True)
    ]
    return [judged[start : start + num_samples] for start in range(0, len(judged), num_samples)]


def collect_rollout(
    engine: TrainEngine,
    *,
    sampler: Sampler,
    reference: HeterogeneousLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: RewardModel | None,
    prompts: Sequence[Prompt],
    config: RLConfig,
    step: int,
) -> Rollout:
    """Sample this rank's share of a step's groups, judge them, and read policy and reference at every token."""
    own = prompts[engine.rank :: engine.world_size]
    groups = sample_judged(
        OwnSampler(reference) if is_sampled_by_reference(config) else sampler,
        own,
        eos_token_ids=engine.model.architecture.eos_token_ids,
        tokenizer=tokenizer,
        reward_model=reward_model,
        config=config,
        num_samples=config.samples_per_prompt,
        seed=("rollout", config.seed, step, engine.rank),
    )
    found = [judged for group in groups for judged in group]
    engine.model.eval()
    rows = [judged.row for judged in found]
    old = score_rows(engine.model, rows, config=config, engine=engine)
    anchor = score_rows(reference, rows, config=config, engine=engine)
    rewards_PS = torch.tensor([judged.reward for judged in found]).reshape(len(own), config.samples_per_prompt)
    return Rollout(
        rows=tuple(
            with_advantages(
                [
                    JudgedRow(
                        row=judged.row,
                        sampler_logprobs=torch.tensor(judged.completion.logprobs),
                        verdict=judged.verdict,
                        model_reward=judged.model_reward,
                        reward=judged.reward,
                        advantage=0.0,
                        old=old_row,
                        reference=reference_row,
                    )
                    for judged, old_row, reference_row in zip(found, old, anchor, strict=True)
                ],
                algorithm=config.algorithm,
                num_samples=config.samples_per_prompt,
            )
        ),
        num_groups=len(own),
        num_zero_advantage_groups=share_zero_advantage_groups(rewards_PS) * len(own),
        samples=tuple(
            {
                "task": prompt.item.task,
                "mode": "on" if prompt.thinking else "off",
                "question": prompt.item.question.strip(),
                "answer": prompt.item.answer,
                "completion": group[0].text,
                "reward": group[0].reward,
                "is_terminated": group[0].completion.is_terminated,
            }
            for prompt, group in zip(own, groups, strict=True)
        ),
    )


def score_rows(
    model: HeterogeneousLlamaForCausalLM, rows: Sequence[SampledRow], *, config: RLConfig, engine: TrainEngine
) -> list[RowStatistics]:
    """Return what a model says of every sampled token, at the recipe's temperature.

    A pass takes as many rows as one of the engine's with gradients, which holds more, so it fits wherever that does.
    """
    return row_statistics(
        model, rows, temperature=config.temperature, batch_size=engine.micro_batch_size, device=engine.device
    )


@functools.lru_cache(maxsize=2)
def _order(num_items: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(num_items), num_items)


def _text(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = completion.ids[:-1] if completion.is_terminated else completion.ids
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))
