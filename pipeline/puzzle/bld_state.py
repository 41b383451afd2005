"""One variant under training, and its progress on disk so that a killed run continues bit for bit.

    work_dir/bld-{0,1}/{layer}-{subblock}-{variant}.safetensors    weights, exp_avg, exp_avg_sq
    work_dir/bld-{0,1}/marker.json                                 step, fingerprints, losses; renamed into place last

Two slots are written in turn: a kill while one is written leaves the other. A slot counts for the blocks it names by
fingerprint, so progress of other settings is not continued.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.architecture import Frozen
from pipeline.artifacts import write_atomically
from pipeline.model.heterogeneous import HeterogeneousDecoderLayer
from pipeline.puzzle.library import BlockKey, LossPoint
from pipeline.recipe import OptimizerConfig

MARKER = "marker.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainee:
    """One variant under training: weights, optimiser, losses so far, and why it failed if it did."""

    def __init__(
        self, *, key: BlockKey, fingerprint: str, module: HeterogeneousDecoderLayer, optimizer: OptimizerConfig
    ) -> None:
        self.key = key
        self.fingerprint = fingerprint
        self.module = module.train()
        self.curve: list[LossPoint] = []
        self.initial_loss: float | None = None
        self.final_loss: float | None = None
        self.failure: str | None = None
        self._max_grad_norm = optimizer.max_grad_norm
        matrices = [tensor for tensor in module.parameters() if tensor.ndim > 1]
        vectors = [tensor for tensor in module.parameters() if tensor.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            # Norms and biases are not decayed.
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def update(self, loss: Tensor, *, learning_rate: float, step: int) -> float | None:
        """Take one optimiser step and return the loss; None, and `failure`, when it or the gradient is not finite."""
        value = loss.item()
        if not math.isfinite(value):
            self.failure = f"its loss is {value} at step {step}"
            return None
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._max_grad_norm).item()
        if not math.isfinite(norm):
            self.failure = f"its gradient norm is {norm} at step {step}"
            self.optimizer.zero_grad()
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and optimiser moments."""
        found = {}
        for name, weight in self.module.named_parameters():
            found[f"weight/{name}"] = weight.detach()
            state = self.optimizer.state[weight]
            for moment in _MOMENTS:
                found[f"{moment}/{name}"] = state[moment]
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], *, step: int) -> None:
        """Take back what `tensors` gave after `step` optimiser steps."""
        for name, weight in self.module.named_parameters():
            weight.copy_(tensors[f"weight/{name}"])
            self.optimizer.state[weight] = {
                "step": torch.tensor(float(step), device=weight.device),
                **{moment: tensors[f"{moment}/{name}"].to(weight.device) for moment in _MOMENTS},
            }


class SavedTrainee(Frozen):
    """What the marker keeps of one variant beside its tensors."""

    fingerprint: str
    initial_loss: float | None
    failure: str | None
    curve: tuple[LossPoint, ...]


class Marker(Frozen):
    """A complete slot: after which step, and of which variants."""

    step: int
    trainees: dict[str, SavedTrainee]


def save_progress(work_dir: Path, trainees: Sequence[Trainee], *, step: int) -> None:
    """Write every variant's state into the slot that does not hold the newest one."""
    newest = _newest(work_dir)
    slot = work_dir / ("bld-1" if newest is not None and newest[0].name == "bld-0" else "bld-0")
    slot.mkdir(parents=True, exist_ok=True)
    (slot / MARKER).unlink(missing_ok=True)
    for trainee in trainees:
        if trainee.failure is None:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in trainee.tensors().items()}
            save_file(tensors, slot / _file_name(trainee.key))
    marker = Marker(
        step=step,
        trainees={
            str(trainee.key): SavedTrainee(
                fingerprint=trainee.fingerprint,
                initial_loss=trainee.initial_loss,
                failure=trainee.failure,
                curve=tuple(trainee.curve),
            )
            for trainee in trainees
        },
    )
    write_atomically(slot / MARKER, marker.model_dump_json().encode())


def resume(work_dir: Path, trainees: Sequence[Trainee]) -> int:
    """Restore every variant from the newest complete slot and return its step; 0, and nothing, when none fits.

    A slot fits when it holds all these variants under the same fingerprints; it may hold others, whose training ended.
    """
    newest = _newest(work_dir)
    if newest is None:
        return 0
    slot, marker = newest
    saved = marker.trainees
    for trainee in trainees:
        if str(trainee.key) not in saved or saved[str(trainee.key)].fingerprint != trainee.fingerprint:
            return 0
    for trainee in trainees:
        record = saved[str(trainee.key)]
        trainee.initial_loss, trainee.failure = record.initial_loss, record.failure
        trainee.curve = list(record.curve)
        if record.failure is None:
            trainee.restore(load_file(slot / _file_name(trainee.key)), step=marker.step)
    return marker.step


def _newest(work_dir: Path) -> tuple[Path, Marker] | None:
    slots = [slot for slot in (work_dir / "bld-0", work_dir / "bld-1") if (slot / MARKER).is_file()]
    found = [(slot, Marker.model_validate_json((slot / MARKER).read_bytes())) for slot in slots]
    return max(found, key=lambda pair: pair[1].step, default=None)


def _file_name(key: BlockKey) -> str:
    return f"{key.layer:03d}-{key.subblock}-{key.variant}.safetensors"
