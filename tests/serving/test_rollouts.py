"""vLLM samples from the policy as it is now, says with which probabilities, and repeats itself for the same seed."""

from pathlib import Path

import pytest
import torch

from pipeline.architecture import NO_ATTENTION, NO_FFN, gqa, swiglu
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.model.sampling import Completion
from pipeline.reasoning.samplers import VLLMSampler
from tests.pipeline.model.builders import make_architecture, make_blocks
from tests.serving.cases import SHAPE, write_case

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1800)]

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
STOP_IDS = (40, 41)
TEMPERATURE = 1.3
# No attention in layer 0, an odd width and an empty layer: what is served is another architecture than what is trained.
BLOCKS = make_blocks((NO_ATTENTION, swiglu(300)), (gqa(4), swiglu(512)), (NO_ATTENTION, NO_FFN), (gqa(2), NO_FFN))


def assert_probabilities(model: HeterogeneousLlamaForCausalLM, groups: list[list[Completion]]) -> None:
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *completion.ids]])).logits[0]
            logprobs = (logits.double() / TEMPERATURE).log_softmax(dim=1)
            wanted = [logprobs[len(prompt) - 1 + place, id_].item() for place, id_ in enumerate(completion.ids)]
            assert completion.logprobs == pytest.approx(wanted, abs=1e-3)


def test_vllm_samples_the_policy_and_its_changes(tmp_path: Path):
    model = write_case(tmp_path / "policy", make_architecture(**SHAPE, blocks=BLOCKS))

    with VLLMSampler(
        model,
        tokenizer_dir=tmp_path / "policy",
        work_dir=tmp_path / "work",
        precision="fp32",
        max_tokens=64,
        num_rows=32,
        num_threads=1,
    ) as sampler:

        def sample(seed: int) -> list[list[Completion]]:
            return sampler.sample(
                PROMPTS,
                num_samples=16,
                max_new_tokens=24,
                temperature=TEMPERATURE,
                stop_ids=STOP_IDS,
                seed=("rollout", seed),
            )

        first = sample(1)
        assert [len(group) for group in first] == [16, 16]
        assert_probabilities(model, first)
        completions = [completion for group in first for completion in group]
        assert {completion.is_terminated for completion in completions} == {True, False}
        for completion in completions:
            assert completion.is_terminated == (completion.ids[-1] in STOP_IDS)
            assert not set(STOP_IDS) & set(completion.ids[:-1])
            assert completion.is_terminated or len(completion.ids) == 24
        assert len({completion.ids for completion in completions}) > 20
        assert sample(1) == first
        assert sample(2) != first

        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" not in name:
                    weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
        sampler.refresh()
        changed = sample(1)
        assert_probabilities(model, changed)
        with pytest.raises(AssertionError):  # the change is one that the comparison sees
            assert_probabilities(model, first)
    assert not (tmp_path / "work" / "weights").exists()
