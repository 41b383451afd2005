"""Sampling: log-probabilities against uncached passes of each row, greedy against transformers, seeds, end tokens."""

import pytest
import torch

from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.model.sampling import (
    Completion,
    sample_completions,
    sample_tokens,
    seeded_generator,
)

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [20]]


def _sample(
    model: HeterogeneousLlamaForCausalLM, *, seed: int = 0, stop_ids: tuple[int, ...] = (2,)
) -> list[list[Completion]]:
    return sample_completions(
        model,
        PROMPTS,
        num_samples=24,
        max_new_tokens=40,
        temperature=1.3,
        top_p=1.0,
        stop_ids=stop_ids,
        generator=seeded_generator(seed, device="cpu"),
    )


def test_sample_completions_logprobs_equal_those_of_each_row_alone(model: HeterogeneousLlamaForCausalLM):
    groups = _sample(model)
    assert any(completion.is_terminated for group in groups for completion in group)
    assert len({len(completion.ids) for group in groups for completion in group}) > 2
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt, *completion.ids]])
            with torch.no_grad():
                logprobs = (model(ids).logits[0].double() / 1.3).log_softmax(dim=1)
            wanted = [logprobs[len(prompt) - 1 + place, id_].item() for place, id_ in enumerate(completion.ids)]
            assert completion.logprobs == pytest.approx(wanted, abs=1e-4)


def test_sample_completions_end_token_is_last_and_only_when_terminated(model: HeterogeneousLlamaForCausalLM):
    for group in _sample(model):
        for completion in group:
            assert completion.is_terminated == (completion.ids[-1] == 2)
            assert 2 not in completion.ids[:-1]
            assert completion.is_terminated or len(completion.ids) == 40


def test_sample_completions_end_with_any_of_several_stop_tokens(model: HeterogeneousLlamaForCausalLM):
    last = {completion.ids[-1] for group in _sample(model, stop_ids=(0, 2)) for completion in group}
    assert {0, 2} <= last
    for group in _sample(model, stop_ids=(0, 2)):
        for completion in group:
            assert completion.is_terminated == (completion.ids[-1] in (0, 2))
            assert not {0, 2} & set(completion.ids[:-1])


def test_sample_completions_same_seed_same_samples(model: HeterogeneousLlamaForCausalLM):
    assert _sample(model, seed=3) == _sample(model, seed=3)
    assert _sample(model, seed=3) != _sample(model, seed=4)


def test_sample_completions_near_zero_temperature_equals_greedy_generate(model: HeterogeneousLlamaForCausalLM):
    prompt = PROMPTS[1]
    ours = sample_completions(
        model,
        PROMPTS,
        num_samples=1,
        max_new_tokens=12,
        temperature=1e-4,
        top_p=1.0,
        stop_ids=(),
        generator=seeded_generator(0, device="cpu"),
    )[1][0]
    theirs = model.generate(  # pyright: ignore[reportAttributeAccessIssue] (its protocol asks for more than it uses)
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert isinstance(theirs, torch.Tensor)
    assert list(ours.ids) == theirs[0, len(prompt) :].tolist()


def test_sample_tokens_frequencies_follow_the_tempered_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = sample_tokens(
        logits.expand(20_000, 4), temperature=2.0, top_p=1.0, generator=seeded_generator(1, device="cpu")
    )
    wanted = (logits / 2).softmax(0)
    frequencies = torch.bincount(drawn.ids_B, minlength=4) / 20_000
    assert torch.allclose(frequencies, wanted, atol=0.015)
    assert torch.allclose(drawn.logprobs_B, wanted.log()[drawn.ids_B], atol=1e-6)


def test_sample_tokens_top_p_keeps_the_smallest_set_and_renormalises():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = sample_tokens(
        logits.expand(2_000, 4), temperature=1.0, top_p=0.7, generator=seeded_generator(1, device="cpu")
    )
    assert set(drawn.ids_B.tolist()) == {0, 1}
    assert torch.allclose(drawn.logprobs_B.exp(), torch.tensor([0.625, 0.375])[drawn.ids_B], atol=1e-6)


def test_sample_tokens_top_p_of_a_flat_distribution_keeps_its_share_of_a_large_vocabulary():
    logits = torch.randn(1, 2_000, generator=torch.Generator().manual_seed(0)) * 0.1
    probabilities = logits[0].softmax(0)
    order = probabilities.argsort(descending=True)
    num_kept = int((probabilities[order].cumsum(0) < 0.8).sum()) + 1
    drawn = sample_tokens(
        logits.expand(3_000, 2_000), temperature=1.0, top_p=0.8, generator=seeded_generator(2, device="cpu")
    )
    assert set(drawn.ids_B.tolist()) <= set(order[:num_kept].tolist())
    wanted = (probabilities / probabilities[order[:num_kept]].sum()).log()
    assert torch.allclose(drawn.logprobs_B, wanted[drawn.ids_B], atol=1e-5)
