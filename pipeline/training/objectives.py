"""What a training minimises: a micro-batch in, named terms out.

Belongs here: how a model is run for a loss. The losses themselves are in pipeline.training.losses.

Letters: B batch, T tokens, D hidden_size, V vocab_size.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.architecture import Architecture
from pipeline.data.packed import IGNORED_LABEL, PackedTokens
from pipeline.errors import CheckpointError
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.training.losses import cosine_loss, cross_entropy, kl_divergence, next_token_targets


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Some windows on the device. `position_ids_BT` is None where every window is one text."""

    tokens_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor | None

    def model_inputs(self) -> dict[str, Any]:
        """Return the arguments of a causal pass without cache; restarting position ids keep packed samples apart."""
        return {"input_ids": self.tokens_BT, "position_ids": self.position_ids_BT, "use_cache": False}


def take_batch(data: PackedTokens, rows: Sequence[int], *, device: torch.device) -> Batch:
    """Return these windows on the device."""
    chosen = list(rows)
    position_ids_BT = data.position_ids_NT[chosen]
    holds_several_samples = bool((position_ids_BT[:, 1:] == 0).any())
    return Batch(
        tokens_BT=data.tokens_NT[chosen].to(device),
        labels_BT=data.labels_NT[chosen].to(device),
        position_ids_BT=position_ids_BT.to(device) if holds_several_samples else None,
    )


class RunModel(Protocol):
    """A model's forward pass: TrainEngine.forward, or the model itself."""

    def __call__(self, **inputs: Any) -> Any:
        """Return an output with `logits`."""
        ...


class Objective(Protocol):
    """What the loop minimises."""

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms, `loss` first; the others become columns of the curve."""
        ...

    def num_targets(self, labels_BT: Tensor) -> int:
        """Return over how many tokens of these windows the loss is a mean."""
        ...

    def __call__(self, run_model: RunModel, batch: Batch, *, num_targets: int) -> Mapping[str, Tensor]:
        """Return this batch's contribution to each term: its token sums over `num_targets`."""
        ...


class NextTokenObjective:
    """Cross-entropy on the labels: continued pre-training and supervised fine-tuning."""

    terms = ("loss",)

    def num_targets(self, labels_BT: Tensor) -> int:
        """Return the labels that carry loss after the shift by one."""
        return int((next_token_targets(labels_BT) != IGNORED_LABEL).sum())

    def __call__(self, run_model: RunModel, batch: Batch, *, num_targets: int) -> dict[str, Tensor]:
        """Return the cross-entropy."""
        logits_BTV = run_model(**batch.model_inputs()).logits
        return {"loss": cross_entropy(logits_BTV, batch.labels_BT).total / num_targets}


class DistillationObjective:
    """Knowledge distillation from a teacher that `pipeline.training.frozen` has placed.

    L = cosine_weight * sum_l (1 - cos(h_student^l, h_teacher^l)) + kl_weight * KL(p_teacher || q_student)

    Puzzle, equation 1. The hidden state after student block i stands where the teacher's stood after the last of
    block i's parent_layers; the last one compared is the one before the final norm.
    """

    terms = ("loss", "kl", "cosine")

    def __init__(
        self,
        *,
        student: HeterogeneousLlamaForCausalLM,
        teacher: HeterogeneousLlamaForCausalLM,
        cosine_weight: float,
        kl_weight: float,
    ) -> None:
        matched = matched_teacher_layers(student.architecture, teacher.architecture)
        self._student_layers = list(student.model.layers)
        self._teacher_layers = [teacher.model.layers[layer] for layer in matched]
        self._teacher = teacher
        self._cosine_weight = cosine_weight
        self._kl_weight = kl_weight

    def num_targets(self, labels_BT: Tensor) -> int:
        """Return the tokens that are text: a teacher has something to say at every one, the last included."""
        return int((labels_BT != IGNORED_LABEL).sum())

    def __call__(self, run_model: RunModel, batch: Batch, *, num_targets: int) -> dict[str, Tensor]:
        """Return loss, KL and cosine distance."""
        with torch.no_grad(), recorded_outputs(self._teacher_layers) as teacher_hidden_LBTD:
            teacher_logits_BTV = self._teacher(**batch.model_inputs()).logits
        with recorded_outputs(self._student_layers) as student_hidden_LBTD:
            student_logits_BTV = run_model(**batch.model_inputs()).logits
        mask_BT = batch.labels_BT != IGNORED_LABEL
        kl = kl_divergence(student_logits_BTV, teacher_logits_BTV, mask_BT).total / num_targets
        cosine = cosine_loss(student_hidden_LBTD, teacher_hidden_LBTD, mask_BT).total / num_targets
        return {"loss": self._cosine_weight * cosine + self._kl_weight * kl, "kl": kl, "cosine": cosine}


def matched_teacher_layers(student: Architecture, teacher: Architecture) -> tuple[int, ...]:
    """Return, for each student block, the teacher layer whose output its own output stands for.

    Raises:
        CheckpointError: when the two do not share vocabulary and width, or a block names a layer the teacher lacks.
    """
    for size in ("vocab_size", "hidden_size"):
        if getattr(student, size) != getattr(teacher, size):
            raise CheckpointError(
                f"the student has {size} {getattr(student, size)}, the teacher {getattr(teacher, size)}: "
                "distillation compares logits and hidden states, so both must agree; distil from the child's own parent"
            )
    layers = tuple(block.parent_layers[-1] for block in student.blocks)
    if max(layers) >= teacher.num_hidden_layers:
        raise CheckpointError(
            f"a student block stands for parent layer {max(layers)}, the teacher has {teacher.num_hidden_layers} "
            "layers: distil from the parent the child was made of"
        )
    return layers


@contextlib.contextmanager
def recorded_outputs(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what each layer returns during the passes made inside, in the order in which the layers run."""
    outputs: list[Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output)

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
