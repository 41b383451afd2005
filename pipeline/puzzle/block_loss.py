"""How far a block's output is from the parent's: three measures, each a number that its gradient makes smaller.

With y_t the parent's output at token t, e_t what the block misses it by, and rms(y)^2 the mean square over channels:

    tensor    sum_t |e_t|^2 / sum_t |y_t|^2                the paper's (Puzzle, section 3)
    token     mean_t |e_t|^2 / |y_t|^2                     no token counts for more than another
    kl        mean_t 1/2 sum_d c_d e_td^2 / rms(y_t)^2     an estimate of the final KL, in nats per token

Where `kl` comes from. Let P be the parent's distributions and P(e) those of the parent with e added to this output.
KL(P || P(e)) is zero at e = 0 and never negative, so its gradient vanishes there and it begins with its curvature,

    KL(P || P(e)) = 1/2 e^T H e + O(e^3),    H = E over k_s ~ P_s of g g^T,    g = d (sum_s log P_s(k_s)) / dy,

the Fisher information: labels k_s are drawn at every position s from the parent itself, independently, so that products
of different positions vanish in the mean and one backward pass estimates the whole sum. Of H the diagonal is kept. What
reads y_t first divides it by its norm, so g_t shrinks with it; measured relative to that, one curvature per channel

    c_d = mean over tokens of rms(y_t)^2 g_td^2

serves all tokens, and a label that happened to be rare weighs no single token down. (Ours.)

Letters: B batch, T tokens, D hidden_size, V vocab_size.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.recipe import BlockLoss

# The labels are part of what c is, as the calibration tokens are: drawn anew they would make other blocks.
LABEL_SEED = 0


def block_loss(
    prediction_BTD: Tensor, target_BTD: Tensor, *, kind: BlockLoss, curvature_D: Tensor | None = None
) -> Tensor:
    """Return how far a block's output is from the parent's, in float32; `kl` needs the layer's `curvature_D`."""
    # bf16 squares of massive activations would round away everything else.
    prediction_BTD, target_BTD = prediction_BTD.float(), target_BTD.float()
    squares_BTD = (prediction_BTD - target_BTD).square()
    size_BT = target_BTD.square().mean(dim=-1)
    if kind == "kl":
        assert curvature_D is not None
        return 0.5 * ((squares_BTD @ curvature_D) / size_BT).mean()
    error_BT = squares_BTD.mean(dim=-1)
    if kind == "tensor":
        return error_BT.mean() / size_BT.mean()
    return (error_BT / size_BT).mean()


def output_curvature(
    model: HeterogeneousLlamaForCausalLM, packed: PackedTokens, *, batch_size: int, reporter: Reporter
) -> tuple[Tensor, ...]:
    """Return c of every layer, float32 on the CPU, over all tokens of `packed`; one forward and one backward pass."""
    model.requires_grad_(requires_grad=False)
    layers: list[Any] = list(model.model.layers)
    device = next(model.parameters()).device
    sums = [torch.zeros(model.config.hidden_size, dtype=torch.float64, device=device) for _ in layers]
    generator = torch.Generator(device).manual_seed(LABEL_SEED)
    steps = range(0, len(packed), batch_size)
    for step, start in enumerate(steps, start=1):
        rows = slice(start, start + batch_size)
        tokens_BT, positions_BT = packed.tokens_NT[rows].to(device), packed.position_ids_NT[rows].to(device)
        outputs, gradients = output_gradients(model, tokens_BT, positions_BT, generator=generator)
        for sum_D, output_BTD, gradient_BTD in zip(sums, outputs, gradients, strict=True):
            size_BT1 = output_BTD.float().square().mean(dim=-1, keepdim=True)
            sum_D += (size_BT1 * gradient_BTD.float().square()).sum(dim=(0, 1))
        reporter.step(step, len(steps), what="batches for the curvature of the KL")
    return tuple((sum_D / packed.num_tokens).float().cpu() for sum_D in sums)


def output_gradients(
    model: HeterogeneousLlamaForCausalLM, tokens_BT: Tensor, position_ids_BT: Tensor, *, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Return every layer's output (B, T, D) and g there, for labels drawn from the model's own distributions."""
    outputs: list[Tensor] = []
    layers: list[Any] = list(model.model.layers)

    def keep(_module: object, _inputs: object, output_BTD: Tensor) -> Tensor:
        if not outputs:
            # Nothing before the first layer's output is asked for, and no weight wants a gradient.
            output_BTD = output_BTD.detach().requires_grad_()
        outputs.append(output_BTD)
        return output_BTD

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with torch.enable_grad():
            logits_BTV = model(input_ids=tokens_BT, position_ids=position_ids_BT, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    with torch.enable_grad():
        log_probabilities_SV = logits_BTV.float().log_softmax(dim=-1).flatten(0, 1)
        labels_S1 = torch.multinomial(log_probabilities_SV.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(log_probabilities_SV.gather(1, labels_S1).sum(), outputs)
    return [output_BTD.detach() for output_BTD in outputs], list(gradients)
