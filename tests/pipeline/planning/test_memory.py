"""The closed forms of a training's memory against what PyTorch really holds, storage by storage."""

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.architecture import Architecture
from pipeline.costs import num_parameters
from pipeline.model.architecture_files import parent_architecture
from pipeline.model.checkpoint import TORCH_DTYPES
from pipeline.model.heterogeneous import build_model
from pipeline.planning import training_estimates
from pipeline.planning.memory import (
    activation_bytes,
    hidden_state_bytes,
    logit_bytes,
    recomputed_activation_bytes,
    sampled_logit_bytes,
    training_state_bytes,
)
from pipeline.reasoning import policy
from pipeline.reasoning.grpo import token_logprobs, token_statistics
from pipeline.recipe import Precision
from pipeline.recipe_file import load_recipe
from pipeline.stage import ExecutionSettings
from pipeline.training.engine import TrainEngine, recompute_activations
from pipeline.training.objectives import Batch, DistillationObjective, NextTokenObjective

NUM_TOKENS = 512


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the known storages and of all made inside, as long as they live, and their peak."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()
        for tensor in known:
            self._count(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        # Addresses are given out again: a storage that is gone must not hide the next one.
        weakref.finalize(storage, self._give_back, key, num_bytes)

    def _give_back(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.live -= num_bytes


def peak_bytes(call: Callable[[], object], *, known: Iterable[torch.Tensor]) -> int:
    """Return the peak of what the call holds beside the known tensors."""
    with LiveBytes(known) as counted:
        before = counted.live
        call()
    return counted.peak - before


def toy(*, num_layers: int, vocab_size: int) -> Architecture:
    """Return the shape of a Llama layer, its FFN four times as wide as the model, that a test can run."""
    parent = parent_architecture(load_recipe("smol").parent)
    block = parent.homogeneous_block()
    block = block.model_copy(
        update={
            "attention": block.attention.model_copy(update={"num_key_value_heads": 2}),
            "ffn": block.ffn.model_copy(update={"intermediate_size": 512}),
        }
    )
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "vocab_size": vocab_size}
    return parent.model_copy(update=sizes).with_blocks(
        [block.model_copy(update={"parent_layers": (layer,)}) for layer in range(num_layers)]
    )


def step_peak(architecture: Architecture, *, precision: Precision, with_teacher: bool, recomputes: bool = False) -> int:
    """Return the peak of forward and backward of one micro-batch; weights and gradients are not counted."""
    dtype = TORCH_DTYPES[precision]
    student = build_model(architecture, dtype=dtype, seed=0).train()
    if recomputes:
        recompute_activations(student)
    teacher = build_model(architecture, dtype=dtype, seed=1)
    gradients = [torch.zeros_like(weight) for weight in student.parameters()]
    for weight, gradient in zip(student.parameters(), gradients, strict=True):
        weight.grad = gradient
    tokens_BT = torch.randint(architecture.vocab_size, (2, NUM_TOKENS // 2))
    batch = Batch(tokens_BT=tokens_BT, labels_BT=tokens_BT, position_ids_BT=None)
    objective = (
        DistillationObjective(student=student, teacher=teacher, cosine_weight=1.0, kl_weight=1.0)
        if with_teacher
        else NextTokenObjective()
    )
    models: list[nn.Module] = [student, teacher]
    return peak_bytes(
        lambda: objective(student, batch, num_targets=NUM_TOKENS)["loss"].backward(),
        known=[*gradients, *(tensor for model in models for tensor in (*model.parameters(), *model.buffers()))],
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_layer_more_costs_its_activations(precision: Precision, with_teacher: bool):
    # So many that the peak is where the backward pass begins, when all is there: inside it a few layers weigh more.
    shallow, deep = toy(num_layers=24, vocab_size=256), toy(num_layers=32, vocab_size=256)

    def expected(model: Architecture) -> float:
        kept = activation_bytes(model, num_tokens=NUM_TOKENS, precision=precision)
        return kept + with_teacher * hidden_state_bytes(model, num_tokens=NUM_TOKENS, precision=precision)

    measured = step_peak(deep, precision=precision, with_teacher=with_teacher) - step_peak(
        shallow, precision=precision, with_teacher=with_teacher
    )
    assert measured == pytest.approx(expected(deep) - expected(shallow), rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_layer_more_costs_its_input_where_activations_are_made_again(precision: Precision, with_teacher: bool):
    shallow, deep = toy(num_layers=24, vocab_size=256), toy(num_layers=32, vocab_size=256)

    def expected(model: Architecture) -> float:
        kept = recomputed_activation_bytes(
            model, num_tokens=NUM_TOKENS, precision=precision, has_hidden_states=with_teacher
        )
        return kept + with_teacher * hidden_state_bytes(model, num_tokens=NUM_TOKENS, precision=precision)

    measured = step_peak(deep, precision=precision, with_teacher=with_teacher, recomputes=True) - step_peak(
        shallow, precision=precision, with_teacher=with_teacher, recomputes=True
    )
    assert measured == pytest.approx(expected(deep) - expected(shallow), rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_wider_ffn_costs_its_activations_once_where_they_are_made_again(precision: Precision):
    narrow = toy(num_layers=4, vocab_size=256)
    wide = narrow.with_blocks(
        [
            block.model_copy(update={"ffn": block.ffn.model_copy(update={"intermediate_size": 4096})})
            for block in narrow.blocks
        ]
    )

    def expected(model: Architecture) -> float:
        return recomputed_activation_bytes(model, num_tokens=NUM_TOKENS, precision=precision, has_hidden_states=False)

    measured = step_peak(wide, precision=precision, with_teacher=False, recomputes=True) - step_peak(
        narrow, precision=precision, with_teacher=False, recomputes=True
    )
    # Beside a layer's activations its backward pass holds their gradients: three FFN-wide ones at most.
    size = 2.0 if precision == "bf16" else 4.0
    gradients = 3 * size * NUM_TOKENS * (4096 - 512)
    assert expected(wide) - expected(narrow) <= measured <= expected(wide) - expected(narrow) + gradients


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_larger_vocabulary_costs_its_logits(precision: Precision, with_teacher: bool):
    # Both split into full chunks of 2^22 fp32 values, two and four of them, which hence cancel.
    small, large = toy(num_layers=1, vocab_size=2**14), toy(num_layers=1, vocab_size=2**15)

    def expected(model: Architecture) -> float:
        return logit_bytes(model, num_tokens=NUM_TOKENS, precision=precision, with_teacher=with_teacher)

    measured = step_peak(large, precision=precision, with_teacher=with_teacher) - step_peak(
        small, precision=precision, with_teacher=with_teacher
    )
    assert measured == pytest.approx(expected(large) - expected(small), rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_log_probabilities_of_sampled_replies(precision: Precision, with_gradient: bool):
    model = toy(num_layers=1, vocab_size=4096)
    logits_BTV = torch.randn(4, 16, model.vocab_size).to(TORCH_DTYPES[precision]).requires_grad_(with_gradient)
    ids_BT = torch.zeros(4, 16, dtype=torch.long)

    def score() -> None:
        if with_gradient:
            token_logprobs(logits_BTV, ids_BT=ids_BT, temperature=0.7).sum().backward()
        else:
            token_statistics(logits_BTV, ids_BT=ids_BT, temperature=0.7)

    held = logits_BTV.untyped_storage().nbytes() + peak_bytes(score, known=[logits_BTV])
    expected = sampled_logit_bytes(model, num_tokens=64, precision=precision)
    assert held == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 0), ("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)])
def test_what_an_engine_holds_between_two_steps(precision: Precision, zero_stage: Any):
    recipe = load_recipe("tiny")
    architecture = parent_architecture(recipe.parent)
    tokens_BT = torch.randint(architecture.vocab_size, (1, 16))
    batch = Batch(tokens_BT=tokens_BT, labels_BT=tokens_BT, position_ids_BT=None)
    before = living_storages()
    engine = TrainEngine.create(
        build_model(architecture, dtype=TORCH_DTYPES[precision], seed=0).train(),
        optimizer=recipe.kd.optimizer,
        total_steps=2,
        precision=precision,
        execution=ExecutionSettings(zero_stage=zero_stage, micro_batch_size=1),
        global_batch_size=2,
    )
    for step in range(2):
        for _ in range(2):
            engine.backward(NextTokenObjective()(engine.forward, batch, num_targets=16)["loss"])
        if step == 0:
            engine.step()
    held = sum(storage.nbytes() for key, storage in living_storages().items() if key not in before)
    engine.step()
    engine.close()
    count = num_parameters(architecture)
    state = sum(training_state_bytes(count, precision=precision, zero_stage=zero_stage, num_ranks=1).values())
    # Those of the last micro-batch may still be there, in the precision they were made in.
    gradients = (2 if precision == "bf16" else 4) * count
    assert 0.98 * state <= held <= 1.02 * (state + gradients)


def living_storages() -> dict[int, torch.UntypedStorage]:
    """Return every storage that a living tensor or its gradient has, by its address.

    Whoever holds them keeps their addresses from being given out again.
    """
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage for storage in storages}


def test_replies_share_sequences_as_planned():
    assert training_estimates.MAX_SHARED_TOKENS == policy.MAX_SHARED_TOKENS
