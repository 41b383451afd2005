"""What reinforcement learning brings on questions that no stage has seen: python bench/reasoning_gain.py --help.

The recipe's own questions tell families apart to 15 points. Here as many as are asked for are drawn for each trained
family, none of them a question of the evaluation sets, the reasoning data or the prompts of reinforcement learning, and
two checkpoints of a finished run answer them greedily in both modes. Answers to the same question are compared, so an
interval is that of the change itself.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from pipeline.data.evaluation_sets import load_evaluated_questions
from pipeline.data.reasoning_items import ReasoningItem, generate_items
from pipeline.errors import MissingInputError
from pipeline.evaluation.intervals import Estimate, share, weighted_mean
from pipeline.evaluation.results import Mode
from pipeline.evaluation.suite import load_for_evaluation
from pipeline.evaluation.toggle import Answer, answer_items, is_answer_found, is_compliant
from pipeline.execution import find_artifact, open_workspace
from pipeline.hardware import describe_hardware
from pipeline.model.checkpoint import load_tokenizer
from pipeline.reasoning.prompts import load_prompts
from pipeline.recipe import EvaluationConfig, ReasoningTask

# The recipes' own seeds are small; entries of different seeds are different ones.
SEED = 101
MODES: tuple[Mode, ...] = ("on", "off")


def fresh_items(
    tasks: Sequence[ReasoningTask], *, sets_dir: Path, toggle_dir: Path, prompts_dir: Path, num_items: int
) -> list[ReasoningItem]:
    """Draw that many questions of every task which none of the three artifacts holds."""
    known = load_evaluated_questions(sets_dir)
    known |= set(pl.read_parquet(toggle_dir / "samples.parquet", columns=["question"])["question"])
    known |= {item.question for item in load_prompts(prompts_dir)}
    return [
        item
        for task in tasks
        for item in generate_items(task, num_items=num_items, seed=SEED, exclude_questions=known, part="evaluation")
    ]


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


def print_comparison(before: Mapping[Mode, Sequence[Answer]], after: Mapping[Mode, Sequence[Answer]]) -> None:
    """Print right answers by family and mode before and after, and the change with its interval."""
    for mode in MODES:
        pairs: dict[str, list[tuple[bool, bool]]] = {}
        for one, other in zip(before[mode], after[mode], strict=True):
            right = is_answer_found(one.text, item=one.item), is_answer_found(other.text, item=other.item)
            pairs.setdefault(one.item.task, []).append(right)
        for task, of_task in pairs.items():
            print_row(mode, task, [of_task])
        print_row(mode, "all", list(pairs.values()))
        obeys = [
            share(sum(is_compliant(answer.text, mode=mode) for answer in answers[mode]), num_samples=len(answers[mode]))
            for answers in (before, after)
        ]
        print(f"{mode:4} {'obeys the switch':18} {shown(obeys[0]):>26} {shown(obeys[1]):>26}")


def print_row(mode: Mode, name: str, groups: Sequence[Sequence[tuple[bool, bool]]]) -> None:
    """Print one line; the families of `all` are strata, so that their differences are no uncertainty."""
    flat = [pair for group in groups for pair in group]
    before, after = (share(sum(pair[which] for pair in flat), num_samples=len(flat)) for which in (0, 1))
    change = weighted_mean([[(float(pair[1]) - pair[0], 1.0) for pair in group] for group in groups])
    print(
        f"{mode:4} {name:18} {shown(before):>26} {shown(after):>26} {change.value:+8.1%} "
        f"[{change.low:+.1%}, {change.high:+.1%}]",
        flush=True,
    )


def shown(estimate: Estimate) -> str:
    """Return a share with its interval."""
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def main() -> None:
    """Draw the questions, ask both checkpoints, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="smol-full", help="of a finished run in REFIT_HOME (default smol-full)")
    parser.add_argument("--target", help="the recipe's default target if not given")
    parser.add_argument("--num-items", type=int, default=200, help="questions of each family (default 200)")
    parser.add_argument("--before", default="sft_checkpoint", help="default sft_checkpoint")
    parser.add_argument("--after", default="rl_checkpoint", help="default rl_checkpoint")
    given = parser.parse_args()
    workspace = open_workspace(given.recipe)
    target = given.target or workspace.recipe.default_target
    found: dict[str, Path] = {}
    for name in (given.before, given.after, "evaluation_sets", "reasoning_toggle_dataset", "rl_prompts"):
        artifact = find_artifact(workspace, name, target)
        if artifact is None:
            raise MissingInputError(
                f"recipe {workspace.recipe.name}, target {target}, has no {name} yet: materialize it first"
            )
        found[name] = artifact.path
    items = fresh_items(
        workspace.recipe.reasoning_tasks,
        sets_dir=found["evaluation_sets"],
        toggle_dir=found["reasoning_toggle_dataset"],
        prompts_dir=found["rl_prompts"],
        num_items=given.num_items,
    )
    before, after = (
        answers_of(found[name], items, config=workspace.recipe.evaluation) for name in (given.before, given.after)
    )
    print(f"{'mode':4} {'family':18} {given.before:>26} {given.after:>26}   change, paired")
    print_comparison(before, after)
    print(f"(greedy, {given.num_items} fresh questions a family, 95% intervals; {describe_hardware()})")


if __name__ == "__main__":
    main()
