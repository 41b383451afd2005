"""The engine against a plain torch loop, over ZeRO stages, micro-batch sizes and precisions."""

import copy
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.errors import RecipeError, StageError
from pipeline.recipe import Precision
from pipeline.stage import ExecutionSettings
from pipeline.training.engine import TrainEngine, choose_micro_batch_size
from pipeline.training.schedules import learning_rate_factor
from tests.pipeline.training.builders import OPTIMIZER, VOCAB_SIZE, random_tokens

NUM_STEPS = 5
GLOBAL_BATCH_SIZE = 4
TOKENS_NT = random_tokens(NUM_STEPS * GLOBAL_BATCH_SIZE, 12, seed=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a training of this file leaves."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            vocab_size=VOCAB_SIZE,
            tie_word_embeddings=True,
        )
    )


def _train(
    model: PreTrainedModel,
    *,
    zero_stage: Literal[0, 1, 2, 3],
    precision: Precision = "fp32",
    micro_batch_size: int = 4,
    recompute_activations: bool = False,
) -> Trained:
    execution = ExecutionSettings(
        zero_stage=zero_stage, micro_batch_size=micro_batch_size, recompute_activations=recompute_activations
    )
    engine = TrainEngine.create(
        copy.deepcopy(model),
        optimizer=OPTIMIZER,
        total_steps=NUM_STEPS,
        precision=precision,
        execution=execution,
        global_batch_size=GLOBAL_BATCH_SIZE,
    )
    losses, norms = [], []
    for step_NT in TOKENS_NT.split(GLOBAL_BATCH_SIZE):
        loss = 0.0
        for micro_BT in step_NT.split(micro_batch_size):
            part = engine.forward(input_ids=micro_BT, labels=micro_BT, use_cache=False).loss
            part = part * len(micro_BT) / GLOBAL_BATCH_SIZE
            engine.backward(part)
            loss += part.item()
        losses.append(loss)
        norms.append(engine.step().grad_norm)
    exported = dict(engine.exported_tensors())
    engine.close()
    return Trained(losses=losses, grad_norms=norms, weights=exported)


def _engine_of_one_step(model: PreTrainedModel, execution: ExecutionSettings) -> TrainEngine:
    return TrainEngine.create(
        copy.deepcopy(model),
        optimizer=OPTIMIZER,
        total_steps=1,
        precision="fp32",
        execution=execution,
        global_batch_size=GLOBAL_BATCH_SIZE,
    )


def _train_plainly(model: nn.Module) -> Trained:
    model = copy.deepcopy(model)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=OPTIMIZER.learning_rate,
        betas=OPTIMIZER.betas,
    )
    losses, norms = [], []
    for step, ids_BT in enumerate(TOKENS_NT.split(GLOBAL_BATCH_SIZE)):
        for group in optimizer.param_groups:
            factor = learning_rate_factor(step, total_steps=NUM_STEPS, optimizer=OPTIMIZER)
            group["lr"] = OPTIMIZER.learning_rate * factor
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Trained(losses=losses, grad_norms=norms, weights=weights)


@pytest.fixture(scope="module")
def plain(llama: LlamaForCausalLM) -> Trained:
    return _train_plainly(llama)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_fp32_training_equals_plain_adamw(
    llama: LlamaForCausalLM, plain: Trained, zero_stage: Literal[0, 1, 2, 3], micro_batch_size: int
):
    trained = _train(llama, zero_stage=zero_stage, micro_batch_size=micro_batch_size)
    assert trained.losses == pytest.approx(plain.losses, abs=1e-6)
    assert trained.grad_norms == pytest.approx(plain.grad_norms, abs=1e-5)
    assert trained.weights.keys() == plain.weights.keys()  # a tied head is there once
    for name, tensor in trained.weights.items():
        torch.testing.assert_close(tensor, plain.weights[name], atol=2e-6, rtol=0)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_training_follows_fp32_and_keeps_fp32_masters(
    llama: LlamaForCausalLM, plain: Trained, zero_stage: Literal[0, 1, 2, 3]
):
    trained = _train(llama, zero_stage=zero_stage, precision="bf16", micro_batch_size=2)
    assert trained.losses == pytest.approx(plain.losses, abs=5e-3)
    assert all(_has_more_digits_than_bf16(tensor) for tensor in trained.weights.values())


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 0), ("bf16", 1), ("fp32", 2), ("bf16", 3)])
def test_activations_that_are_made_again_change_no_bit(
    llama: LlamaForCausalLM, precision: Precision, zero_stage: Literal[0, 1, 2, 3]
):
    kept = _train(llama, zero_stage=zero_stage, precision=precision, micro_batch_size=2)
    again = _train(llama, zero_stage=zero_stage, precision=precision, micro_batch_size=2, recompute_activations=True)
    assert again.losses == kept.losses
    assert again.grad_norms == kept.grad_norms
    for name, tensor in again.weights.items():
        assert torch.equal(tensor, kept.weights[name]), name


def test_layers_run_again_after_the_model_was_evaluated(llama: LlamaForCausalLM):
    engine = _engine_of_one_step(llama, ExecutionSettings(micro_batch_size=4, recompute_activations=True))
    engine.model.eval()  # as sampling and scoring leave it
    num_runs = 0

    def count(*_: object) -> None:
        nonlocal num_runs
        num_runs += 1

    engine.model.model.layers[0].self_attn.register_forward_hook(count)
    engine.backward(engine.forward(input_ids=TOKENS_NT[:4], labels=TOKENS_NT[:4], use_cache=False).loss)
    engine.step()
    engine.close()
    assert num_runs == 2


def test_bf16_with_stage_0_is_refused(llama: LlamaForCausalLM):
    with pytest.raises(StageError, match="zero_stage is 0 with precision bf16"):
        _train(llama, zero_stage=0, precision="bf16")


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_frozen_parameters_stay_and_are_exported(llama: LlamaForCausalLM, zero_stage: Literal[0, 1, 2, 3]):
    model = copy.deepcopy(llama)
    model.model.embed_tokens.weight.requires_grad_(False)
    exported = _train(model, zero_stage=zero_stage).weights
    assert torch.equal(exported["model.embed_tokens.weight"], llama.model.embed_tokens.weight)
    assert not torch.equal(exported["model.norm.weight"], llama.model.norm.weight)


def test_step_before_all_micro_batches_is_refused(llama: LlamaForCausalLM):
    engine = _engine_of_one_step(llama, ExecutionSettings(micro_batch_size=2))
    engine.backward(engine.forward(input_ids=TOKENS_NT[:2], labels=TOKENS_NT[:2], use_cache=False).loss)
    with pytest.raises(StageError, match="1 of 2 micro-batches"):
        engine.step()
    engine.close()


@pytest.mark.parametrize(
    ("wanted", "global_batch_size", "world_size", "chosen"), [(4, 8, 1, 4), (4, 6, 1, 3), (4, 8, 4, 2), (16, 8, 1, 8)]
)
def test_micro_batch_is_the_largest_that_divides(wanted: int, global_batch_size: int, world_size: int, chosen: int):
    assert choose_micro_batch_size(wanted, global_batch_size=global_batch_size, world_size=world_size) == chosen


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(RecipeError, match="8 rows, which 3 ranks do not divide"):
        choose_micro_batch_size(4, global_batch_size=8, world_size=3)


def _has_more_digits_than_bf16(tensor: Tensor) -> bool:
    return not torch.equal(tensor, tensor.bfloat16().float())
