"""How close a model's predictions are to those of other models on packed windows: KL, perplexity, final states.

Models in, figures out: no files. A reference's logits are never kept: its final hidden states are, and its head is
applied again beside each model's.

Letters: N windows, T tokens, D hidden_size, V vocab_size, S tokens in a slice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.packed import IGNORED_LABEL, PackedTokens
from pipeline.evaluation.intervals import Estimate, weighted_mean
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM

# Rows of logits held in float32 at once: 256 x 49,152 x 4 bytes is 50 MB, twice.
SLICE_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A model's head, and its final hidden states on the windows, in main memory."""

    head: nn.Module
    hidden_NTD: Tensor

    @classmethod
    def of(cls, model: HeterogeneousLlamaForCausalLM, packed: PackedTokens) -> "Reference":
        """Run the model once over the windows."""
        hidden = [_final_states(model, packed, row).cpu() for row in range(len(packed))]
        return cls(head=model.lm_head, hidden_NTD=torch.stack(hidden))


@dataclass(frozen=True, kw_only=True, slots=True)
class Closeness:
    """One model beside one reference: mean KL(reference || model), and |h - h_reference| / |h_reference| over all h."""

    kl_nats: Estimate
    relative_output_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One model's perplexity, and how close it is to each reference in turn; samples are windows."""

    perplexity: Estimate
    to_references: tuple[Closeness, ...]
    num_tokens: int


@torch.no_grad()
def compare(model: HeterogeneousLlamaForCausalLM, packed: PackedTokens, references: Sequence[Reference]) -> Comparison:
    """Measure a model against references on the same windows; KL counts every token, perplexity every label."""
    losses: list[tuple[float, float]] = []
    divergences: list[list[tuple[float, float]]] = [[] for _ in references]
    squared_differences, squared_norms = [0.0] * len(references), [0.0] * len(references)
    for row in range(len(packed)):
        hidden_TD = _final_states(model, packed, row)
        # Position t predicts the label of t + 1; the last position predicts nothing.
        next_T = F.pad(packed.labels_NT[row, 1:], (0, 1), value=IGNORED_LABEL).to(hidden_TD.device)
        others = [reference.hidden_NTD[row].to(hidden_TD.device) for reference in references]
        loss, kls = 0.0, [0.0] * len(references)
        for start in range(0, len(hidden_TD), SLICE_TOKENS):
            part = slice(start, start + SLICE_TOKENS)
            log_q_SV = model.lm_head(hidden_TD[part]).float().log_softmax(dim=-1)
            loss += F.nll_loss(log_q_SV, next_T[part], ignore_index=IGNORED_LABEL, reduction="sum").item()
            for index, (reference, other_TD) in enumerate(zip(references, others, strict=True)):
                log_p_SV = reference.head(other_TD[part]).float().log_softmax(dim=-1)
                kls[index] += (log_p_SV.exp() * (log_p_SV - log_q_SV)).sum(dim=-1).double().sum().item()
        losses.append((loss, float((next_T != IGNORED_LABEL).sum())))
        for index, other_TD in enumerate(others):
            divergences[index].append((kls[index], float(len(hidden_TD))))
            squared_differences[index] += (hidden_TD - other_TD).double().square().sum().item()
            squared_norms[index] += other_TD.double().square().sum().item()
    return Comparison(
        perplexity=weighted_mean([losses]).mapped(lambda nats: math.exp(min(nats, 700.0))),
        to_references=tuple(
            # Student's interval of few windows reaches below 0, where no divergence is.
            Closeness(
                kl_nats=weighted_mean([sums]).mapped(lambda nats: max(nats, 0.0)),
                relative_output_error=math.sqrt(difference / norm),
            )
            for sums, difference, norm in zip(divergences, squared_differences, squared_norms, strict=True)
        ),
        num_tokens=packed.num_tokens,
    )


@torch.no_grad()
def _final_states(model: HeterogeneousLlamaForCausalLM, packed: PackedTokens, row: int) -> Tensor:
    """Return the states that the head reads for one window, (T, D); windows run singly, as logits are large."""
    tokens_BT, positions_BT = (
        one[row : row + 1].to(model.device) for one in (packed.tokens_NT, packed.position_ids_NT)
    )
    return model.model(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False).last_hidden_state[0]
