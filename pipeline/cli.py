"""The command line beside Dagster's: one stage, what a target came to, and one answer from its final checkpoint.

    python -m pipeline materialize STAGE [--target T]
    python -m pipeline summary [--target T]
    python -m pipeline chat [--target T] [--thinking on|off] QUESTION

RECIPE selects the recipe, as everywhere.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence

from pipeline.artifacts import write_atomically
from pipeline.errors import MissingInputError, RefitError
from pipeline.execution import REPOSITORY, Workspace, find_artifact, materialize, open_workspace, refit_home
from pipeline.progress import render_progress
from pipeline.stages.registry import STAGES

SUMMARY_FILE = "summary.json"
MAX_NEW_TOKENS = 256


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name; an error of ours is one line and exit code 1."""
    given = _parser().parse_args(arguments)
    try:
        workspace = open_workspace()
        target = given.target or workspace.recipe.default_target
        if given.command == "materialize":
            text = make(workspace, given.stage, target=target)
        elif given.command == "summary":
            text = summarise(workspace, target=target, started_at=given.started_at)
        else:
            text = answer(workspace, target=target, question=given.question, thinking=given.thinking == "on")
    except RefitError as err:
        sys.exit(f"error: {err}")
    sys.stdout.write(f"{text.rstrip()}\n")


def make(workspace: Workspace, stage_name: str, *, target: str) -> str:
    """Reuse, resume or run one stage, telling its progress on stderr; return which it was and the artifact's path.

    Raises:
        MissingInputError: when a stage that it reads has no artifact.
    """

    def tell(line: Mapping[str, object]) -> None:
        sys.stderr.write(f"[{stage_name}] {render_progress(line)}\n")

    outcome = materialize(workspace, stage_name, target, on_progress=tell)
    return f"{outcome.how} {outcome.artifact.path}"


def summarise(workspace: Workspace, *, target: str, started_at: float | None) -> str:
    """Write summary.json into the home and return the same figures as a table.

    Without `started_at`, the total is the time that all stages took when their artifacts were made.

    Raises:
        MissingInputError: when a stage of the target has no artifact.
    """
    from pipeline.report.summary import build_summary, render_summary  # polars and matplotlib: slow to import

    artifacts = {}
    for stage in STAGES:
        artifact = find_artifact(workspace, stage.name, target)
        if artifact is None:
            raise _not_materialized(workspace, stage.name, target=target)
        artifacts[stage.name] = artifact
    stages_s = sum(artifact.record.wall_s for artifact in artifacts.values())
    summary = build_summary(
        {name: artifact.path for name, artifact in artifacts.items()},
        recipe_name=workspace.recipe.name,
        target=target,
        total_wall_s=stages_s if started_at is None else time.time() - started_at,
        repository_root=REPOSITORY,
    )
    write_atomically(refit_home() / SUMMARY_FILE, (summary.model_dump_json(indent=1) + "\n").encode())
    return render_summary(summary)


def answer(workspace: Workspace, *, target: str, question: str, thinking: bool) -> str:
    """Return the final checkpoint's greedy answer to a question in one of the two modes.

    Raises:
        MissingInputError: when the target has no final checkpoint yet.
    """
    # torch and transformers take seconds to import, which neither --help nor an error should cost.
    import torch

    from pipeline.data.chat import generation_prompt_ids, reasoning_messages, stop_token_ids
    from pipeline.evaluation.generation import complete_greedily
    from pipeline.model.checkpoint import load_model, load_tokenizer

    checkpoint = find_artifact(workspace, "rl_checkpoint", target)
    if checkpoint is None:
        raise _not_materialized(workspace, "rl_checkpoint", target=target)
    tokenizer = load_tokenizer(checkpoint.path)
    model = load_model(checkpoint.path, dtype=torch.float32)
    (completion,) = complete_greedily(
        model,
        prompts=[generation_prompt_ids(tokenizer, reasoning_messages(question, thinking=thinking))],
        stop_ids=stop_token_ids(tokenizer, model.architecture.eos_token_ids),
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=1,
    )
    text = str(tokenizer.decode(list(completion.ids)))
    return text if completion.has_ended else f"{text} [cut off after {MAX_NEW_TOKENS} tokens]"


def _not_materialized(workspace: Workspace, stage_name: str, *, target: str) -> MissingInputError:
    recipe = workspace.recipe.name
    return MissingInputError(
        f"recipe {recipe}, target {target}, has no {stage_name} yet: run `make demo RECIPE={recipe} TARGET={target}`"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("materialize", help="make one stage's artifact, or find it, without Dagster")
    one.add_argument("stage", help="a stage whose inputs are there already")
    summary = commands.add_parser("summary", help="print the results of a target and write them to summary.json")
    summary.add_argument("--started-at", type=float, help="epoch seconds from which the total wall time counts")
    chat = commands.add_parser("chat", help="ask the final checkpoint one question")
    chat.add_argument("--thinking", choices=("on", "off"), default="on")
    chat.add_argument("question")
    for command in (one, summary, chat):
        command.add_argument("--target", help="a target of the recipe; its default when not given")
    return parser
