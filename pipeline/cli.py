"""The command line beside Dagster's: before a run, instead of one, and after it.

    python -m pipeline plan [--device NAME | --peak-tflops X | --measure]
    python -m pipeline explain
    python -m pipeline materialize STAGE
    python -m pipeline summary
    python -m pipeline chat [--thinking on|off] QUESTION
    python -m pipeline export CHECKPOINT DIRECTORY
    python -m pipeline serve [--port N] [--runtime llama.cpp|vllm]
    python -m pipeline push --repo OWNER/NAME [--public]
    python -m pipeline doctor [--verify] [--fix] [--remove-garbage] [--keep RECIPE]
    python -m pipeline collect [--remove]

Each takes --recipe (RECIPE, as everywhere) and --target (the recipe's default).
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipeline.artifacts import Artifact, write_atomically
from pipeline.errors import CheckpointError, MissingInputError, RefitError
from pipeline.execution import Workspace, find_artifact, first_failure, materialize, open_workspace, require_sound
from pipeline.home import refit_home
from pipeline.processes import become
from pipeline.progress import render_progress
from pipeline.recipe import Recipe
from pipeline.recipe_file import RECIPES_DIR, load_recipe, require_target
from pipeline.stage import VIEW_DIR
from pipeline.stages.configs import CARD_FILE
from pipeline.stages.launch import REPOSITORY
from pipeline.stages.registry import STAGES

if TYPE_CHECKING:
    from pipeline.serving import Runtime

SUMMARY_FILE = "summary.json"
MAX_NEW_TOKENS = 256
CHECKPOINTS = tuple(
    stage.name for stage in STAGES if stage.name.endswith("_checkpoint") and stage.name != "parent_checkpoint"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name; an error of ours is one line and exit code 1."""
    given = _parser().parse_args(arguments)
    exit_code = 0
    try:
        workspace = open_workspace(given.recipe)
        target = given.target or workspace.recipe.default_target
        require_target(workspace.recipe, target)
        match given.command:
            case "plan":
                text = foresee(workspace, target=target, given=given)
            case "explain":
                text = explain_target(workspace, target=target)
            case "doctor":
                text, exit_code = examine(workspace, given=given)
            case "collect":
                text = collect(workspace, remove=given.remove)
            case "materialize":
                text = make(workspace, given.stage, target=target)
            case "summary":
                text = summarise(workspace, target=target, started_at=given.started_at)
            case "export":
                text = export(workspace, given.checkpoint, directory=given.directory, target=target)
            case "serve":
                serve(workspace, target=target, port=given.port, runtime=given.runtime)
            case "push":
                text = push(workspace, target=target, repo_id=given.repo, public=given.public)
            case _:
                text = answer(workspace, target=target, question=given.question, thinking=given.thinking == "on")
    except RefitError as err:
        sys.exit(f"error: {err}")
    sys.stdout.write(f"{text.rstrip()}\n")
    if exit_code:
        sys.exit(exit_code)


def foresee(workspace: Workspace, *, target: str, given: argparse.Namespace) -> str:
    """Return the plan of a target: tokens, FLOPs, memory, disk and time of every stage, and what stands against it."""
    from pipeline.planning.command import plan_text  # only this command needs it

    return plan_text(
        workspace, target=target, device=given.device, peak_tflops=given.peak_tflops, measure=given.measure
    )


def explain_target(workspace: Workspace, *, target: str) -> str:
    """Return, for every stage of a target, whether it is reused, resumed or run, and why."""
    from pipeline.inspection.explain import explain, render_explanations

    return render_explanations(explain(workspace, target=target))


def examine(workspace: Workspace, *, given: argparse.Namespace) -> tuple[str, int]:
    """Return what is wrong with the store and Dagster's home, and the exit code: 1 when something is."""
    from pipeline.inspection.findings import render_findings
    from pipeline.inspection.garbage import remove_garbage
    from pipeline.inspection.machine_health import examine_machine
    from pipeline.inspection.store_health import examine_store
    from resources.dagster_health import examine_dagster  # dagster takes seconds to import

    recipes = known_recipes(workspace.recipe, *map(load_recipe, given.keep))
    if given.remove_garbage:
        findings = remove_garbage(workspace, recipes=recipes)
    else:
        findings = (*examine_machine(), *examine_store(workspace, recipes=recipes, verify=given.verify))
        findings += examine_dagster(dagster_home(workspace), fix=given.fix)
    return render_findings(findings), int(any(finding.severity == "problem" for finding in findings))


def collect(workspace: Workspace, *, remove: bool) -> str:
    """Return which blocks of the store no solution uses, and delete them if asked."""
    from pipeline.inspection.collect import collect_blocks  # imports torch
    from pipeline.inspection.findings import render_findings

    return render_findings(collect_blocks(workspace.store, remove=remove))


def known_recipes(*given: Recipe) -> tuple[Recipe, ...]:
    """Return the given recipes and every shipped one: whose artifacts are not garbage."""
    shipped = [load_recipe(path.stem) for path in sorted(RECIPES_DIR.glob("*.yaml"))]
    return (*given, *(recipe for recipe in shipped if recipe not in given))


def dagster_home(workspace: Workspace) -> Path:
    """Return DAGSTER_HOME, which make sets, or else the home that make gives a recipe: below the name of its file."""
    given = os.environ.get("DAGSTER_HOME")
    return Path(given) if given else refit_home() / "dagster" / Path(workspace.recipe_given).name.removesuffix(".yaml")


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


def export(workspace: Workspace, stage_name: str, *, directory: Path, target: str) -> str:
    """Write a stage's checkpoint as what other programs load; return what was written and where it runs.

    Raises:
        CheckpointError: when something is in the directory already, or what was written is not the same model.
        MissingInputError: when the target has no such checkpoint yet.
        StageError: when the checkpoint failed a blocking check.
    """
    # These import torch and transformers.
    from pipeline.stages.configs import ExportStage
    from pipeline.stages.exported_model import export_and_compare

    if directory.exists() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} has files in it; want an empty or new directory: name another")
    checkpoint = _sound_artifact(workspace, stage_name, target=target)
    config = ExportStage(export=workspace.recipe.exported_model)
    result = export_and_compare(checkpoint.path, out_dir=directory, config=config)
    failure = first_failure("exported_model", result.metrics, recipe=workspace.recipe)
    if failure is not None:
        raise CheckpointError(
            f"{directory} is not the model that was exported, {failure}: do not use it, and report it"
        )
    difference = result.metrics["max_abs_logit_difference"]
    formats = "".join(f"{name}: {result.facts[name]}\n" for name in ("format", "gguf", "plain_llama"))
    runtimes = "".join(f"{name}: {runs}, {how}\n" for name, runs, how in result.tables["portability"].rows)
    return f"{stage_name} is in {directory}; logits differ by at most {difference:.3g}\n{formats}{runtimes}"


def serve(workspace: Workspace, *, target: str, port: int, runtime: "Runtime | None") -> NoReturn:
    """Say how to ask in both modes, then become the server of the exported model, on this machine alone.

    Raises:
        MissingInputError: when the target has no exported model yet.
        RuntimeMissingError: when no runtime that can serve it is installed.
    """
    from pipeline.serving import HOST, example, find_server  # reads chat templates: slow to import

    exported = find_artifact(workspace, "exported_model", target)
    if exported is None:
        raise _not_materialized(workspace, "exported_model", target=target)
    server = find_server(exported.path, port=port, runtime=runtime)
    sys.stdout.write(
        f"{server.runtime} serves {exported.path} on http://{HOST}:{port}; Ctrl-C ends it. When it is up:\n"
    )
    for thinking in (True, False):
        sys.stdout.write(f"\n{example(port=port, thinking=thinking)}\n")
    become(server.command, env=server.env)


def push(workspace: Workspace, *, target: str, repo_id: str, public: bool) -> str:
    """Push the exported model with its card as README.md to the Hugging Face hub; return where it went.

    Raises:
        MissingInputError: when the target has no exported model or no model card yet.
        StageError: when either failed a blocking check.
        ArtifactError: when a file is not the one that was published.
        HubError: as push_to_hub.
    """
    from pipeline.model.hub import push_to_hub  # huggingface_hub is slow to import

    exported, card = (
        _sound_artifact(workspace, stage_name, target=target) for stage_name in ("exported_model", "model_card")
    )
    names = [name for name in exported.manifest.files if Path(name).parts[0] != VIEW_DIR]
    address = push_to_hub(
        {**{name: exported.path / name for name in names}, "README.md": card.path / CARD_FILE},
        repo_id=repo_id,
        public=public,
        message=f"{workspace.recipe.name}, target {target}: {exported.content_hash}",
    )
    return f"pushed {len(names) + 1} files to {repo_id}, {'public' if public else 'private'}: {address}"


def _sound_artifact(workspace: Workspace, stage_name: str, *, target: str) -> Artifact:
    artifact = find_artifact(workspace, stage_name, target)
    if artifact is None:
        raise _not_materialized(workspace, stage_name, target=target)
    require_sound(artifact, workspace.recipe)
    return artifact


def _not_materialized(workspace: Workspace, stage_name: str, *, target: str) -> MissingInputError:
    given = shlex.quote(workspace.recipe_given)
    return MissingInputError(
        f"recipe {workspace.recipe.name}, target {target}, has no {stage_name} yet: run "
        f"`make demo RECIPE={given} TARGET={target}`"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="say what every stage will cost, from the configuration alone")
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument("--device", help="a device whose peak is known: h100-80gb, ...")
    speed.add_argument("--peak-tflops", type=float, help="peak of one rank's device in TFLOP/s, bf16")
    speed.add_argument("--measure", action="store_true", help="measure this machine's peak first")
    why = commands.add_parser("explain", help="say which stages would be reused, resumed or run, and why")
    doctor = commands.add_parser("doctor", help="look for dead runs, stuck locks, broken artifacts, and garbage")
    doctor.add_argument("--verify", action="store_true", help="read every byte again and compare its hash")
    doctor.add_argument("--fix", action="store_true", help="end dead runs and free the pool slots they hold")
    doctor.add_argument("--remove-garbage", action="store_true", help="delete what no recipe refers to")
    doctor.add_argument(
        "--keep", action="append", default=[], metavar="RECIPE", help="one more recipe to keep what is made for; repeat"
    )
    gone = commands.add_parser("collect", help="say which trained blocks no solution uses, and delete them if asked")
    gone.add_argument("--remove", action="store_true", help="delete them; without it nothing is changed")
    one = commands.add_parser("materialize", help="make one stage's artifact, or find it, without Dagster")
    one.add_argument("stage", help="a stage whose inputs are there already")
    summary = commands.add_parser("summary", help="print the results of a target and write them to summary.json")
    summary.add_argument("--started-at", type=float, help="epoch seconds from which the total wall time counts")
    chat = commands.add_parser("chat", help="ask the final checkpoint one question")
    chat.add_argument("--thinking", choices=("on", "off"), default="on")
    chat.add_argument("question")
    out = commands.add_parser("export", help="write any checkpoint of a target as what other programs load")
    out.add_argument("checkpoint", choices=CHECKPOINTS)
    out.add_argument("directory", type=Path, help="where to; new, or empty")
    server = commands.add_parser("serve", help="serve the exported model as an OpenAI-compatible API on 127.0.0.1")
    server.add_argument("--port", type=int, default=8080)
    server.add_argument("--runtime", choices=("llama.cpp", "vllm"), help="the first installed when not given")
    upload = commands.add_parser("push", help="push the exported model and its card to the Hugging Face hub, private")
    upload.add_argument("--repo", required=True, help="owner/name; made where it is missing")
    upload.add_argument("--public", action="store_true", help="let everybody have it")
    for command in (plan, why, doctor, gone, one, summary, chat, out, server, upload):
        command.add_argument("--recipe", help="a shipped recipe or a YAML file; RECIPE when not given")
        command.add_argument("--target", help="a target of the recipe; its default when not given")
    return parser
