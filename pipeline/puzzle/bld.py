"""Decoupled block-wise local distillation (Puzzle, section 3): every variant learns to do its parent subblock's work.

One forward pass of the parent per batch feeds every variant of every layer. For layer i with input x,

    mid = attend(x)    out = feed_forward(mid)                          the parent's
    an FFN variant predicts        feed_forward'(mid)
    an attention variant predicts  feed_forward(attend'(x))             through the frozen parent FFN
    loss "tensor" = MSE(prediction, out) / MSE(out, 0)                  the paper's
    loss "token"  = mean over tokens t of |prediction_t - out_t|^2 / |out_t|^2

Before that, `closed_form_tokens` of the mixture may refit each variant's last matrix (pipeline.puzzle.refit).

No gradient crosses layers, and no variant sees another: each has its own optimiser, clipping and failure, so its
weights do not depend on what else is trained in the same run.

Letters: B batch, T tokens, D hidden_size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.data.packed import PackedTokens
from pipeline.model.checkpoint import TensorReader
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, attention_inputs
from pipeline.progress import Reporter
from pipeline.puzzle.bld_state import Trainee, resume, save_progress
from pipeline.puzzle.devices import autocast
from pipeline.puzzle.importance import Importance
from pipeline.puzzle.initial import build_variant
from pipeline.puzzle.library import BlockKey, BlockRecord, LossPoint
from pipeline.puzzle.refit import refit_blocks
from pipeline.recipe import BlockLibraryConfig, BlockLoss, OptimizerConfig
from pipeline.training.schedules import learning_rate_factor


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedBlock:
    """A variant whose training came to a finite end; tensors are float32 and named relative to the layer."""

    key: BlockKey
    tensors: dict[str, Tensor]
    record: BlockRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedBlock:
    """A variant whose loss or gradient stopped being finite."""

    key: BlockKey
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerActivations:
    """What one parent layer was given and gave, and the keyword arguments its attention took."""

    layer: int
    input_BTD: Tensor
    middle_BTD: Tensor
    output_BTD: Tensor
    attention_kwargs: dict[str, Any]


def block_loss(prediction_BTD: Tensor, target_BTD: Tensor, *, kind: BlockLoss) -> Tensor:
    """Return how far a block's output is from the parent's, as a share of the parent's, in float32.

    `tensor` divides the summed squares of the whole batch (Puzzle, section 3), which the few tokens with massive
    activations rule; `token` divides token by token, as the norm that reads the output will.
    """
    # bf16 squares of massive activations would round away everything else.
    prediction_BTD, target_BTD = prediction_BTD.float(), target_BTD.float()
    error_BT = (prediction_BTD - target_BTD).square().mean(dim=-1)
    size_BT = target_BTD.square().mean(dim=-1)
    if kind == "tensor":
        return error_BT.mean() / size_BT.mean()
    return (error_BT / size_BT).mean()


def train_blocks(
    model: HeterogeneousLlamaForCausalLM,
    blocks: Mapping[BlockKey, str],
    *,
    parent_tensors: TensorReader,
    importance: Importance,
    train: PackedTokens,
    validation: PackedTokens,
    settings: BlockLibraryConfig,
    work_dir: Path,
    checkpoint_interval_steps: int,
    reporter: Reporter,
) -> list[TrainedBlock | FailedBlock]:
    """Train every block of `blocks` in one pass over the tokens and return them in its order.

    Args:
        model: the parent in the settings' precision, on the device to train on.
        blocks: what to train, and the fingerprint that progress on disk is recognised by.
        parent_tensors: the parent's checkpoint, whose full precision the initial weights are cut from.
        importance: decides which channels a narrower FFN keeps.
        train: `settings.batch_size` rows of it make one step, in order.
        validation: its first `settings.batch_size` rows measure each block before and after.
        settings: the recipe's.
        work_dir: where progress is kept; a run that was killed continues from there and ends with the same bits.
        checkpoint_interval_steps: how often.
        reporter: who listens.
    """
    model.requires_grad_(requires_grad=False)
    device = next(model.parameters()).device
    optimizer = _optimizer_config(settings)
    trainees = [
        Trainee(
            key=key,
            fingerprint=block_id,
            module=build_variant(key, model.architecture, parent_tensors, importance, dtype=torch.float32).to(device),
            optimizer=optimizer,
        )
        for key, block_id in blocks.items()
    ]
    total_steps = -(-len(train) // settings.batch_size)
    first_step = resume(work_dir, trainees)
    if first_step:
        reporter.note(f"continuing after step {first_step} of {total_steps}")
    else:
        for trainee, loss in _validation_losses(model, trainees, validation, settings=settings):
            trainee.initial_loss = _finite_or_fail(trainee, loss, when="initial")
        if settings.closed_form_tokens:
            refit_blocks(
                model,
                _by_layer(trainees),
                train.take(settings.closed_form_tokens),
                settings=settings,
                reporter=reporter,
            )
    for step in range(first_step, total_steps):
        rows = slice(step * settings.batch_size, (step + 1) * settings.batch_size)
        factor = learning_rate_factor(step, total_steps=total_steps, optimizer=optimizer)
        losses = _train_step(model, trainees, train, rows=rows, factor=factor, settings=settings, step=step + 1)
        if (step + 1) % checkpoint_interval_steps == 0 and step + 1 < total_steps:
            save_progress(work_dir, trainees, step=step + 1)
        metrics = {"loss": sum(losses) / len(losses)} if losses else {}
        reporter.step(step + 1, total_steps, what="BLD steps", **metrics)
    for trainee, loss in _validation_losses(model, trainees, validation, settings=settings):
        trainee.final_loss = _finite_or_fail(trainee, loss, when="final")
    return [_outcome(trainee) for trainee in trainees]


def layer_activations(
    model: HeterogeneousLlamaForCausalLM, tokens_BT: Tensor, position_ids_BT: Tensor
) -> Iterator[LayerActivations]:
    """Run the parent layer by layer without gradients, keeping one layer's activations at a time."""
    device = next(model.parameters()).device
    layers: list[Any] = list(model.model.layers)
    position_ids_BT = position_ids_BT.to(device)
    with torch.no_grad():
        hidden_BTD = model.model.embed_tokens(tokens_BT.to(device))
        kwargs = attention_inputs(
            model,
            batch_size=hidden_BTD.shape[0],
            num_tokens=hidden_BTD.shape[1],
            device=device,
            dtype=hidden_BTD.dtype,
            position_ids_BT=position_ids_BT,
        )
    for index, layer in enumerate(layers):
        with torch.no_grad():
            middle_BTD = layer.attend(hidden_BTD, **kwargs)
            output_BTD = layer.feed_forward(middle_BTD)
        yield LayerActivations(
            layer=index,
            input_BTD=hidden_BTD,
            middle_BTD=middle_BTD,
            output_BTD=output_BTD,
            attention_kwargs=kwargs,
        )
        hidden_BTD = output_BTD


def _needed_activations(
    model: HeterogeneousLlamaForCausalLM, packed: PackedTokens, rows: slice, by_layer: Mapping[int, Sequence[Trainee]]
) -> Iterator[LayerActivations]:
    """Run the parent up to the last layer that has a block to train."""
    activations = layer_activations(model, packed.tokens_NT[rows], packed.position_ids_NT[rows])
    return islice(activations, max(by_layer, default=-1) + 1)


def _train_step(
    model: HeterogeneousLlamaForCausalLM,
    trainees: Sequence[Trainee],
    train: PackedTokens,
    *,
    rows: slice,
    factor: float,
    settings: BlockLibraryConfig,
    step: int,
) -> list[float]:
    """Train every block that has not failed on one batch; return their losses."""
    by_layer = _by_layer(trainees)
    losses = []
    for activations in _needed_activations(model, train, rows, by_layer):
        for trainee in by_layer.get(activations.layer, ()):
            loss = _loss(model, trainee, activations, settings=settings)
            value = trainee.update(loss, learning_rate=factor * settings.learning_rate, step=step)
            if value is not None:
                trainee.curve.append(LossPoint(step=step, loss=value))
                losses.append(value)
    return losses


def _validation_losses(
    model: HeterogeneousLlamaForCausalLM,
    trainees: Sequence[Trainee],
    validation: PackedTokens,
    *,
    settings: BlockLibraryConfig,
) -> list[tuple[Trainee, float]]:
    rows = slice(0, settings.batch_size)
    by_layer = _by_layer(trainees)
    found = []
    with torch.no_grad():
        for activations in _needed_activations(model, validation, rows, by_layer):
            for trainee in by_layer.get(activations.layer, ()):
                found.append((trainee, float(_loss(model, trainee, activations, settings=settings))))
    return found


def _loss(
    model: HeterogeneousLlamaForCausalLM,
    trainee: Trainee,
    activations: LayerActivations,
    *,
    settings: BlockLibraryConfig,
) -> Tensor:
    layers: Any = model.model.layers
    with autocast(activations.input_BTD.device, settings.precision):
        if trainee.key.subblock == "ffn":
            prediction_BTD = trainee.module.feed_forward(activations.middle_BTD)
        else:
            attended_BTD = trainee.module.attend(activations.input_BTD, **activations.attention_kwargs)
            prediction_BTD = layers[activations.layer].feed_forward(attended_BTD)
    return block_loss(prediction_BTD, activations.output_BTD, kind=settings.loss)


def _finite_or_fail(trainee: Trainee, loss: float, *, when: str) -> float | None:
    if math.isfinite(loss):
        return loss
    trainee.failure = f"its {when} validation loss is {loss}"
    return None


def _by_layer(trainees: Sequence[Trainee]) -> dict[int, list[Trainee]]:
    by_layer: dict[int, list[Trainee]] = {}
    for trainee in trainees:
        if trainee.failure is None:
            by_layer.setdefault(trainee.key.layer, []).append(trainee)
    return by_layer


def _optimizer_config(settings: BlockLibraryConfig) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=settings.learning_rate,
        min_learning_rate_ratio=settings.min_learning_rate_ratio,
        warmup_ratio=settings.warmup_ratio,
        schedule=settings.schedule,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        max_grad_norm=settings.max_grad_norm,
    )


def _outcome(trainee: Trainee) -> TrainedBlock | FailedBlock:
    if trainee.failure is not None:
        return FailedBlock(key=trainee.key, reason=trainee.failure)
    assert trainee.initial_loss is not None
    assert trainee.final_loss is not None
    return TrainedBlock(
        key=trainee.key,
        tensors={name: tensor.detach().cpu() for name, tensor in trainee.module.state_dict().items()},
        record=BlockRecord(
            layer=trainee.key.layer,
            subblock=trainee.key.subblock,
            variant=trainee.key.variant,
            initial_loss=trainee.initial_loss,
            final_loss=trainee.final_loss,
            curve=tuple(trainee.curve),
        ),
    )
