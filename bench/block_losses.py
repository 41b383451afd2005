"""Which loss, start and learning rate make the best blocks: python bench/block_losses.py --help.

Trains the same variants of a few layers of the recipe's parent under the recipe's own settings, with the closed form
from all tokens, and under changes of one of them, or of those that --settings names together. What is compared is what
the parent loses with each block in place: replace-1-block KL on held-out windows of the mixture. The geometric mean
over blocks is shown as a ratio to the weights that surgery cuts.
"""

import argparse
import math
import tempfile
import time
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from pipeline.architecture import BlockSpec
from pipeline.data.packed import load_packed
from pipeline.execution import materialize, open_workspace
from pipeline.hardware import describe_hardware
from pipeline.model.checkpoint import TORCH_DTYPES, TensorReader, load_model
from pipeline.model.heterogeneous import HeterogeneousDecoderLayer
from pipeline.progress import SilentReporter
from pipeline.puzzle.bld import TrainedBlock, train_blocks
from pipeline.puzzle.block_keys import BlockKey, trainable_keys
from pipeline.puzzle.composition import LayerVariants
from pipeline.puzzle.importance import load_importance
from pipeline.puzzle.initial import build_variant, module_with
from pipeline.puzzle.parent_layers import ParentLayers
from pipeline.puzzle.score_functions import DivergenceScore
from pipeline.puzzle.search_space import resolve
from pipeline.puzzle.whole_models import score_models
from pipeline.recipe import BlockLibraryConfig, BlockLoss

UPSTREAM = ("parent_checkpoint", "corpora", "evaluation_sets", "distillation_mix", "channel_importance")


def main() -> None:
    """Train under every setting, score, and print one line each."""
    given = arguments()
    torch.set_num_threads(given.threads)
    workspace = open_workspace(given.recipe)
    recipe = workspace.recipe
    dtype = TORCH_DTYPES[recipe.block_library.precision]
    # So that channel_importance measures the curvature that the loss "kl" weighs by.
    asks_for_kl = recipe.model_copy(update={"block_library": recipe.block_library.model_copy(update={"loss": "kl"})})
    workspace = replace(workspace, recipe=asks_for_kl)
    paths = {name: materialize(workspace, name, recipe.default_target).artifact.path for name in UPSTREAM}
    model = load_model(paths["parent_checkpoint"], dtype=dtype)
    model.requires_grad_(requires_grad=False)
    importance = load_importance(paths["channel_importance"])
    reader = TensorReader(paths["parent_checkpoint"])
    train = load_packed(paths["distillation_mix"], "train")
    validation = load_packed(paths["distillation_mix"], "validation").take(given.scored_tokens)
    keys = [
        key
        for key in trainable_keys(resolve(recipe.search_space, model.architecture))
        if key.layer in given.layers and key.variant in given.variants
    ]

    def kl(modules: Mapping[BlockKey, HeterogeneousDecoderLayer]) -> dict[BlockKey, float]:
        def load(layer: int) -> LayerVariants:
            return {(key.subblock, key.variant): one for key, one in modules.items() if key.layer == layer}

        children = {str(key): replaced(model.architecture.blocks, key) for key in modules}
        with tempfile.TemporaryDirectory() as work_dir:
            scored = score_models(
                model,
                children,
                load,
                [DivergenceScore(packed=validation)],
                work_dir=Path(work_dir),
                max_activation_bytes=4 * 2**30,
                reporter=SilentReporter(),
            )
        return {key: scored[str(key)].kl for key in modules}

    cut = {key: build_variant(key, model.architecture, reader, importance, dtype=dtype) for key in keys}
    start = kl(cut)
    show("surgery alone", start, start, seconds=0.0)
    for name, settings in variations(recipe.block_library, tokens=given.tokens, names=given.settings).items():
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as work_dir:
            training = train_blocks(
                ParentLayers.whole(model),
                {key: str(key) for key in keys},
                parent_tensors=reader,
                importance=importance,
                train=train.take(settings.tokens),
                validation=validation,
                settings=settings,
                work_dir=Path(work_dir),
                max_activation_bytes=4 * 2**30,
                checkpoint_interval_steps=10**9,
                reporter=SilentReporter(),
            )
        seconds = time.monotonic() - began
        trained = {
            one.key: module_with(one.key, model.architecture, one.tensors, dtype=dtype)
            for one in training.outcomes
            if isinstance(one, TrainedBlock)
        }
        show(name, kl(trained), start, seconds=seconds)
    print(
        f"({describe_hardware()}, {given.threads} threads; {given.recipe}, {len(keys)} blocks, {given.tokens:,} tokens "
        f"of training, {validation.num_tokens:,} held-out tokens)"
    )


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="smol-full")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 11, 17, 24])
    parser.add_argument("--variants", nargs="+", default=["kv1", "ffn256"])
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument(
        "--settings",
        nargs="+",
        help="some of the settings alone, or several changes at once: base rate-times-3+twice-tokens",
    )
    parser.add_argument("--scored-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def changes(own: BlockLibraryConfig, *, tokens: int) -> dict[str, dict[str, Any]]:
    """Return what each setting that is compared changes of the recipe's own."""
    rate = own.learning_rate
    return {
        "base": {},
        **{f"loss-{loss}": {"loss": loss} for loss in get_args(BlockLoss) if loss != own.loss},
        "no-closed-form": {"closed_form_tokens": 0},
        "quarter-closed-form": {"closed_form_tokens": tokens // 4},
        "closed-form-alone": {"learning_rate": 1e-9},
        **{f"rate-times-{factor:g}": {"learning_rate": factor * rate} for factor in (0.3, 3.0, 10.0)},
        "twice-tokens": {"tokens": 2 * tokens, "closed_form_tokens": 2 * tokens},
    }


def variations(own: BlockLibraryConfig, *, tokens: int, names: Sequence[str] | None) -> dict[str, BlockLibraryConfig]:
    """Return the recipe's settings at this budget, the closed form from all of it, with the changes that are named."""
    known = changes(own, tokens=tokens)
    if unknown := {one for name in names or () for one in name.split("+")} - known.keys():
        raise SystemExit(f"no setting {', '.join(sorted(unknown))}; the settings are {', '.join(known)}")
    budget = {"tokens": tokens, "closed_form_tokens": tokens}
    return {
        name: own.model_copy(update=dict(ChainMap(*(known[one] for one in name.split("+")), budget)))
        for name in names or known
    }


def replaced(blocks: tuple[BlockSpec, ...], key: BlockKey) -> list[BlockSpec]:
    """Return the parent's blocks with one subblock exchanged."""
    found = list(blocks)
    found[key.layer] = found[key.layer].model_copy(update={key.subblock: getattr(key.block, key.subblock)})
    return found


def show(name: str, kl: Mapping[BlockKey, float], start: Mapping[BlockKey, float], *, seconds: float) -> None:
    """Print one setting: the ratio of KL to surgery's over FFNs and over attention, and every block's own."""
    ratios = {subblock: [kl[key] / start[key] for key in kl if key.subblock == subblock] for subblock in kinds(kl)}
    means = ", ".join(
        f"{subblock} {math.exp(sum(map(math.log, found)) / len(found)):.3f}" for subblock, found in ratios.items()
    )
    each = ", ".join(f"{key.layer} {key.variant} {value:.4f}" for key, value in kl.items())
    print(f"{name}\n  KL over surgery's: {means}; {seconds:.0f} s\n  {each}", flush=True)


def kinds(kl: Mapping[BlockKey, float]) -> list[str]:
    """Return which subblocks were trained."""
    return sorted({key.subblock for key in kl})


if __name__ == "__main__":
    main()
