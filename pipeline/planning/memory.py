"""Peak memory of a training rank, term by term. Pure, closed form.

With P parameters, N ranks, bf16 compute, fp32 master weights and AdamW, in bytes:

    ZeRO     weights     gradients     master and moments
    0, 1     2 P         6 P           12 P, or 12 P / N from stage 1
    2        2 P         4 P / N       12 P / N
    3        2 P / N     4 P / N       12 P / N

(ZeRO, section 3; gradients are accumulated in fp32 here, beside the bf16 ones that are being made.) In fp32 weights and
gradients take 4 P each, moments 8 P, and from stage 1 DeepSpeed keeps masters all the same: 12 P / N. Activations are
kept for every layer, or with recompute_activations each layer's input and the activations of one layer.
"""

from pipeline.architecture import Architecture, BlockSpec
from pipeline.costs import kv_values_per_token
from pipeline.recipe import Precision
from pipeline.stage import ExecutionSettings


def training_state_bytes(
    num_parameters: float, *, precision: Precision, zero_stage: int, num_ranks: int
) -> dict[str, float]:
    """Return weights, gradients and optimizer bytes of one rank."""
    compute, gradient = (2.0, 6.0) if precision == "bf16" else (4.0, 4.0)
    optimizer = 8.0 if precision == "fp32" and zero_stage == 0 else 12.0
    if zero_stage >= 2:
        gradient = 4.0 / num_ranks
    if zero_stage >= 1:
        optimizer /= num_ranks
    if zero_stage == 3:
        compute /= num_ranks
    return {
        "weights": compute * num_parameters,
        "gradients": gradient * num_parameters,
        "optimizer": optimizer * num_parameters,
    }


def activation_bytes(model: Architecture, *, num_tokens: int, precision: Precision) -> float:
    """Return what a forward pass of that many tokens keeps for its backward pass, over all layers.

    What autograd really keeps lies within 2 % of this (tests/pipeline/planning/test_memory.py).
    """
    return num_tokens * sum(_layer_values_bytes(model, block, precision=precision) for block in model.blocks)


def recomputed_activation_bytes(
    model: Architecture, *, num_tokens: int, precision: Precision, has_hidden_states: bool
) -> float:
    """Return the same where each layer keeps its input alone: those, and the activations of the largest layer.

    Inputs are the hidden states before; in bf16 those of distillation (`has_hidden_states`) are counted with these.
    """
    size = 2.0 if precision == "bf16" else 4.0
    are_counted = has_hidden_states and precision == "bf16"
    inputs = 0.0 if are_counted else size * model.hidden_size * model.num_hidden_layers
    return num_tokens * (inputs + max(_layer_values_bytes(model, block, precision=precision) for block in model.blocks))


def _layer_values_bytes(model: Architecture, block: BlockSpec, *, precision: Precision) -> float:
    """Return what a layer keeps of a token.

    Of each norm its input in fp32, the normed values and their product with the scale (D each), queries and the
    attention's output (2 heads x head_dim), keys and values, and four FFN-wide vectors (gate, its silu, up, their
    product). Attention scores are not kept: scaled_dot_product_attention makes them again.
    """
    size = 2.0 if precision == "bf16" else 4.0
    num_norms = (block.attention.kind != "no_op") + (block.ffn.kind != "no_op")
    values = 4.0 * (block.ffn.intermediate_size or 0)
    if block.attention.kind == "gqa":
        values += 2.0 * model.num_attention_heads * model.head_dim
        values += kv_values_per_token(model, block.attention)
    return num_norms * (4.0 + 2.0 * size) * model.hidden_size + size * values


def logit_bytes(model: Architecture, *, num_tokens: int, precision: Precision, with_teacher: bool) -> float:
    """Return logits with their gradient, and the teacher's: fp32 copies exist for a chunk of rows alone."""
    size = 2.0 if precision == "bf16" else 4.0
    return size * num_tokens * model.vocab_size * (3 if with_teacher else 2)


def sampled_logit_bytes(model: Architecture, *, num_tokens: int, precision: Precision) -> float:
    """Return what policy log-probabilities of that many tokens need, with gradients or without: three fp32 copies."""
    size = 2.0 if precision == "bf16" else 4.0
    return num_tokens * model.vocab_size * (size + 12.0)


def hidden_state_bytes(model: Architecture, *, num_tokens: int, precision: Precision) -> float:
    """Return the hidden states that distillation compares.

    Of both models in bf16, and what their cosine keeps in fp32: the student's, and the teacher's at length one. In fp32
    the teacher's and these, since the student's are its layers' inputs.
    """
    return (12.0 if precision == "bf16" else 8.0) * num_tokens * model.hidden_size * model.num_hidden_layers


def training_peak_bytes(
    model: Architecture,
    *,
    num_parameters: float,
    num_tokens: int,
    precision: Precision,
    execution: ExecutionSettings,
    teacher: Architecture | None = None,
    teacher_parameters: float = 0.0,
) -> dict[str, float]:
    """Return the peak of one training rank by part; at ZeRO 3 a teacher is split, below it is whole."""
    parts = training_state_bytes(
        num_parameters, precision=precision, zero_stage=execution.zero_stage, num_ranks=execution.num_ranks
    )
    parts["activations"] = (
        recomputed_activation_bytes(
            model, num_tokens=num_tokens, precision=precision, has_hidden_states=teacher is not None
        )
        if execution.recompute_activations
        else activation_bytes(model, num_tokens=num_tokens, precision=precision)
    )
    parts["logits"] = logit_bytes(model, num_tokens=num_tokens, precision=precision, with_teacher=teacher is not None)
    if teacher is not None:
        size = 2.0 if precision == "bf16" else 4.0
        parts["teacher"] = size * teacher_parameters / (execution.num_ranks if execution.zero_stage == 3 else 1)
        parts["hidden states"] = hidden_state_bytes(teacher, num_tokens=num_tokens, precision=precision)
    return parts
