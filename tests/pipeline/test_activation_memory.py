"""Activations in closed form against the tensors that a built model holds at once, and against counts by hand."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from pipeline import costs
from pipeline.architecture import (
    LINEAR_ATTENTION,
    LINEAR_FFN,
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    AttentionSpec,
    FFNSpec,
    gqa,
    swiglu,
)
from pipeline.model.heterogeneous import build_model
from tests.pipeline.model.builders import make_architecture, make_blocks

PLAIN = (gqa(2), swiglu(8))
# In each the widest layer is behind another one: the first layer's input is the embedding, a tensor less.
MODELS: dict[str, list[tuple[AttentionSpec, FFNSpec]]] = {
    "wide FFN": [PLAIN, (gqa(2), swiglu(512))],
    "wide FFN without attention": [PLAIN, (gqa(2), swiglu(20)), (NO_ATTENTION, swiglu(512))],
    "attention of many key/value heads": [PLAIN, (gqa(4), swiglu(8))],
    "attention of one key/value head": [(gqa(1), swiglu(8)), (gqa(1), swiglu(8))],
    "linear": [(LINEAR_ATTENTION, LINEAR_FFN), (LINEAR_ATTENTION, LINEAR_FFN)],
}


class LiveTensors(TorchDispatchMode):
    """Follows every storage that an operation makes until it is freed; keeps the most bytes there were at once."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Count this one no longer."""
        self._sizes.pop(tensor.untyped_storage()._cdata, None)
        self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, storage._cdata, None)
        self.peak_bytes = max(self.peak_bytes, sum(self._sizes.values()))
        return result


class UncountedCache(DynamicCache):
    """A cache whose tensors are not counted: costs counts them apart."""

    def __init__(self, live: LiveTensors) -> None:
        super().__init__()
        self._live = live

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Update, and count what came of it no longer."""
        keys, values = super().update(*args, **kwargs)
        for tensor in (keys, values):
            self._live.leave_out(tensor)
        return keys, values


def measured_peak_bytes(architecture: Architecture, *, batch_size: int, prompt_tokens: int, dtype: torch.dtype) -> int:
    model = build_model(architecture, dtype=dtype, seed=0)
    prompt_BT = torch.zeros(batch_size, prompt_tokens, dtype=torch.long)
    live = LiveTensors([*model.parameters(), *model.buffers(), prompt_BT])
    with torch.inference_mode(), live:
        model(input_ids=prompt_BT, cache=UncountedCache(live), use_cache=True, logits_to_keep=1)
    return live.peak_bytes


def counted_bytes(
    architecture: Architecture, *, batch_size: int, prompt_tokens: int, value_bytes: float, num_devices: int = 1
) -> float:
    return costs.served_memory(
        architecture,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        generation_tokens=3,
        bytes_per_value=value_bytes,
        num_devices=num_devices,
    ).activation_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch_size", "prompt_tokens"), [(1, 40), (3, 17)])
@pytest.mark.parametrize("head_dim", [8, 12])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_the_most_that_a_built_model_holds(
    name: str, head_dim: int, batch_size: int, prompt_tokens: int, dtype: torch.dtype
):
    architecture = make_architecture(blocks=make_blocks(*MODELS[name]), head_dim=head_dim)
    found = measured_peak_bytes(architecture, batch_size=batch_size, prompt_tokens=prompt_tokens, dtype=dtype)
    value_bytes = 4.0 if dtype == torch.float32 else 2.0
    counted = counted_bytes(architecture, batch_size=batch_size, prompt_tokens=prompt_tokens, value_bytes=value_bytes)
    # Left out: positions, and a mean and a root per token in each norm, which weigh at a hidden size of 32.
    assert 0.96 * found <= counted <= found


def test_logits_are_the_peak_of_a_large_vocabulary_behind_short_prompts():
    architecture = make_architecture(blocks=make_blocks(PLAIN), vocab_size=50_000)
    counted = counted_bytes(architecture, batch_size=3, prompt_tokens=2, value_bytes=4.0)
    assert counted == 4 * (3 * 50_000 + 3 * 2 * 32)
    assert counted <= measured_peak_bytes(architecture, batch_size=3, prompt_tokens=2, dtype=torch.float32)


def test_a_layer_that_is_left_out_and_a_decode_step_hold_less_than_the_final_norm():
    architecture = make_architecture(blocks=make_blocks((NO_ATTENTION, NO_FFN)), vocab_size=10)
    # Embedding and last hidden state, two in fp32, and the cosines and sines of 16 positions.
    assert counted_bytes(architecture, batch_size=2, prompt_tokens=16, value_bytes=2.0) == (
        2 * 16 * 32 * (2 * 2 + 2 * 4) + 2 * 2 * 8 * 16
    )


def test_activations_of_llama_70b_at_fp8_on_two_devices_equal_a_count_by_hand():
    architecture = make_architecture(
        hidden_size=8192, num_attention_heads=64, head_dim=128, blocks=make_blocks((gqa(8), swiglu(28672)))
    )
    one = {"batch_size": 16, "prompt_tokens": 500, "value_bytes": 1.0}
    # Four hidden vectors on each device, gate, up and their product split over all; 16 bits each beside FP8 weights.
    cosines_and_sines = 2 * 2 * 128 * 500
    assert counted_bytes(architecture, **one) == 2 * 8000 * (4 * 8192 + 3 * 28672) + cosines_and_sines
    assert (
        counted_bytes(architecture, **one, num_devices=2)
        == 2 * 8000 * (2 * 4 * 8192 + 3 * 28672) + 2 * cosines_and_sines
    )


def test_keys_and_values_of_more_devices_than_heads_are_computed_on_each():
    architecture = make_architecture(blocks=make_blocks((gqa(1), swiglu(8))), head_dim=16)
    counted = counted_bytes(architecture, batch_size=2, prompt_tokens=16, value_bytes=4.0, num_devices=4)
    # On each of four devices: embedding, input and its normed one, cosines and sines. Over them: queries, keys and
    # values of a head on each, and to turn them three more of the queries, or one of these and three of the keys.
    queries, both = 4 * 16, 4 * 2 * 16
    turning = max(3 * queries, queries + 3 * both / 2)
    assert counted == 4 * (2 * 16 * (4 * 3 * 32 + queries + both + turning) + 4 * 2 * 16 * 16)


def test_the_parts_of_served_memory_add_up():
    architecture = make_architecture(blocks=make_blocks(PLAIN, (NO_ATTENTION, swiglu(48))))
    memory = costs.served_memory(
        architecture, batch_size=2, prompt_tokens=5, generation_tokens=3, bytes_per_value=2.0, num_devices=1
    )
    assert memory.weights_bytes == 2 * costs.num_parameters(architecture)
    assert memory.cache_bytes == 2 * (5 + 3) * (2 * 2 * 8 * 2)  # one layer, keys and values of two heads of 8
    assert memory.weights_and_cache_mib == (memory.weights_bytes + memory.cache_bytes) / 2**20
    assert memory.total_mib == memory.weights_and_cache_mib + memory.activation_bytes / 2**20
