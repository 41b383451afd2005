"""At which length of the cache the two phases of a generation are timed."""

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.model.heterogeneous import build_model
from pipeline.puzzle.timing import MAX_DECODE_STEPS, time_generation
from pipeline.recipe import Scenario
from tests.pipeline.puzzle.builders import make_architecture


@pytest.mark.parametrize(("generation_tokens", "num_steps", "first_cached"), [(4, 4, 12), (8, 8, 12), (28, 8, 22)])
def test_decode_steps_stand_in_the_middle_of_the_generation(generation_tokens: int, num_steps: int, first_cached: int):
    model = build_model(make_architecture(num_layers=2), dtype=torch.float32, seed=0)
    calls: list[tuple[int, int]] = []

    def note(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((kwargs["cache"].get_seq_length(), kwargs["input_ids"].shape[1]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    scenario = Scenario(name="chat", batch_size=2, prompt_tokens=12, generation_tokens=generation_tokens)
    timing = time_generation(model, scenario)

    assert calls[0] == (0, 12)
    steps = [call for call in calls[1:] if call[1] == 1][-num_steps:]
    assert [cached for cached, _ in steps] == list(range(first_cached, first_cached + num_steps))
    # As many steps of the generation lie before the timed ones as behind them.
    assert first_cached - 12 == 12 + generation_tokens - (first_cached + num_steps)
    assert timing.num_decode_steps == num_steps <= MAX_DECODE_STEPS
