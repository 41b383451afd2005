"""How far a block's output is from the parent's: three measures, each a number that its gradient makes smaller.

With y_t the parent's output at token t of N, e_t what the block misses it by, and rms(y)^2 the mean square over
channels:

    tensor    sum_t |e_t|^2 / sum_t |y_t|^2                the paper's (Puzzle, section 3)
    token     mean_t |e_t|^2 / |y_t|^2                     no token counts for more than another
    kl        mean_t 1/2 sum_d c_d e_td^2 / rms(y_t)^2     an estimate of the final KL, in nats per token

Each is a sum of weighed squares, sum_td w_td e_td^2, whose gradient to the block's output is 2 w e:

    tensor    w = 1 / sum_t |y_t|^2        token    w = 1 / (N |y_t|^2)        kl    w = c_d / (2 N rms(y_t)^2)

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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.recipe import BlockLoss

# The labels are part of what c is, as the calibration tokens are: drawn anew they would make other blocks.
LABEL_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTarget:
    """A parent layer's output on one batch, float32, which all blocks of the layer are held against.

    `slope` is 2 w, [], [B, T, 1] or [B, T, D].
    """

    output_BTD: Tensor
    slope: Tensor

    def loss(self, prediction_BTD: Tensor) -> float:
        """Return how far a block's output is from the parent's."""
        value, _ = self.loss_and_gradient(prediction_BTD)
        return value

    def loss_and_gradient(self, prediction_BTD: Tensor) -> tuple[float, Tensor]:
        """Return the loss, and its gradient to the block's output, 2 w e, in the output's precision.

        Written out, it passes over the tensors four or five times where autograd does twelve: on CPUs whose matrix
        products are fast, passes are what block distillation waits for.
        """
        prediction_BTD = prediction_BTD.detach()
        error_BTD = prediction_BTD - self.output_BTD  # bf16 is widened here: its squares would round all else away
        gradient_BTD = error_BTD * self.slope
        value = torch.linalg.vecdot(error_BTD, gradient_BTD).sum(dtype=torch.float64).item() / 2
        return value, gradient_BTD.to(prediction_BTD.dtype)


def block_target(output_BTD: Tensor, *, kind: BlockLoss, curvature_D: Tensor | None = None) -> BlockTarget:
    """Return what blocks are held against; `kl` needs the layer's `curvature_D`."""
    output_BTD = output_BTD.float()
    size_BT1 = output_BTD.square().mean(dim=-1, keepdim=True)
    num_tokens, num_channels = size_BT1.numel(), output_BTD.shape[-1]
    if kind == "tensor":
        slope = 2 / (num_tokens * num_channels * size_BT1.mean())
    elif kind == "token":
        slope = 2 / (num_tokens * num_channels * size_BT1)
    else:
        assert curvature_D is not None
        slope = curvature_D / (num_tokens * size_BT1)
    return BlockTarget(output_BTD=output_BTD, slope=slope)


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
