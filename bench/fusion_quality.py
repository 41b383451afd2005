"""What fusion costs children that lost attention and nothing else: python bench/fusion_quality.py --help.

Each child is the recipe's parent without the attention of one stretch of layers, untrained. Runs of two FFNs and more
at its start are fused by both norm rules, put in reverse order, and deleted but for one FFN; every two neighbours are
fused alone, beside their entry of the dependency matrix. The last FFN of a stretch is left alone, but in one run that
shows what it costs. Then each child, it with a run of `--kd-ffns` fused, and it with as many layers deleted as that
leaves out, are distilled from the parent on the same tokens. Every finished figure is kept in the results file: start
it again, and it goes on.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from pipeline.architecture import NO_ATTENTION
from pipeline.artifacts import ArtifactStore, write_atomically
from pipeline.data.packed import load_packed
from pipeline.evaluation.arrangements import (
    Arrangement,
    ModelTensors,
    arranged,
    fused,
    identity_error,
    measure_arrangements,
    num_deleted_at_equal_latency,
    reverse,
    unchanged,
    without,
)
from pipeline.evaluation.closeness import Comparison, Reference, compare
from pipeline.execution import Workspace, materialize
from pipeline.fingerprint import fingerprint
from pipeline.hardware import describe_hardware
from pipeline.home import refit_home
from pipeline.model.checkpoint import TORCH_DTYPES, load_model, model_from_tensors, save_checkpoint
from pipeline.model.fusion_runs import FusionRun
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import SilentReporter
from pipeline.puzzle.dependency import measure_dependencies
from pipeline.puzzle.measure import measure_models
from pipeline.recipe import MeasurementConfig
from pipeline.recipe_file import load_recipe
from pipeline.stage import ExecutionSettings, StageInputs
from pipeline.stages import kd_checkpoint
from pipeline.stages.fusion_report import SINGLE_USER

Kept = dict[str, Any]


def main() -> None:
    """Fill in what is missing of the results, and print them."""
    given = arguments()
    torch.set_num_threads(given.threads)
    recipe = load_recipe(given.recipe)
    workspace = Workspace(
        recipe=recipe,
        recipe_given=recipe.name,
        store=ArtifactStore(refit_home() / "store"),
        downloads=refit_home() / "downloads",
        execution=ExecutionSettings(num_threads=given.threads),
    )
    mixture, parent_dir = (
        materialize(workspace, name, recipe.default_target).artifact.path
        for name in ("distillation_mix", "parent_checkpoint")
    )
    validation = load_packed(mixture, "validation")
    packed = validation.take(given.tokens)
    parent = load_model(parent_dir, dtype=TORCH_DTYPES[given.precision])
    parent_reference = Reference.of(parent, packed)
    results: dict[str, Kept] = json.loads(given.results.read_text()) if given.results.is_file() else {}
    for label in given.stretches:
        first, last = map(int, label.split("-"))
        child = drop_attention(parent, range(first, last + 1))
        kept = results.setdefault(label, {})
        references = [Reference.of(child, packed), parent_reference]

        def keep() -> None:
            write_atomically(given.results, (json.dumps(results, indent=1) + "\n").encode())

        if "dependencies" not in kept:
            windows = validation.take(given.dependency_tokens)
            found = measure_dependencies(child, windows, reporter=SilentReporter())
            kept["dependencies"] = {f"{i} {j}": value for (i, j), value in found.matrix.items()}
            keep()
        models: Kept = kept.setdefault("models", {})
        whole = run_of(range(first, last))
        for choose in (arrangements, deletions):
            for arrangement in choose(child, whole.ffn_layers, models):
                if arrangement.name not in models:
                    (one,) = measure_arrangements(child, [arrangement], packed, references)
                    models[arrangement.name] = figures(one)
                    keep()
                    print(f"{label}: {arrangement.name}: {models[arrangement.name]['kl_to_child']}", flush=True)
        if "identity_error" not in kept:
            kept["identity_error"] = {
                "fold_each": identity_error(child, whole, packed, norm_rule="fold_each"),
                "last": identity_error(child, whole, packed, norm_rule="last"),
            }
            keep()
        if "decode_ms" not in kept:
            kept["decode_ms"] = time_run(child, whole, given=given)
            keep()
        distilled: Kept = kept.setdefault("distilled", {})
        for arrangement in to_distil(child, whole.ffn_layers, models, given=given) if given.kd_tokens else []:
            origin = fingerprint([label, parent_dir.name, mixture.name, arrangement.name, recipe.kd, given.kd_tokens])
            if distilled.get(arrangement.name, {}).get("origin") != origin:
                directory = given.work_dir / origin
                model = distil(directory, arranged(child, arrangement), workspace, given=given)
                distilled[arrangement.name] = figures(compare(model, packed, references)) | {"origin": origin}
                keep()
                print(
                    f"{label}: {arrangement.name}, distilled: {distilled[arrangement.name]['kl_to_parent']}", flush=True
                )
    for label, kept in results.items():
        show(label, kept)
    windows = f"{packed.num_tokens:,} validation tokens in {len(packed)} windows, {given.precision}"
    print(f"({describe_hardware()}, {given.threads} threads, recipe {given.recipe}, {windows})")


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="smol")
    parser.add_argument("--stretches", nargs="+", default=["4-9", "13-18", "21-26"], help="layers without attention")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dependency-tokens", type=int, default=512)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kd-tokens", type=int, default=32_768, help="0: compare before distillation alone")
    parser.add_argument("--kd-ffns", type=int, default=4, help="FFNs of the run that is fused and distilled")
    parser.add_argument("--work-dir", type=Path, default=refit_home() / "bench-fusion", help="of distillation")
    parser.add_argument("--results", type=Path, default=Path("bench/fusion_quality.json"))
    return parser.parse_args()


def drop_attention(parent: HeterogeneousLlamaForCausalLM, layers: range) -> HeterogeneousLlamaForCausalLM:
    """Return the parent without the attention of some layers, every other weight its own."""
    blocks = [
        block.model_copy(update={"attention": NO_ATTENTION}) if layer in layers else block
        for layer, block in enumerate(parent.architecture.blocks)
    ]
    source = ModelTensors(parent)
    gone = tuple(f"model.layers.{layer}.{part}" for layer in layers for part in ("self_attn.", "input_layernorm."))
    named = ((name, source.read(name)) for name in source.names if not name.startswith(gone))
    return model_from_tensors(parent.architecture.with_blocks(blocks), named, dtype=parent.dtype)


def run_of(layers: range) -> FusionRun:
    """Return a run of layers that all have an FFN."""
    return FusionRun(layers=tuple(layers), ffn_layers=tuple(layers))


def arrangements(child: HeterogeneousLlamaForCausalLM, ffns: tuple[int, ...], _: Kept) -> list[Arrangement]:
    """Return the child, it without each FFN alone, its runs of every length, its pairs, and a run with the last FFN."""
    depth = child.architecture.num_hidden_layers
    found = [unchanged(depth), *(without(depth, [layer]) for layer in ffns)]
    for run in runs_of(ffns):
        found += [
            named(run, fused(depth, [run], norm_rule="fold_each")),
            named(run, fused(depth, [run], norm_rule="last")),
            named(run, reverse(depth, [run])),
        ]
    for pair in (run_of(range(first, first + 2)) for first in ffns[1:-1]):
        found.append(named(pair, fused(depth, [pair], norm_rule="fold_each")))
    with_last = run_of(range(ffns[0] + 1, ffns[-1] + 2))
    found.append(named(with_last, fused(depth, [with_last], norm_rule="fold_each")))
    return found


def deletions(child: HeterogeneousLlamaForCausalLM, ffns: tuple[int, ...], models: Kept) -> list[Arrangement]:
    """Return every run with all its FFNs but one deleted, those first whose deletion alone costs least."""
    depth = child.architecture.num_hidden_layers
    alone = {layer: models[without(depth, [layer]).name]["kl_to_child"][0] for layer in ffns}
    return [without(depth, sorted(run.ffn_layers, key=lambda layer: alone[layer])[:-1]) for run in runs_of(ffns)]


def to_distil(
    child: HeterogeneousLlamaForCausalLM, ffns: tuple[int, ...], models: Kept, *, given: argparse.Namespace
) -> list[Arrangement]:
    """Return the child, it with one run fused, and it with the same number of layers by deletion."""
    run = run_of(range(ffns[0], ffns[0] + given.kd_ffns))
    depth = child.architecture.num_hidden_layers
    (deleted,) = (one for one in deletions(child, ffns, models) if len(one.order) == depth - given.kd_ffns + 1)
    return [unchanged(depth), named(run, fused(depth, [run], norm_rule="fold_each")), deleted]


def distil(
    directory: Path, model: HeterogeneousLlamaForCausalLM, workspace: Workspace, *, given: argparse.Namespace
) -> HeterogeneousLlamaForCausalLM:
    """Return the model distilled as the stage kd_checkpoint does it; a killed run goes on from its checkpoint."""
    mixture, parent_dir = (
        materialize(workspace, name, workspace.recipe.default_target).artifact.path
        for name in ("distillation_mix", "parent_checkpoint")
    )
    save_checkpoint(
        directory / "start",
        architecture=model.architecture,
        tensors=model.state_dict(),
        tokenizer_dir=parent_dir,
    )
    inputs = StageInputs(
        artifacts={
            "fused_checkpoint": directory / "start",
            "parent_checkpoint": parent_dir,
            "distillation_mix": mixture,
        },
        store_root=workspace.store.root,
        downloads=workspace.downloads,
        execution=workspace.execution,
    )
    kd_checkpoint.run(workspace.recipe.kd.model_copy(update={"tokens": given.kd_tokens}), inputs, directory / "kd")
    return load_model(directory / "kd", dtype=TORCH_DTYPES[given.precision])


def runs_of(ffns: tuple[int, ...]) -> list[FusionRun]:
    """Return the runs of every length that begin with the first FFN."""
    return [run_of(range(ffns[0], ffns[0] + length)) for length in range(2, len(ffns) + 1)]


def named(run: FusionRun, arrangement: Arrangement) -> Arrangement:
    """Return the arrangement under a name that says which run it changes."""
    return dataclasses.replace(arrangement, name=f"{run.label} {arrangement.name}")


def figures(found: Comparison) -> Kept:
    """Return what is kept of a comparison: values with their intervals."""
    child, parent = found.to_references

    def spread(one: Any) -> list[float]:
        return [round(one.value, 5), round(one.low, 5), round(one.high, 5)]

    return {
        "kl_to_child": spread(child.kl_nats),
        "kl_to_parent": spread(parent.kl_nats),
        "perplexity": spread(found.perplexity),
        "relative_output_error": round(child.relative_output_error, 5),
    }


def time_run(child: HeterogeneousLlamaForCausalLM, run: FusionRun, *, given: argparse.Namespace) -> Kept:
    """Time single-user decoding of the child, of it fused, and of it without the run's FFNs, in turn."""
    depth = child.architecture.num_hidden_layers
    models = {
        "child": child,
        "fused": arranged(child, fused(depth, [run], norm_rule="fold_each")),
        "without": arranged(child, without(depth, run.ffn_layers)),
    }
    measured = measure_models(
        models,
        [SINGLE_USER],
        measurement=MeasurementConfig(rounds=given.rounds, warmups=3),
        threads=given.threads,
        reporter=SilentReporter(),
    )
    medians = {name: measured.median_ms(name, SINGLE_USER.name, "decode") for name in models}
    speedup = measured.speedup("fused", SINGLE_USER.name, "decode", over="child")
    return medians | {
        "speedup": [speedup.median, speedup.low, speedup.high],
        "num_deleted": num_deleted_at_equal_latency(
            child_ms=medians["child"],
            fused_ms=medians["fused"],
            without_ms=medians["without"],
            num_ffns=len(run.ffn_layers),
        ),
    }


def show(label: str, kept: Kept) -> None:
    """Print one child's table."""
    print(f"\nattention dropped in {label}")
    print(f"{'model':34} {'KL to child':>26} {'KL to parent':>13} {'perplexity':>11} {'output error':>13} {'max M':>7}")
    matrix = {tuple(map(int, pair.split())): value for pair, value in kept["dependencies"].items()}
    for name, one in kept["models"].items():
        low, high = one["kl_to_child"][1:]
        interval = f"{one['kl_to_child'][0]:.4f} [{low:.4f}, {high:.4f}]"
        run = range(0)
        if "fused" in name:
            first, last = map(int, name.split()[0].split("-"))
            run = range(first, last + 1)
        largest = max((matrix[i, j] for i in run for j in run if i < j), default=math.nan)
        print(
            f"{name:34} {interval:>26} {one['kl_to_parent'][0]:13.4f} {one['perplexity'][0]:11.2f} "
            f"{one['relative_output_error']:13.4f} {largest:7.3f}"
        )
    for name, one in kept.get("distilled", {}).items():
        low, high = one["kl_to_parent"][1:]
        kl = f"{one['kl_to_parent'][0]:.4f} [{low:.4f}, {high:.4f}]"
        print(f"distilled {name:34} KL to parent {kl}, perplexity {one['perplexity'][0]:.2f}")
    print(f"identity error, fp32, relative: {kept['identity_error']}")
    print(f"single-user decoding, ms: {kept['decode_ms']}")


if __name__ == "__main__":
    main()
