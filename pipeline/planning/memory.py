"""Peak memory of a training rank, term by term. Pure, closed form.

With P parameters, N ranks, bf16 compute, fp32 master weights and AdamW, in bytes:

    ZeRO     weights     gradients     master and moments
    0, 1     2 P         6 P           12 P, or 12 P / N from stage 1
    2        2 P         4 P / N       12 P / N
    3        2 P / N     4 P / N       12 P / N

(ZeRO, section 3; gradients are accumulated in fp32 here, beside the bf16 ones that are being made.) In fp32 the weights
are their own masters: 4 P, 4 P, 8 P. Activations are kept for every layer, since nothing is recomputed.
"""

from pipeline.architecture import Architecture
from pipeline.costs import kv_values_per_token
from pipeline.recipe import Precision
from pipeline.stage import ExecutionSettings


def training_state_bytes(
    num_parameters: float, *, precision: Precision, zero_stage: int, num_ranks: int
) -> dict[str, float]:
    """Return weights, gradients and optimizer bytes of one rank."""
    compute, gradient, optimizer = (2.0, 6.0, 12.0) if precision == "bf16" else (4.0, 4.0, 8.0)
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
    """Return what a forward pass of that many tokens keeps for its backward pass.

    Per token and layer: the two normed inputs and the two residual sums (4 D), queries and the attention's output
    (2 heads x head_dim), keys and values, and four FFN-wide vectors (gate, its silu, up, their product). Attention
    scores are not kept: scaled_dot_product_attention makes them again.
    """
    size = 2.0 if precision == "bf16" else 4.0
    total = 0.0
    for block in model.blocks:
        values = 4.0 * model.hidden_size
        if block.attention.kind == "gqa":
            values += 2.0 * model.num_attention_heads * model.head_dim
            values += kv_values_per_token(model, block.attention)
        values += 4.0 * (block.ffn.intermediate_size or 0)
        total += values
    return size * num_tokens * total


def logit_bytes(model: Architecture, *, num_tokens: int, num_models: int) -> float:
    """Return logits in fp32 with their gradient, and one more fp32 copy for each further model compared with."""
    return 4.0 * num_tokens * model.vocab_size * (1 + num_models)


def training_peak_bytes(
    model: Architecture,
    *,
    num_parameters: float,
    sequence_length: int,
    precision: Precision,
    execution: ExecutionSettings,
    teacher: Architecture | None = None,
    teacher_parameters: float = 0.0,
) -> dict[str, float]:
    """Return the peak of one training rank by part; at ZeRO 3 a teacher is split, below it is whole."""
    num_tokens = execution.micro_batch_size * sequence_length
    parts = training_state_bytes(
        num_parameters, precision=precision, zero_stage=execution.zero_stage, num_ranks=execution.num_ranks
    )
    parts["activations"] = activation_bytes(model, num_tokens=num_tokens, precision=precision)
    parts["logits"] = logit_bytes(model, num_tokens=num_tokens, num_models=1 if teacher is None else 2)
    if teacher is not None:
        size = 2.0 if precision == "bf16" else 4.0
        parts["teacher"] = size * teacher_parameters / (execution.num_ranks if execution.zero_stage == 3 else 1)
        parts["hidden states"] = 2 * size * num_tokens * teacher.hidden_size * teacher.num_hidden_layers
    return parts
