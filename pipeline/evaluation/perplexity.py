"""Perplexity, KL to the parent and top-1 agreement on windows of held-out text. Models in, figures out: no files.

Every figure is taken from the same tokens in one pass. The parent's logits are never kept: its final hidden states are
(hidden_size values per token instead of vocab_size), and its head is applied again next to each checkpoint's.

B batch, T tokens, D hidden_size, V vocab_size, W windows
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.evaluation.intervals import Estimate, weighted_mean
from pipeline.evaluation.results import TextQuality
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM

# Rows of logits held in float32 at once: 256 x 49,152 x 4 bytes is 50 MB, twice.
TOKENS_PER_CHUNK = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSums:
    """Sums over the predicted tokens of each window, in the order of the windows."""

    num_tokens_W: Tensor
    nll_W: Tensor
    kl_W: Tensor
    agreements_W: Tensor


def cut_windows(documents: Iterable[Sequence[int]], *, separator: int, sequence_length: int, max_tokens: int) -> Tensor:
    """Join tokenised documents and cut them into windows of sequence_length + 1 tokens, `tokens_WT`.

    A window predicts its sequence_length last tokens; the next one begins at the last of them, so that no token is
    predicted twice. Where the text holds more than `max_tokens`, evenly spaced windows are kept, so that they come from
    all its documents and not from the first. A text shorter than one window is one shorter window; otherwise the rest
    behind the last whole window is left out.

    Raises:
        DataError: when the text has fewer than two tokens.
    """
    joined: list[int] = []
    for document in documents:
        joined.extend(document)
        joined.append(separator)
    num_cut = (len(joined) - 1) // sequence_length
    num_kept = min(num_cut, max_tokens // sequence_length)
    if num_kept <= 0:
        shorter = min(len(joined), max_tokens + 1)
        if shorter < 2:
            raise DataError(f"a held-out set has {len(joined)} tokens: perplexity needs at least 2; add documents")
        return torch.tensor([joined[:shorter]], dtype=torch.long)
    # The middle one of each of num_kept equal runs of windows; all of them where all are kept.
    starts = [(2 * place + 1) * num_cut // (2 * num_kept) * sequence_length for place in range(num_kept)]
    return torch.tensor([joined[start : start + sequence_length + 1] for start in starts], dtype=torch.long)


@torch.inference_mode()
def final_hidden_states(
    model: HeterogeneousLlamaForCausalLM, *, windows_WT: Tensor, batch_size: int
) -> Iterator[Tensor]:
    """Yield the hidden states that the head reads, batch by batch, `hidden_BTD` on the model's device."""
    for tokens_BT in windows_WT.split(batch_size):
        inputs_BT = tokens_BT[:, :-1].to(model.device)
        yield model.model(input_ids=inputs_BT, use_cache=False).last_hidden_state


@dataclass(frozen=True, kw_only=True, slots=True)
class ParentText:
    """The parent's head, and its final hidden states on one text, in main memory."""

    head: nn.Module
    hidden_WTD: Tensor

    @classmethod
    def of(cls, parent: HeterogeneousLlamaForCausalLM, *, windows_WT: Tensor, batch_size: int) -> "ParentText":
        """Run the parent once over the windows."""
        batches = final_hidden_states(parent, windows_WT=windows_WT, batch_size=batch_size)
        return cls(head=parent.lm_head, hidden_WTD=torch.cat([hidden_BTD.cpu() for hidden_BTD in batches]))


@torch.inference_mode()
def sum_over_windows(
    model: HeterogeneousLlamaForCausalLM,
    *,
    windows_WT: Tensor,
    batch_size: int,
    parent: ParentText | None,
    on_batch: Callable[[], None] = lambda: None,
) -> WindowSums:
    """Return the sums of -log q(token), KL(p || q) and [argmax p = argmax q] over each window.

    q is the model, p the parent; without a parent the model is compared with itself: KL 0, agreement 1.
    """
    rows: list[tuple[float, float, float]] = []
    for hidden_BTD in final_hidden_states(model, windows_WT=windows_WT, batch_size=batch_size):
        for hidden_TD in hidden_BTD:
            targets_T = windows_WT[len(rows), 1:].to(model.device)
            parent_TD = None if parent is None else parent.hidden_WTD[len(rows)].to(model.device)
            rows.append(_sum_window(model.lm_head, hidden_TD, targets_T=targets_T, parent=parent, parent_TD=parent_TD))
        on_batch()
    nll_W, kl_W, agreements_W = torch.tensor(rows, dtype=torch.float64).T
    num_tokens_W = torch.full_like(nll_W, windows_WT.shape[1] - 1)
    return WindowSums(num_tokens_W=num_tokens_W, nll_W=nll_W, kl_W=kl_W, agreements_W=agreements_W)


def text_quality(sums: Sequence[WindowSums]) -> TextQuality:
    """Return the figures of one or more text sets together, every token counting the same.

    perplexity = exp(sum of -log q / tokens); its interval is that of the exponent, mapped.
    """

    def mean(take: Callable[[WindowSums], Tensor]) -> Estimate:
        return weighted_mean([list(zip(take(part).tolist(), part.num_tokens_W.tolist(), strict=True)) for part in sums])

    return TextQuality(
        num_tokens=int(sum(part.num_tokens_W.sum().item() for part in sums)),
        perplexity=mean(lambda part: part.nll_W).mapped(_exp),
        # Few windows make wide intervals; neither figure can leave its range. The value stands first: NaN stays NaN.
        kl_nats_per_token=mean(lambda part: part.kl_W).mapped(lambda kl: max(kl, 0.0)),
        top1_agreement=mean(lambda part: part.agreements_W).mapped(lambda share: min(max(share, 0.0), 1.0)),
    )


def _exp(nats: float) -> float:
    # A broken checkpoint may be beyond what a float holds; that is a finding, not a crash.
    return math.exp(nats) if not nats > 700 else math.inf


def _sum_window(
    head: nn.Module, hidden_TD: Tensor, *, targets_T: Tensor, parent: ParentText | None, parent_TD: Tensor | None
) -> tuple[float, float, float]:
    nll, kl, agreements = 0.0, 0.0, float(len(targets_T)) if parent is None else 0.0
    for start in range(0, len(targets_T), TOKENS_PER_CHUNK):
        chunk = slice(start, start + TOKENS_PER_CHUNK)
        # float32 before the softmax: bf16 logits of 49,152 entries lose the tail that KL sums over.
        log_q_TV = F.log_softmax(head(hidden_TD[chunk]).float(), dim=-1)
        nll += F.nll_loss(log_q_TV, targets_T[chunk], reduction="sum").item()
        if parent is not None and parent_TD is not None:
            log_p_TV = F.log_softmax(parent.head(parent_TD[chunk]).float(), dim=-1)
            agreements += (log_p_TV.argmax(dim=-1) == log_q_TV.argmax(dim=-1)).sum().item()
            difference_TV = log_p_TV - log_q_TV
            kl += (log_p_TV.exp_() * difference_TV).sum().item()
    return nll, kl, agreements
