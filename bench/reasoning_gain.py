"""What reinforcement learning brings on questions it was not trained on: python bench/reasoning_gain.py --help.

The recipe's own questions tell families apart to 15 points. Here as many as are asked for are drawn for each trained
family, of the part of all questions that evaluations are drawn from, and two checkpoints of a finished run answer them
greedily in both modes. A question weighs as often as its task draws it: of 400 different pairs of numbers to 40 more
than half have the divisor 1, and 23% as the task draws them. Answers to the same question are compared, so an interval
is that of the change itself; in `both` a question counts by the mean of its two answers. Families weigh alike.

A policy may gain by saying what is most often right. So where one answer is right in a tenth of a family's draws, the
last lines tell what was found where it is right and where it is not. Settings that were chosen by these questions are
judged on others: `--seed`.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import polars as pl
import reasoning_gym

from pipeline.data.reasoning_items import DATASET_SIZE, ReasoningItem, generate_items
from pipeline.errors import DataError, MissingInputError
from pipeline.evaluation.intervals import Estimate, share, weighted_mean
from pipeline.evaluation.results import Mode
from pipeline.evaluation.suite import load_for_evaluation
from pipeline.evaluation.toggle import Answer, answer_items, is_answer_found, is_compliant
from pipeline.execution import find_artifact, open_workspace
from pipeline.hardware import describe_hardware
from pipeline.model.checkpoint import load_tokenizer
from pipeline.reasoning.prompts import load_prompts
from pipeline.recipe import EvaluationConfig, ReasoningTask

MODES: tuple[Mode, ...] = ("on", "off")
LEAST_SHARE_OF_ONE_ANSWER = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One question: right, 1.0, or wrong, 0.0, by two checkpoints, and how often its task draws it."""

    before: float
    after: float
    num_draws: int

    @property
    def change(self) -> float:
        """What the second checkpoint brings."""
        return self.after - self.before


def fresh_items(
    tasks: Sequence[ReasoningTask], *, toggle_dir: Path, prompts_dir: Path, num_items: int, seed: int
) -> list[ReasoningItem]:
    """Draw that many questions of every task which neither training has; of a small task fewer."""
    known = set(pl.read_parquet(toggle_dir / "samples.parquet", columns=["question"])["question"])
    known |= {item.question for item in load_prompts(prompts_dir)}
    return [item for task in tasks for item in _most_items(task, num_items=num_items, known=known, seed=seed)]


def _most_items(task: ReasoningTask, *, num_items: int, known: set[str], seed: int) -> list[ReasoningItem]:
    """Return as many, or three quarters as often as it takes where the task has not so many."""
    while True:
        try:
            return generate_items(task, num_items=num_items, seed=seed, exclude_questions=known, part="evaluation")
        except DataError:
            num_items = num_items * 3 // 4
            if not num_items:
                raise


def draws_of(items: Sequence[ReasoningItem]) -> dict[str, int]:
    """Return how often each question was drawn until the last of its task was."""
    found: Counter[str] = Counter()
    last = {item.task: item for item in items}
    for item in last.values():
        dataset = reasoning_gym.create_dataset(item.task, size=DATASET_SIZE, seed=item.seed, **item.config)
        found.update(dataset[index]["question"] for index in range(item.index + 1))
    return {item.question: found[item.question] for item in items}


def answers_of(
    checkpoint_dir: Path, items: Sequence[ReasoningItem], *, config: EvaluationConfig
) -> dict[Mode, list[Answer]]:
    """Return a checkpoint's greedy replies in both modes."""
    model = load_for_evaluation(checkpoint_dir, config=config)
    tokenizer = load_tokenizer(checkpoint_dir)
    max_new_tokens: dict[Mode, int] = {"on": config.max_new_tokens_on, "off": config.max_new_tokens_off}
    return {
        mode: answer_items(
            model,
            items=items,
            mode=mode,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens[mode],
            batch_size=config.batch_size,
        )
        for mode in MODES
    }


def print_comparison(
    before: Mapping[Mode, Sequence[Answer]], after: Mapping[Mode, Sequence[Answer]], *, draws: Mapping[str, int]
) -> None:
    """Print right answers by family and mode before and after, and the change with its interval."""
    judged = {mode: _judged(before[mode], after[mode], draws=draws) for mode in MODES}
    for mode in MODES:
        for task, of_task in judged[mode].items():
            print_row(mode, task, [of_task])
        print_row(mode, "all", list(judged[mode].values()))
        obeys = [
            share(sum(is_compliant(answer.text, mode=mode) for answer in answers[mode]), num_samples=len(answers[mode]))
            for answers in (before, after)
        ]
        print(f"{mode:5} {'obeys the switch':23} {shown(obeys[0]):>24} {shown(obeys[1]):>24}")
    both = {
        task: [
            Judged(before=(on.before + off.before) / 2, after=(on.after + off.after) / 2, num_draws=on.num_draws)
            for on, off in zip(of_task, judged["off"][task], strict=True)
        ]
        for task, of_task in judged["on"].items()
    }
    for task, of_task in both.items():
        print_row("both", task, [of_task])
    print_row("both", "all", list(both.values()))
    for mode in MODES:
        for task, of_task in judged[mode].items():
            print_by_answer(mode, task, of_task, [one.item for one in before[mode] if one.item.task == task])


def print_by_answer(mode: str, task: str, judged: Sequence[Judged], items: Sequence[ReasoningItem]) -> None:
    """Print what was found where the family's most frequent answer is right, and where it is not."""
    total = sum(one.num_draws for one in judged)
    draws_by_answer: Counter[str] = Counter()
    for one, item in zip(judged, items, strict=True):
        draws_by_answer[item.answer] += one.num_draws
    ((answer, num_draws),) = draws_by_answer.most_common(1)
    if num_draws < LEAST_SHARE_OF_ONE_ANSWER * total:
        return
    for where, is_right in ((f"where {answer} is right", True), (f"where {answer} is not", False)):
        chosen = [one for one, item in zip(judged, items, strict=True) if (item.answer == answer) is is_right]
        if chosen:
            print_row(mode, f"{task}, {where}", [chosen])


def _judged(before: Sequence[Answer], after: Sequence[Answer], *, draws: Mapping[str, int]) -> dict[str, list[Judged]]:
    """Return every question's answers by family."""
    found: dict[str, list[Judged]] = {}
    for one, other in zip(before, after, strict=True):
        right = [float(is_answer_found(answer.text, item=answer.item)) for answer in (one, other)]
        judged = Judged(before=right[0], after=right[1], num_draws=draws[one.item.question])
        found.setdefault(one.item.task, []).append(judged)
    return found


def print_row(mode: str, name: str, families: Sequence[Sequence[Judged]]) -> None:
    """Print one line; families are strata, so that their differences are no uncertainty."""
    before, after, change = (
        weighted_mean([_weighted(family, value) for family in families])
        for value in (attrgetter("before"), attrgetter("after"), attrgetter("change"))
    )
    print(
        f"{mode:5} {name:23} {shown(before):>24} {shown(after):>24} {change.value:+8.1%} "
        f"[{change.low:+.1%}, {change.high:+.1%}]  n {change.num_samples:,}",
        flush=True,
    )


def _weighted(family: Sequence[Judged], value: Callable[[Judged], float]) -> list[tuple[float, float]]:
    total = sum(one.num_draws for one in family)
    return [(value(one) * one.num_draws / total, one.num_draws / total) for one in family]


def shown(estimate: Estimate) -> str:
    """Return a share with its interval."""
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def main() -> None:
    """Draw the questions, ask both checkpoints, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="smol-full", help="of a finished run in REFIT_HOME (default smol-full)")
    parser.add_argument("--target", help="the recipe's default target if not given")
    parser.add_argument("--num-items", type=int, default=200, help="questions of each family (default 200)")
    # The recipes' own seeds are small; entries of different seeds are different ones.
    parser.add_argument("--seed", type=int, default=101, help="of the questions (default 101)")
    parser.add_argument("--before", default="sft_checkpoint", help="default sft_checkpoint")
    parser.add_argument("--after", default="rl_checkpoint", help="default rl_checkpoint")
    given = parser.parse_args()
    workspace = open_workspace(given.recipe)
    target = given.target or workspace.recipe.default_target
    found: dict[str, Path] = {}
    for name in (given.before, given.after, "reasoning_toggle_dataset", "rl_prompts"):
        artifact = find_artifact(workspace, name, target)
        if artifact is None:
            raise MissingInputError(
                f"recipe {workspace.recipe.name}, target {target}, has no {name} yet: materialize it first"
            )
        found[name] = artifact.path
    items = fresh_items(
        workspace.recipe.reasoning_tasks,
        toggle_dir=found["reasoning_toggle_dataset"],
        prompts_dir=found["rl_prompts"],
        num_items=given.num_items,
        seed=given.seed,
    )
    before, after = (
        answers_of(found[name], items, config=workspace.recipe.evaluation) for name in (given.before, given.after)
    )
    print(f"{'mode':5} {'family':23} {given.before:>24} {given.after:>24}   change, paired")
    print_comparison(before, after, draws=draws_of(items))
    print(f"(greedy, {len(items):,} fresh questions of seed {given.seed}, 95% intervals; {describe_hardware()})")


if __name__ == "__main__":
    main()
