"""Block-wise local distillation (Puzzle, section 3): every variant learns to do its parent subblock's work.

One forward pass of the parent per batch feeds every variant of every layer. For layer i with input x,

    mid = attend(x)    out = feed_forward(mid)                          the parent's
    an FFN variant predicts        feed_forward'(mid)
    an attention variant predicts  feed_forward(attend'(x))             through the frozen parent FFN
    a pair (coupled) predicts      feed_forward'(attend'(x))

and is held against `out` by pipeline.puzzle.block_loss. Before that, `closed_form_tokens` of the mixture may refit each
variant's last matrix (pipeline.puzzle.refit).

No gradient crosses layers, and no variant sees another: each has its own optimiser, clipping and failure, so its
weights do not depend on what else is trained in the same run, nor on which rank holds its layer.

Letters: B batch, T tokens, D hidden_size.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.data.packed import PackedTokens
from pipeline.errors import MissingInputError
from pipeline.model.checkpoint import TensorReader
from pipeline.model.heterogeneous import unit_rms
from pipeline.progress import Reporter
from pipeline.puzzle.bld_state import Trainee, load_progress, save_progress, saved_step
from pipeline.puzzle.block_keys import BlockKey
from pipeline.puzzle.block_loss import BlockTarget, block_target
from pipeline.puzzle.devices import autocast
from pipeline.puzzle.importance import Importance
from pipeline.puzzle.initial import build_variant
from pipeline.puzzle.library import BlockRecord, LossPoint
from pipeline.puzzle.parent_layers import LayerActivations, ParentLayers
from pipeline.puzzle.refit import refit_blocks
from pipeline.recipe import BlockLibraryConfig
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
class BlockTraining:
    """What became of the blocks of one rank, and how many steps it took in how many seconds."""

    outcomes: tuple[TrainedBlock | FailedBlock, ...]
    num_steps: int
    seconds: float


def train_blocks(
    parent: ParentLayers,
    blocks: Mapping[BlockKey, str],
    *,
    parent_tensors: TensorReader,
    importance: Importance,
    train: PackedTokens,
    validation: PackedTokens,
    settings: BlockLibraryConfig,
    work_dir: Path,
    max_activation_bytes: int,
    checkpoint_interval_steps: int,
    reporter: Reporter,
) -> BlockTraining:
    """Train the blocks of this rank's layers in one pass over the tokens and return them in the order of `blocks`.

    Every rank is given the same `blocks` and calls this at the same time; one whose layers all lie behind the last of
    them returns at once.

    Args:
        parent: this rank's layers in the settings' precision, on the device to train on.
        blocks: what all ranks train, and the fingerprint that progress on disk is recognised by.
        parent_tensors: the parent's checkpoint, whose full precision the initial weights are cut from.
        importance: decides which channels a narrower FFN keeps, and holds the curvature that the loss "kl" weighs by.
        train: `settings.batch_size` rows of it make one step, in order.
        validation: its first `settings.batch_size` rows measure each block before and after.
        settings: the recipe's.
        work_dir: where all ranks keep progress; a run that was killed continues from there, on any number of ranks, and
            ends with the same bits.
        max_activation_bytes: hidden states of the closed-form start beyond these lie in files below `work_dir`.
        checkpoint_interval_steps: how often.
        reporter: who listens.

    Raises:
        MissingInputError: for the loss "kl" without the curvature it weighs by.
    """
    began = time.perf_counter()
    if settings.loss == "kl" and importance.output_curvature is None:
        raise MissingInputError(
            "block_library.loss is kl, and channel_importance was measured without the curvature that it weighs by: "
            "materialize channel_importance again"
        )
    stop = max((key.layer for key in blocks), default=-1) + 1
    if not parent.until(stop):
        return BlockTraining(outcomes=(), num_steps=0, seconds=0.0)
    parent.model.requires_grad_(requires_grad=False)
    trainees = [
        Trainee(
            key=key,
            fingerprint=block_id,
            module=build_variant(key, parent.model.architecture, parent_tensors, importance, dtype=torch.float32).to(
                parent.device
            ),
            settings=settings.optimizer(key.subblock, key.variant),
        )
        for key, block_id in blocks.items()
        if key.layer in parent.layers
    ]
    teaching = _Teaching(parent=parent, importance=importance, settings=settings, stop=stop)
    total_steps = -(-len(train) // settings.batch_size)
    first_step = saved_step(work_dir, blocks.values()) or 0
    if first_step:
        load_progress(work_dir, trainees, step=first_step)
        reporter.note(f"continuing after step {first_step} of {total_steps}")
    else:
        for trainee, loss in teaching.validation_losses(trainees, validation):
            trainee.initial_loss = _finite_or_fail(trainee, loss, when="initial")
        if settings.closed_form_tokens:
            fitted = train.take(settings.closed_form_tokens)
            refit_blocks(
                parent,
                _by_layer(trainees),
                fitted,
                stop=stop,
                settings=settings,
                work_dir=work_dir,
                max_activation_bytes=max_activation_bytes,
                reporter=reporter,
            )
    for step in range(first_step, total_steps):
        losses = teaching.train_step(trainees, train, step=step, total_steps=total_steps)
        if (step + 1) % checkpoint_interval_steps == 0 and step + 1 < total_steps:
            save_progress(work_dir, trainees, step=step + 1, company=blocks.values())
        metrics = {"loss": sum(losses) / len(losses)} if losses else {}
        reporter.step(step + 1, total_steps, what="BLD steps", **metrics)
    for trainee, loss in teaching.validation_losses(trainees, validation):
        trainee.final_loss = _finite_or_fail(trainee, loss, when="final")
    parent.wait()
    return BlockTraining(
        outcomes=tuple(_outcome(trainee) for trainee in trainees),
        num_steps=total_steps - first_step,
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Teaching:
    """The parent's layers as teachers of the variants on this rank."""

    parent: ParentLayers
    importance: Importance
    settings: BlockLibraryConfig
    stop: int

    def train_step(
        self, trainees: Sequence[Trainee], train: PackedTokens, *, step: int, total_steps: int
    ) -> list[float]:
        """Train every block that has not failed on one batch; return their losses. Steps count from 0."""
        rows = slice(step * self.settings.batch_size, (step + 1) * self.settings.batch_size)
        by_layer = _by_layer(trainees)
        losses = []
        for activations in self._activations(train, rows):
            taught = by_layer.get(activations.layer, ())
            for trainee, prediction_BTD, target in self._lessons(taught, activations):
                factor = learning_rate_factor(step, total_steps=total_steps, optimizer=trainee.settings)
                value = trainee.update(prediction_BTD, target, factor=factor, step=step + 1)
                if value is not None:
                    trainee.curve.append(LossPoint(step=step + 1, loss=value))
                    losses.append(value)
        return losses

    @torch.no_grad()
    def validation_losses(self, trainees: Sequence[Trainee], validation: PackedTokens) -> list[tuple[Trainee, float]]:
        """Return the loss of every block that has not failed on the first validation rows."""
        by_layer = _by_layer(trainees)
        return [
            (trainee, target.loss(prediction_BTD))
            for activations in self._activations(validation, slice(0, self.settings.batch_size))
            for trainee, prediction_BTD, target in self._lessons(by_layer.get(activations.layer, ()), activations)
        ]

    def _activations(self, packed: PackedTokens, rows: slice) -> Iterator[LayerActivations]:
        return self.parent.activations(packed.tokens_NT[rows], packed.position_ids_NT[rows], stop=self.stop)

    def _lessons(
        self, taught: Sequence[Trainee], activations: LayerActivations
    ) -> Iterator[tuple[Trainee, Tensor, BlockTarget]]:
        """Give what each of a layer's blocks makes of the activations, and what it is held against."""
        if not taught:
            return
        own = self.parent.layer(activations.layer)
        curvature_D = None
        if self.settings.loss == "kl":
            assert self.importance.output_curvature is not None
            curvature_D = self.importance.output_curvature[activations.layer].to(self.parent.device)
        target = block_target(activations.output_BTD, kind=self.settings.loss, curvature_D=curvature_D)
        # All blocks of a layer are given the same: what their norms do before their weights is done once.
        eps = self.parent.model.config.rms_norm_eps
        given = {"ffn": activations.middle_BTD, "attention": activations.input_BTD, "pair": activations.input_BTD}
        units = {kind: unit_rms(given[kind], eps=eps) for kind in {trainee.key.subblock for trainee in taught}}
        for trainee in taught:
            kind = trainee.key.subblock
            with autocast(self.parent.device, self.settings.precision):
                if kind == "ffn":
                    prediction_BTD = trainee.module.feed_forward(given[kind], unit_BTD=units[kind])
                else:
                    attended_BTD = trainee.module.attend(
                        given[kind], unit_BTD=units[kind], **activations.attention_kwargs
                    )
                    behind = own if trainee.key.subblock == "attention" else trainee.module
                    prediction_BTD = behind.feed_forward(attended_BTD)
            yield trainee, prediction_BTD, target


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
