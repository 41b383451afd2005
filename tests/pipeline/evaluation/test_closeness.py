"""Closeness of models on packed windows, against whole logits in float64."""

import math

import pytest
import torch

from pipeline.data.packed import IGNORED_LABEL, PackedTokens
from pipeline.evaluation import closeness
from pipeline.evaluation.closeness import Reference, compare
from tests.pipeline.model.builders import make_architecture, make_model, random_ids

TOKENS_NT = random_ids(11, batch_size=3)
LABELS_NT = TOKENS_NT.masked_fill(torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) < 0.3, IGNORED_LABEL)
PACKED = PackedTokens(
    tokens_NT=TOKENS_NT,
    labels_NT=LABELS_NT,
    position_ids_NT=torch.cat([torch.arange(6), torch.arange(5)]).expand(3, 11),
)


@torch.no_grad()
def test_models_with_heads_of_their_own_are_compared_as_by_whole_logits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(closeness, "SLICE_TOKENS", 4)
    model, *others = (make_model(make_architecture(), seed=seed) for seed in (0, 1, 2))
    found = compare(model, PACKED, [Reference.of(other, PACKED) for other in others])

    def outputs(one: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        # Without a cache, or transformers does not keep the samples of a window apart.
        inputs = {"input_ids": TOKENS_NT, "position_ids": PACKED.position_ids_NT, "use_cache": False}
        result = one(**inputs, output_hidden_states=True)
        return result.logits.double().log_softmax(-1), result.hidden_states[-1].double()

    log_q, hidden = outputs(model)
    taken = LABELS_NT[:, 1:] != IGNORED_LABEL
    nll = -log_q[:, :-1].gather(-1, TOKENS_NT[:, 1:, None])[..., 0][taken].mean()
    assert found.perplexity.value == pytest.approx(math.exp(nll), rel=1e-5)
    assert (found.perplexity.num_samples, found.num_tokens) == (3, 33)
    for other, got in zip(others, found.to_references, strict=True):
        log_p, other_hidden = outputs(other)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert got.kl_nats.value == pytest.approx(float(kl), rel=1e-5)
        assert got.kl_nats.low < got.kl_nats.value < got.kl_nats.high
        error = (hidden - other_hidden).norm() / other_hidden.norm()
        assert got.relative_output_error == pytest.approx(float(error), rel=1e-5)


def test_a_model_beside_itself_differs_in_nothing():
    model = make_model(make_architecture())
    (same,) = compare(model, PACKED, [Reference.of(model, PACKED)]).to_references
    assert (same.kl_nats.value, same.relative_output_error) == (0.0, 0.0)


def test_an_interval_of_two_windows_stays_where_divergences_are():
    model, other = make_model(make_architecture()), make_model(make_architecture())
    tokens_NT = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    two = PackedTokens(tokens_NT=tokens_NT, labels_NT=tokens_NT, position_ids_NT=torch.arange(4).expand(2, -1))
    with torch.no_grad():
        model.model.embed_tokens.weight[5:9] += 1.0  # the first window never looks there
    (got,) = compare(model, two, [Reference.of(other, two)]).to_references
    assert got.kl_nats.value > 0
    assert got.kl_nats.low == 0
