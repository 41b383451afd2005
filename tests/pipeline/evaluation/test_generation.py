"""Left-padded batches against a greedy loop over one prompt at a time."""

import torch

from pipeline.evaluation.generation import Completion, complete_greedily
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40, 41], [100], [5, 200, 17, 90]]


def _one_by_one(
    model: HeterogeneousLlamaForCausalLM, prompt: list[int], max_new_tokens: int, stop_ids: tuple[int, ...]
) -> Completion:
    ids: list[int] = []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].argmax())
        if token in stop_ids:
            return Completion(ids=tuple(ids), has_ended=True)
        ids.append(token)
    return Completion(ids=tuple(ids), has_ended=False)


def test_greedy_batches_equal_one_prompt_at_a_time(other: HeterogeneousLlamaForCausalLM) -> None:
    wanted = [_one_by_one(other, prompt, 12, (2,)) for prompt in PROMPTS]
    assert complete_greedily(other, prompts=PROMPTS, stop_ids=(2,), max_new_tokens=12, batch_size=3) == wanted


def test_greedy_rows_end_at_the_first_of_several_stop_tokens(other: HeterogeneousLlamaForCausalLM) -> None:
    # The third token of the first row, made a stop token: that row must stop there and the others go on.
    token = _one_by_one(other, PROMPTS[0], 12, (2,)).ids[2]
    wanted = [_one_by_one(other, prompt, 12, (2, token)) for prompt in PROMPTS]
    got = complete_greedily(other, prompts=PROMPTS, stop_ids=(2, token), max_new_tokens=12, batch_size=4)
    assert got == wanted
    assert got[0].has_ended
    assert token not in got[0].ids
