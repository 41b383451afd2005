"""Prompts that reinforcement learning never trains on: which they are, and what the policy earns on them."""

import random
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.reasoning.experience import Prompt, sample_judged
from pipeline.reasoning.prompts import RLItem, kind_of
from pipeline.reasoning.reward_model import RewardModel
from pipeline.reasoning.samplers import Sampler
from pipeline.recipe import RLConfig
from pipeline.training.distributed import sum_across_ranks
from pipeline.training.engine import TrainEngine


def split_held_out(items: Sequence[RLItem], *, config: RLConfig) -> tuple[list[RLItem], list[RLItem]]:
    """Return the items that are trained on, and those whose reward is only watched: of each kind the same share.

    Raises:
        DataError: when too few are left to train on, or too few are held out to have one of each kind.
    """
    order = random.Random(f"held-out/{config.seed}").sample(range(len(items)), len(items))
    by_kind: dict[str, list[int]] = {}
    for place in order:
        by_kind.setdefault(kind_of(items[place]), []).append(place)
    num_held_out = config.held_out.num_prompts
    if num_held_out < len(by_kind):
        raise DataError(
            f"rl.held_out.num_prompts is {num_held_out}, and there are prompts of {len(by_kind)} kinds "
            f"({', '.join(sorted(by_kind))}): hold out at least one of each"
        )
    held_out: set[int] = set()
    for num_left, (_, places) in zip(range(len(by_kind), 0, -1), sorted(by_kind.items()), strict=True):
        wanted = round(num_held_out * len(places) / len(items))
        # One of each at least, and the last kind takes what rounding left.
        most = num_held_out - len(held_out) - (num_left - 1)
        held_out |= set(places[: most if num_left == 1 else min(max(wanted, 1), most)])
    require_prompts(len(items) - len(held_out), config=config)
    return (
        [item for place, item in enumerate(items) if place not in held_out],
        [item for place, item in enumerate(items) if place in held_out],
    )


def require_prompts(num_prompts: int, *, config: RLConfig) -> None:
    """Refuse a training whose steps take more prompts than are left.

    Raises:
        DataError: when they do.
    """
    if num_prompts < config.prompts_per_step:
        raise DataError(
            f"{num_prompts} prompts are left for reinforcement learning, a step takes {config.prompts_per_step}: raise "
            "rl_prompts.items_per_task or rl_prompts.instructions.num_prompts"
            + (", or let rl.difficulty keep more of them" if config.difficulty is not None else "")
        )


def held_out_rewards(
    engine: TrainEngine,
    items: Sequence[RLItem],
    *,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: RewardModel | None,
    config: RLConfig,
    step: int,
    before: Mapping[str, float] | None,
) -> dict[str, float]:
    """Return mean reward and accuracy on the held-out prompts by the policy as it is, or as they were last seen.

    Between two measurements they are those of the row `before`, and `is_held_out_measured` is 0; without such a row
    they are measured. Of all prompts, and of each kind where there are several. One sample a prompt, drawn alike every
    time, so that two values differ by the policy alone.
    """
    if before is not None and (step - 1) % config.held_out.interval_steps and step != config.steps:
        copied = {name: value for name, value in before.items() if name.startswith("held_out_")}
        return {**copied, "is_held_out_measured": 0}
    kinds = [kind_of(item) for item in items]
    prompts: list[Prompt] = []
    for place, (item, kind) in enumerate(zip(items, kinds, strict=True)):
        num_thinking = round(config.share_thinking_on * kinds.count(kind))
        prompts.append(Prompt(item=item, thinking=kinds[:place].count(kind) < num_thinking))
    groups = sample_judged(
        sampler,
        prompts[engine.rank :: engine.world_size],
        eos_token_ids=engine.model.architecture.eos_token_ids,
        tokenizer=tokenizer,
        reward_model=reward_model,
        config=config,
        num_samples=1,
        seed=("held out", config.seed, engine.rank),
    )
    found = list(zip(kinds[engine.rank :: engine.world_size], (group[0] for group in groups), strict=True))
    watched: dict[str, float] = {"is_held_out_measured": 1}
    for kind in ("", *(sorted(set(kinds)) if len(set(kinds)) > 1 else ())):
        own = [judged for found_kind, judged in found if kind in ("", found_kind)]
        sums = [sum(judged.reward for judged in own), float(sum(judged.verdict.is_right for judged in own))]
        reward, right = sum_across_ranks(sums, device=engine.device)
        num_prompts = kinds.count(kind) if kind else len(items)
        suffix = f"_{kind}" if kind else ""
        watched |= {f"held_out_reward{suffix}": reward / num_prompts, f"held_out_accuracy{suffix}": right / num_prompts}
    return watched
