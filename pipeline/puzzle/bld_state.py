"""One variant under training, and the progress of many on disk so that a killed run continues bit for bit.

    directory/step-{step}/{fingerprint}.safetensors    weights, exp_avg, exp_avg_sq of one variant after that step
    directory/step-{step}/{fingerprint}.json           its losses, or why it failed; renamed into place last

A step counts for a set of variants when it holds the record of each, whichever rank wrote it; older steps are removed
once a newer one is whole. Fingerprints name everything that decides the weights, so progress of other settings is never
continued.
"""

import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.architecture import Frozen
from pipeline.artifacts import write_atomically
from pipeline.model.heterogeneous import HeterogeneousDecoderLayer
from pipeline.puzzle.block_keys import BlockKey
from pipeline.puzzle.block_loss import BlockTarget
from pipeline.puzzle.library import LossPoint
from pipeline.recipe import OptimizerConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainee:
    """One variant under training: weights, optimiser, losses so far, and why it failed if it did."""

    def __init__(
        self, *, key: BlockKey, fingerprint: str, module: HeterogeneousDecoderLayer, settings: OptimizerConfig
    ) -> None:
        self.key = key
        self.fingerprint = fingerprint
        self.module = module.train()
        self.settings = settings
        self.curve: list[LossPoint] = []
        self.initial_loss: float | None = None
        self.final_loss: float | None = None
        self.failure: str | None = None
        matrices = [tensor for tensor in module.parameters() if tensor.ndim > 1]
        vectors = [tensor for tensor in module.parameters() if tensor.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            # Norms and biases are not decayed.
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def update(self, prediction_BTD: Tensor, target: BlockTarget, *, factor: float, step: int) -> float | None:
        """Take one optimiser step at `factor` of the learning rate and return the loss.

        None, and `failure`, when the loss or its gradient is not finite.
        """
        value, gradient_BTD = target.loss_and_gradient(prediction_BTD)
        if not math.isfinite(value):
            self.failure = f"its loss is {value} at step {step}"
            return None
        prediction_BTD.backward(gradient_BTD)
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.max_grad_norm).item()
        if not math.isfinite(norm):
            self.failure = f"its gradient norm is {norm} at step {step}"
            self.optimizer.zero_grad()
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.settings.learning_rate
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
    """What is kept of one variant beside its tensors."""

    initial_loss: float | None
    failure: str | None
    curve: tuple[LossPoint, ...]


def save_progress(directory: Path, trainees: Sequence[Trainee], *, step: int, company: Iterable[str]) -> None:
    """Write these variants' state, and remove the steps before the newest that holds all of `company`."""
    folder = _folder(directory, step)
    folder.mkdir(parents=True, exist_ok=True)
    for trainee in trainees:
        record = folder / f"{trainee.fingerprint}.json"
        record.unlink(missing_ok=True)  # an earlier run's, whose tensors are about to be replaced
        if trainee.failure is None:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in trainee.tensors().items()}
            save_file(tensors, folder / f"{trainee.fingerprint}.safetensors")
        saved = SavedTrainee(initial_loss=trainee.initial_loss, failure=trainee.failure, curve=tuple(trainee.curve))
        write_atomically(record, saved.model_dump_json().encode())
    newest = saved_step(directory, company)
    for other in _steps(directory):
        if newest is not None and other < newest:
            shutil.rmtree(_folder(directory, other), ignore_errors=True)  # another rank may be removing it too


def saved_step(directory: Path, company: Iterable[str]) -> int | None:
    """Return the newest step whose state of every variant of `company`, given by fingerprint, is on disk."""
    wanted = tuple(company)
    whole = (
        step
        for step in _steps(directory)
        if all((_folder(directory, step) / f"{fingerprint}.json").is_file() for fingerprint in wanted)
    )
    return max(whole, default=None)


def load_progress(directory: Path, trainees: Sequence[Trainee], *, step: int) -> None:
    """Give every variant the state that it had after that step."""
    folder = _folder(directory, step)
    for trainee in trainees:
        saved = SavedTrainee.model_validate_json((folder / f"{trainee.fingerprint}.json").read_bytes())
        trainee.initial_loss, trainee.failure = saved.initial_loss, saved.failure
        trainee.curve = list(saved.curve)
        if saved.failure is None:
            trainee.restore(load_file(folder / f"{trainee.fingerprint}.safetensors"), step=step)


def _steps(directory: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in directory.glob("step-*")]


def _folder(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"
