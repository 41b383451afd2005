"""Quality at equal measured speed, against simpler methods: python bench/quality.py --help.

For each decode speed-up the recipe's whole search is run (store, library and profile are those of any other run), every
baseline is scored as a whole model, and the refined solution, its twin without block distillation and the best two
baselines are distilled from the parent on the same tokens. Every finished figure is kept in the results file: start it
again after an interruption, and it goes on.
"""

import argparse
import filecmp
import json
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.architecture import Architecture, BlockSpec
from pipeline.artifacts import ArtifactStore, write_atomically
from pipeline.evaluation.multiple_choice import multiple_choice_quality
from pipeline.evaluation.perplexity import sum_over_windows, text_quality
from pipeline.evaluation.suite import load_for_evaluation, load_suite, parent_texts
from pipeline.execution import Workspace, materialize
from pipeline.fingerprint import fingerprint
from pipeline.hardware import describe_hardware
from pipeline.home import refit_home
from pipeline.model.checkpoint import TensorReader, load_model, read_architecture, save_checkpoint
from pipeline.puzzle.assemble import PREFIXES
from pipeline.puzzle.baselines import PUZZLE, WITHOUT_BLD
from pipeline.puzzle.composition import LoadVariants, compose
from pipeline.puzzle.importance import load_importance
from pipeline.puzzle.initial import library_variants, untrained_variants
from pipeline.puzzle.library import read_index
from pipeline.puzzle.search_space import resolve
from pipeline.puzzle.tables import CHILDREN, read_table
from pipeline.recipe import Limit, Recipe, Target
from pipeline.recipe_file import load_recipe
from pipeline.stage import ExecutionSettings, StageInputs
from pipeline.stages import kd_checkpoint
from pipeline.stages.baselines import ARCHITECTURES
from pipeline.stages.registry import STAGES

NUM_BASELINES = 2
NUM_RESAMPLES = 2000


def main() -> None:
    """Fill in what is missing of the results, and print them."""
    given = arguments()
    torch.set_num_threads(given.threads)
    results: dict[str, Any] = json.loads(given.results.read_text()) if given.results.is_file() else {}
    searched = {}
    for speedup in given.speedups:
        target = f"decode-{speedup:g}x"
        workspace = make_workspace(given, target=target, speedup=speedup)
        artifacts = {
            name: materialize(workspace, name, target).artifact.path
            for name in upstream_of("baselines", "evaluation_sets")
        }
        searched[target] = workspace, artifacts
        if "parent" not in results:
            parent_dir = artifacts["parent_checkpoint"]
            results["parent"] = measure(parent_dir, artifacts=artifacts, recipe=workspace.recipe)
        children = read_table(artifacts["baselines"], CHILDREN).sort("kl")
        # What was distilled is of this comparison and of these settings, or it is distilled again.
        compared = fingerprint([artifacts["baselines"].name, workspace.recipe.kd])
        if results.get(target, {}).get("compared") != compared:
            results[target] = {"compared": compared}
        results[target]["before"] = children.rows(named=True)
        keep(given.results, results)
        print(f"{target}: {children.height} children compared before distillation", flush=True)
    # Every speed's first comparison before any speed's second.
    for place in range(min(given.num_distilled, 2 + NUM_BASELINES) if given.kd_tokens else 0):
        for target, (workspace, artifacts) in searched.items():
            found = results[target]
            weights = {row["method"]: row["weights"] for row in found["before"]}
            baselines = [name for name in weights if name not in (PUZZLE, WITHOUT_BLD)][:NUM_BASELINES]
            method = [PUZZLE, *baselines, WITHOUT_BLD][place]
            if method in found.setdefault("after", {}):
                continue
            began = time.monotonic()
            directory = given.work_dir / target / found["compared"] / method.replace(" ", "-")
            assemble(directory / "child", method, weights=weights[method], artifacts=artifacts, workspace=workspace)
            if method == WITHOUT_BLD and same_weights(directory, directory.with_name(PUZZLE)):
                print(f"{target}: {PUZZLE} has no block that was distilled: its twin is itself", flush=True)
                found["after"][method] = found["after"][PUZZLE]
                keep(given.results, results)
                continue
            distil(directory, artifacts=artifacts, workspace=workspace, given=given)
            found["after"][method] = measure(directory / "kd", artifacts=artifacts, recipe=workspace.recipe)
            found["after"][method]["kd_s"] = round(time.monotonic() - began, 1)
            keep(given.results, results)
            print(f"{target}: {method} distilled in {found['after'][method]['kd_s']:.0f} s", flush=True)
    for target in searched:
        show(target, results[target])
    print(f"({describe_hardware()}, {given.threads} threads, recipe {given.recipe}, {given.kd_tokens:,} KD tokens)")


def upstream_of(*names: str) -> list[str]:
    """Return these stages and all that they are made from, in the order of the registry."""
    wanted = set(names)
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted |= set(stage.inputs)
    return [stage.name for stage in STAGES if stage.name in wanted]


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="smol-full")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.25, 1.5, 2.0])
    parser.add_argument("--kd-tokens", type=int, default=50_000, help="0: compare before distillation alone")
    parser.add_argument(
        "--num-distilled",
        type=int,
        default=2 + NUM_BASELINES,
        help="of each speed: the search's child, the two best baselines, the twin without block distillation",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=refit_home() / "bench-quality" / "results.json")
    parser.add_argument("--work-dir", type=Path, default=refit_home() / "bench-quality")
    return parser.parse_args()


def make_workspace(given: argparse.Namespace, *, target: str, speedup: float) -> Workspace:
    """Return the recipe with one target, a decode speed-up in its first scenario."""
    recipe = load_recipe(given.recipe)
    limit = Limit(
        quantity="decode_speed",
        scenario=recipe.block_profile.scenarios[0].name,
        bound=speedup,
        relative_to="parent",
    )
    kd = recipe.kd.model_copy(update={"tokens": given.kd_tokens}) if given.kd_tokens else recipe.kd
    recipe = recipe.model_copy(
        update={
            "targets": {target: Target(description="", limits=(limit,), pins=())},
            "default_target": target,
            "kd": kd,
        }
    )
    return Workspace(
        recipe=recipe,
        recipe_given=recipe.name,
        store=ArtifactStore(refit_home() / "store"),
        downloads=refit_home() / "downloads",
        execution=ExecutionSettings(),
    )


def assemble(
    directory: Path, method: str, *, weights: str, artifacts: Mapping[str, Path], workspace: Workspace
) -> None:
    """Write a child's checkpoint, with the library's blocks or with those that surgery cuts."""
    parent_dir = artifacts["parent_checkpoint"]
    parent = read_architecture(parent_dir)
    named = json.loads((artifacts["baselines"] / ARCHITECTURES).read_text())
    child = Architecture.model_validate(named[method])
    space = resolve(workspace.recipe.search_space, parent)
    cpu, reader = torch.device("cpu"), TensorReader(parent_dir)
    if weights == "library":
        index = read_index(artifacts["block_library"])
        load = library_variants(parent, index=index, store=workspace.store, dtype=torch.float32, device=cpu)
    else:
        importance = load_importance(artifacts["channel_importance"])
        load = untrained_variants(
            space, parent, parent_tensors=reader, importance=importance, dtype=torch.float32, device=cpu
        )
    save_checkpoint(
        directory,
        architecture=child,
        tensors=child_tensors(parent_dir, child.blocks, load),
        tokenizer_dir=parent_dir,
    )


def same_weights(one: Path, other: Path) -> bool:
    """Return whether two children's checkpoints, the second there or not, have the same bytes of weights."""
    mine, theirs = (sorted((directory / "child").glob("*.safetensors")) for directory in (one, other))
    return [path.name for path in mine] == [path.name for path in theirs] and all(
        filecmp.cmp(path, twin, shallow=False) for path, twin in zip(mine, theirs, strict=True)
    )


def child_tensors(parent_dir: Path, blocks: tuple[BlockSpec, ...], load: LoadVariants) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of a child in the parent's dtype."""
    reader = TensorReader(parent_dir)
    for name in reader.names:
        if not name.startswith("model.layers."):
            yield name, reader.read(name)
    parent = load_model(parent_dir, dtype=torch.float32)
    for layer, block in enumerate(blocks):
        prefix = f"model.layers.{layer}."
        dtype = reader.dtype(f"{prefix}input_layernorm.weight")
        composed = compose(parent, layer, block, load(layer))
        for module, starts in ((composed.attention, PREFIXES["attention"]), (composed.ffn, PREFIXES["ffn"])):
            if module is not None:
                for name, tensor in module.state_dict().items():
                    if name.startswith(starts):
                        yield prefix + name, tensor.to(dtype)


def distil(directory: Path, *, artifacts: Mapping[str, Path], workspace: Workspace, given: argparse.Namespace) -> None:
    """Distil a child as the stage kd_checkpoint does, in this process; a killed run goes on from its checkpoint."""
    inputs = StageInputs(
        artifacts={
            "fused_checkpoint": directory / "child",
            "parent_checkpoint": artifacts["parent_checkpoint"],
            "distillation_mix": artifacts["distillation_mix"],
        },
        store_root=workspace.store.root,
        downloads=workspace.downloads,
        execution=ExecutionSettings(num_threads=given.threads),
    )
    kd_checkpoint.run(workspace.recipe.kd, inputs, directory / "kd")


def measure(checkpoint_dir: Path, *, artifacts: Mapping[str, Path], recipe: Recipe) -> dict[str, Any]:
    """Return KL, perplexity and accuracy of a checkpoint on the recipe's held-out sets, and KL window by window."""
    config = recipe.evaluation
    suite = load_suite(artifacts["evaluation_sets"], parent_dir=artifacts["parent_checkpoint"], config=config)
    parent = parent_texts(load_for_evaluation(artifacts["parent_checkpoint"], config=config), suite=suite)
    model = load_for_evaluation(checkpoint_dir, config=config)
    sums = {
        name: sum_over_windows(model, windows_WT=windows, batch_size=config.batch_size, parent=parent[name])
        for name, windows in suite.windows.items()
    }
    choices = {
        name: multiple_choice_quality(
            model,
            items=items,
            tokenizer=suite.tokenizer,
            max_tokens=config.sequence_length,
            batch_size=config.batch_size,
        )
        for name, items in suite.multiple_choice.items()
    }
    return {
        "text": {name: text_quality([one]).model_dump(mode="json") for name, one in sums.items()},
        "overall": text_quality(list(sums.values())).model_dump(mode="json"),
        "multiple_choice": {name: one.model_dump(mode="json") for name, one in choices.items()},
        "kl_by_window": {name: (one.kl_W / one.num_tokens_W).tolist() for name, one in sums.items()},
    }


def show(target: str, found: Mapping[str, Any]) -> None:
    """Print one speed: every child before distillation, and the distilled ones beside each other."""
    print(f"\n{target}: as whole models before distillation")
    for row in found["before"]:
        print(
            f"  {row['method']:36s} KL {row['kl']:.4f}  measured {row['measured_speedup']:.3f}x "
            f"[{row['speedup_low']:.3f}, {row['speedup_high']:.3f}]  {row['num_parameters'] / 1e6:.1f} M"
        )
    after = found.get("after", {})
    if after:
        print(f"{target}: after distillation")
    for method, one in sorted(after.items(), key=lambda pair: pair[1]["overall"]["kl_nats_per_token"]["value"]):
        kl = one["overall"]["kl_nats_per_token"]
        texts = ", ".join(f"{name} {text['perplexity']['value']:.1f}" for name, text in one["text"].items())
        print(f"  {method:36s} KL {kl['value']:.4f} [{kl['low']:.4f}, {kl['high']:.4f}]  perplexity {texts}")
    others = [name for name in after if name not in (PUZZLE, WITHOUT_BLD)]
    if PUZZLE in after and others:
        best = min(others, key=lambda name: after[name]["overall"]["kl_nats_per_token"]["value"])
        low, middle, high = ratio_interval(after[PUZZLE]["kl_by_window"], after[best]["kl_by_window"])
        print(f"  KL of puzzle / {best}: {middle:.3f} [{low:.3f}, {high:.3f}] (goal <= 0.7)")


def ratio_interval(ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]]) -> tuple[float, float, float]:
    """Return the ratio of mean KL with its 95% interval: bootstrap over windows, both children on the same windows.

    Windows are spread evenly over a set's documents, so nearly each is of another document.
    """
    pairs = [pair for name in ours for pair in zip(ours[name], theirs[name], strict=True)]
    rng = random.Random(0)

    def ratio(sample: list[tuple[float, float]]) -> float:
        return sum(one for one, _ in sample) / sum(other for _, other in sample)

    ratios = sorted(ratio(rng.choices(pairs, k=len(pairs))) for _ in range(NUM_RESAMPLES))
    return ratios[round(0.025 * NUM_RESAMPLES)], ratio(pairs), ratios[round(0.975 * NUM_RESAMPLES) - 1]


def keep(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results."""
    write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
