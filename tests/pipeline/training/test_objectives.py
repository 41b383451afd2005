"""Objectives: which states are compared, and that packing changes nothing."""

import copy

import pytest
import torch
from torch.nn import functional as F

from pipeline.architecture import Architecture
from pipeline.data.packed import IGNORED_LABEL
from pipeline.errors import CheckpointError, DataError
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, build_model
from pipeline.training.objectives import (
    DistillationObjective,
    NextTokenObjective,
    matched_teacher_layers,
    recorded_outputs,
    take_batch,
)
from pipeline.training.validation import mean_cross_entropy, require_masked
from tests.pipeline.training.builders import (
    child_architecture,
    identity_tail_architecture,
    parent_architecture,
    sample_windows,
    text_windows,
)

CPU = torch.device("cpu")


def _model(architecture: Architecture, *, seed: int) -> HeterogeneousLlamaForCausalLM:
    return build_model(architecture, dtype=torch.float32, seed=seed, initializer_range=0.2)


def test_matched_layers_follow_the_last_parent_layer_of_each_block():
    assert matched_teacher_layers(child_architecture(), parent_architecture()) == (0, 2)


def test_matched_layers_refuse_a_teacher_that_is_too_shallow():
    with pytest.raises(CheckpointError, match="parent layer 2, the teacher has 2 layers"):
        matched_teacher_layers(child_architecture(), parent_architecture(num_layers=2))


def test_matched_layers_refuse_another_vocabulary():
    other = Architecture.model_validate({**parent_architecture().model_dump(), "vocab_size": 100})
    with pytest.raises(CheckpointError, match="vocab_size 96, the teacher 100"):
        matched_teacher_layers(child_architecture(), other)


def test_recorded_outputs_are_the_hidden_states_before_the_final_norm():
    model = _model(parent_architecture(), seed=0)
    tokens_BT = text_windows(2).tokens_NT
    with torch.no_grad(), recorded_outputs(list(model.model.layers)) as recorded:
        output = model(input_ids=tokens_BT, output_hidden_states=True, use_cache=False)
    for layer in (0, 1):
        assert torch.equal(recorded[layer], output.hidden_states[layer + 1])
    assert torch.equal(model.lm_head(model.model.norm(recorded[2])), output.logits)


@pytest.mark.parametrize("architecture", [child_architecture(), identity_tail_architecture()])
def test_distillation_loss_equals_the_formula(architecture: Architecture):
    student, teacher = _model(architecture, seed=1), _model(parent_architecture(), seed=0)
    batch = take_batch(text_windows(2), range(2), device=CPU)
    objective = DistillationObjective(student=student, teacher=teacher, cosine_weight=0.5, kl_weight=2.0)
    num_targets = objective.num_targets(batch.labels_BT)

    terms = objective(student, batch, num_targets=num_targets)
    terms["loss"].backward()

    tokens_BT = batch.tokens_BT
    with torch.no_grad(), recorded_outputs(list(teacher.model.layers)) as teacher_hidden:
        teacher_log_p = teacher(input_ids=tokens_BT, use_cache=False).logits.log_softmax(-1)
    reference = copy.deepcopy(student)
    reference.zero_grad()
    with recorded_outputs(list(reference.model.layers)) as student_hidden:
        student_log_q = reference(input_ids=tokens_BT, use_cache=False).logits.log_softmax(-1)
    kl = F.kl_div(student_log_q, teacher_log_p, log_target=True, reduction="none").sum(-1).mean()
    cosine = sum(
        (1 - F.cosine_similarity(hidden, teacher_hidden[block.parent_layers[-1]], dim=-1)).mean()
        for hidden, block in zip(student_hidden, architecture.blocks, strict=True)
    )
    expected = 0.5 * cosine + 2.0 * kl
    expected.backward()
    assert num_targets == tokens_BT.numel()
    torch.testing.assert_close(terms["loss"], expected)
    torch.testing.assert_close(terms["kl"], kl)
    for (name, parameter), (_, wanted) in zip(student.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad, msg=name)


def test_packed_samples_have_the_loss_of_the_samples_alone():
    model = _model(parent_architecture(), seed=3)
    packed = sample_windows(4)
    total, num_tokens = 0.0, 0
    with torch.no_grad():
        for tokens_T, labels_T, position_ids_T in zip(
            packed.tokens_NT, packed.labels_NT, packed.position_ids_NT, strict=True
        ):
            starts = (position_ids_T == 0).nonzero().flatten().tolist()
            for first, last in zip(starts, [*starts[1:], len(tokens_T)], strict=True):
                logits_TV = model(input_ids=tokens_T[None, first:last], use_cache=False).logits[0, :-1]
                targets_T = labels_T[first + 1 : last]
                total += F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED_LABEL, reduction="sum").item()
                num_tokens += int((targets_T != IGNORED_LABEL).sum())

    loss = mean_cross_entropy(model, packed, batch_size=3, device=CPU)
    assert loss == pytest.approx(total / num_tokens, rel=1e-5)
    assert NextTokenObjective().num_targets(packed.labels_NT) == num_tokens == packed.num_trained_tokens


def test_an_all_masked_set_is_refused():
    data = sample_windows(2)
    data.labels_NT.fill_(IGNORED_LABEL)
    with pytest.raises(DataError, match="0 of 32 tokens carry loss"):
        require_masked(data, what="samples")


def test_a_set_without_mask_is_refused():
    with pytest.raises(DataError, match="30 of 32 tokens carry loss"):
        require_masked(text_windows(2), what="samples")
