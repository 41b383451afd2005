"""What a model says of sampled rows: rows that share a prompt's computation against each row in a pass of its own."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.reasoning.policy import SampledRow, batch_logprobs, batch_rows, by_prompt, row_statistics

PROMPTS = ((5, 6, 7), (8, 9, 10, 11, 12, 13, 14), (20,))
TEMPERATURE = 1.3


def _rows(*, num: int, longest: int, seed: int = 0) -> list[SampledRow]:
    """Rows of three prompts in no order."""
    rng = random.Random(seed)
    return [
        SampledRow(
            prompt_ids=rng.choice(PROMPTS),
            completion_ids=tuple(rng.choices(range(3, 60), k=rng.randint(1, longest))),
        )
        for _ in range(num)
    ]


def _alone(model: HeterogeneousLlamaForCausalLM, row: SampledRow) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a row from one plain pass over it."""
    logits_TV = model(torch.tensor([[*row.prompt_ids, *row.completion_ids]])).logits[0].double() / TEMPERATURE
    said = torch.distributions.Categorical(logits=logits_TV[len(row.prompt_ids) - 1 : -1])
    return said.log_prob(torch.tensor(row.completion_ids)), said.entropy()


@pytest.mark.parametrize(("num", "longest", "batch_size"), [(30, 9, 5), (30, 9, 30), (24, 120, 24), (3, 1, 3)])
def test_row_statistics_equal_those_of_each_row_alone(
    model: HeterogeneousLlamaForCausalLM, num: int, longest: int, batch_size: int
):
    rows = _rows(num=num, longest=longest)
    found = row_statistics(model, rows, temperature=TEMPERATURE, batch_size=batch_size, device=model.device)
    for row, statistics in zip(rows, found, strict=True):
        with torch.no_grad():
            logprobs, entropies = _alone(model, row)
        assert torch.allclose(statistics.logprobs.double(), logprobs, atol=1e-5)
        assert torch.allclose(statistics.entropies.double(), entropies, atol=1e-5)


def test_gradients_equal_those_of_rows_alone(model: HeterogeneousLlamaForCausalLM):
    rows = _rows(num=12, longest=7)
    batch = batch_rows(rows, device=model.device)
    weights = torch.randn(batch.sampled_BK.shape, generator=torch.Generator().manual_seed(1))
    (batch_logprobs(model, batch, temperature=TEMPERATURE) * weights).sum().backward()
    together = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    torch.stack(
        [(_alone(model, row)[0] * weights[place, : len(row.completion_ids)]).sum() for place, row in enumerate(rows)]
    ).sum().backward()
    alone = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        assert torch.allclose(gradient, alone[name], atol=1e-4 * float(alone[name].abs().max())), name


def test_batch_rows_shares_prompts_and_spreads_values():
    rows = [
        SampledRow(prompt_ids=(1, 2, 3), completion_ids=(4, 5)),
        SampledRow(prompt_ids=(6,), completion_ids=(7, 8, 9)),
        SampledRow(prompt_ids=(1, 2, 3), completion_ids=(4,)),
    ]
    batch = batch_rows(rows, device=torch.device("cpu"))
    assert batch.input_ids_GT.tolist() == [[1, 2, 3, 4, 5, 4], [0, 0, 6, 7, 8, 9]]
    assert batch.position_ids_GT.tolist() == [[0, 1, 2, 3, 4, 3], [0, 0, 0, 1, 2, 3]]
    last_of_first = batch.attended_G1TT[0, 0, -1].tolist()
    assert last_of_first == [True, True, True, False, False, True]
    assert batch.attended_G1TT[1, 0, -1].tolist() == [False, False, True, True, True, True]
    spread = batch.spread([torch.tensor([0.4, 0.5]), torch.tensor([0.7, 0.8, 0.9]), torch.tensor([0.2])])
    assert spread.tolist() == [pytest.approx([0.4, 0.5, 0]), pytest.approx([0.7, 0.8, 0.9]), pytest.approx([0.2, 0, 0])]


def test_completions_that_would_make_a_sequence_long_get_another():
    rows = [SampledRow(prompt_ids=(1, 2), completion_ids=(3,) * 200) for _ in range(5)]
    assert batch_rows(rows, device=torch.device("cpu")).input_ids_GT.shape == (3, 402)
    long = [SampledRow(prompt_ids=(1, 2), completion_ids=(3,) * 700)] * 2
    assert batch_rows(long, device=torch.device("cpu")).input_ids_GT.shape == (2, 702)


def test_by_prompt_makes_neighbours_of_equal_prompts_and_keeps_the_order_within():
    rows = _rows(num=20, longest=5)
    ordered = by_prompt(rows, row_of=lambda row: row)
    assert sorted(map(id, ordered)) == sorted(map(id, rows))
    changes = sum(one.prompt_ids != other.prompt_ids for one, other in itertools.pairwise(ordered))
    assert changes == len(PROMPTS) - 1
    for prompt in PROMPTS:
        assert [row for row in ordered if row.prompt_ids == prompt] == [row for row in rows if row.prompt_ids == prompt]
