"""Perplexity against transformers' own loss, KL against torch.distributions, windows against their definition."""

import dataclasses
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from pipeline.errors import DataError
from pipeline.evaluation.perplexity import ParentText, WindowSums, cut_windows, sum_over_windows, text_quality
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM


def _windows(num_windows: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(3, 250, (num_windows, num_tokens + 1), generator=torch.Generator().manual_seed(0))


def test_perplexity_equals_loss_of_transformers(other: HeterogeneousLlamaForCausalLM) -> None:
    windows_WT = _windows(5, 24)
    quality = text_quality([sum_over_windows(other, windows_WT=windows_WT, batch_size=2, parent=None)])
    loss = other(input_ids=windows_WT, labels=windows_WT).loss.item()
    assert quality.perplexity.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert quality.num_tokens == 5 * 24
    assert quality.perplexity.num_samples == 5
    assert quality.perplexity.low < quality.perplexity.value < quality.perplexity.high


def test_kl_equals_torch_distributions(
    parent: HeterogeneousLlamaForCausalLM, other: HeterogeneousLlamaForCausalLM
) -> None:
    windows_WT = _windows(3, 300)  # longer than one chunk of logits
    parent_text = ParentText.of(parent, windows_WT=windows_WT, batch_size=2)
    quality = text_quality([sum_over_windows(other, windows_WT=windows_WT, batch_size=2, parent=parent_text)])
    with torch.no_grad():
        p_BTV = parent(input_ids=windows_WT[:, :-1]).logits.double()
        q_BTV = other(input_ids=windows_WT[:, :-1]).logits.double()
    wanted = kl_divergence(Categorical(logits=p_BTV), Categorical(logits=q_BTV)).mean().item()
    agreement = (p_BTV.argmax(-1) == q_BTV.argmax(-1)).double().mean().item()
    assert quality.kl_nats_per_token.value == pytest.approx(wanted, rel=1e-4)
    assert quality.top1_agreement.value == pytest.approx(agreement)


def test_kl_of_the_parent_to_itself_is_zero(parent: HeterogeneousLlamaForCausalLM) -> None:
    windows_WT = _windows(2, 16)
    parent_text = ParentText.of(parent, windows_WT=windows_WT, batch_size=2)
    measured = text_quality([sum_over_windows(parent, windows_WT=windows_WT, batch_size=2, parent=parent_text)])
    assumed = text_quality([sum_over_windows(parent, windows_WT=windows_WT, batch_size=2, parent=None)])
    assert measured == assumed
    assert (measured.kl_nats_per_token.value, measured.top1_agreement.value) == (0.0, 1.0)


def test_text_quality_of_two_sets_weighs_by_tokens(other: HeterogeneousLlamaForCausalLM) -> None:
    long = sum_over_windows(other, windows_WT=_windows(4, 30), batch_size=4, parent=None)
    short = sum_over_windows(other, windows_WT=_windows(2, 10), batch_size=4, parent=None)
    nll = long.nll_W.sum() + short.nll_W.sum()
    assert text_quality([long, short]).perplexity.value == pytest.approx(math.exp(nll.item() / 140))


def test_text_quality_of_a_broken_checkpoint_is_nan_and_not_zero() -> None:
    nan_W = torch.tensor([math.nan, math.nan], dtype=torch.float64)
    broken = WindowSums(num_tokens_W=torch.tensor([4.0, 4.0]), nll_W=nan_W, kl_W=nan_W, agreements_W=nan_W)
    quality = text_quality([broken])
    for found in (quality.perplexity, quality.kl_nats_per_token, quality.top1_agreement):
        assert math.isnan(found.value)
    overflowing = dataclasses.replace(broken, nll_W=torch.tensor([4000.0, 8000.0], dtype=torch.float64))
    assert text_quality([overflowing]).perplexity.value == math.inf


def test_cut_windows_predicts_each_token_once() -> None:
    windows_WT = cut_windows([[5, 6, 7], [8, 9]], separator=0, sequence_length=2, max_tokens=100)
    assert windows_WT.tolist() == [[5, 6, 7], [7, 0, 8], [8, 9, 0]]


def test_cut_windows_keeps_to_the_budget() -> None:
    windows_WT = cut_windows([range(100)], separator=0, sequence_length=8, max_tokens=20)
    assert windows_WT.shape == (2, 9)


def test_cut_windows_spreads_over_all_documents() -> None:
    documents = [[number] * 9 for number in range(1, 101)]  # with its separator ten tokens each
    windows_WT = cut_windows(documents, separator=0, sequence_length=10, max_tokens=50)
    assert windows_WT[:, 0].tolist() == [10, 30, 50, 70, 90]
    whole_WT = cut_windows(documents, separator=0, sequence_length=10, max_tokens=10_000)
    assert whole_WT[:, 0].tolist() == list(range(1, 100))


def test_cut_windows_short_text_is_one_short_window() -> None:
    assert cut_windows([[5, 6]], separator=0, sequence_length=8, max_tokens=20).tolist() == [[5, 6, 0]]


def test_cut_windows_empty_text_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2"):
        cut_windows([], separator=0, sequence_length=8, max_tokens=20)
