"""Limits against hand-made timings and hand-counted sizes, with and without the tolerance."""

import pytest

from pipeline.architecture import NO_ATTENTION, BlockSpec, swiglu
from pipeline.puzzle.measure import Measurements
from pipeline.puzzle.verification import check_model
from pipeline.recipe import Limit, ProfileConfig, Scenario
from tests.pipeline.report.builders import parent_architecture

PROFILE = ProfileConfig(
    backend="torch",
    scenarios=(Scenario(name="chat", batch_size=2, prompt_tokens=10, generation_tokens=5),),
    precision="bf16",
    served_precision="bf16",
    num_threads=1,
    warmups=1,
    repeats=5,
)
TIMES_MS = {"parent": {"prefill": 40.0, "decode": 4.0}, "final": {"prefill": 20.0, "decode": 2.5}}
MEASUREMENTS = Measurements(
    times_ms={
        (model, "chat", phase): (time_ms,) * 3
        for model, times in TIMES_MS.items()
        for phase, time_ms in times.items()
        if phase in ("prefill", "decode")
    },
    kv_bytes_per_token={"parent": 128, "final": 64},
)
PARENT = parent_architecture()
# As after fusion: four layers became three, the last one with both FFNs of its run and no attention.
FINAL = PARENT.with_blocks(
    [*PARENT.blocks[:2], BlockSpec(attention=NO_ATTENTION, ffn=swiglu(128), parent_layers=(2, 3))]
)
# Counted by hand: 320 x 32 embeddings and a final norm of 32; attention 32 x 32 x 2 + 32 x 16 x 2 and its norm of 32;
# FFN 3 x 32 x 64 and its norm of 32.
NUM_OUTSIDE, NUM_ATTENTION, NUM_FFN = 320 * 32 + 32, 2 * 32 * 32 + 2 * 32 * 16 + 32, 3 * 32 * 64 + 32
NUM_FINAL = NUM_OUTSIDE + 2 * (NUM_ATTENTION + NUM_FFN) + 3 * 32 * 128 + 32
NUM_PARENT = NUM_OUTSIDE + 4 * (NUM_ATTENTION + NUM_FFN)
KV_BYTES_FINAL = 2 * 2 * 2 * 8 * 2  # layers, keys and values, heads, values per head, bytes
DEVICE_BYTES = 300_000
HELD_MIB_FINAL = (2 * NUM_FINAL + KV_BYTES_FINAL * 2 * 15) / 2**20
HELD_MIB_PARENT = (2 * NUM_PARENT + 2 * KV_BYTES_FINAL * 2 * 15) / 2**20
# Twenty prompt tokens at two bytes a value, and cosines and sines of eight values for ten positions. The final model is
# widest in its last layer: embedding, input and normed input of 32, three of the FFN's 128. The parent everywhere: what
# attention returned as well, and three of 64.
POSITIONS_BYTES = 2 * 2 * 8 * 10
MEMORY_MIB_FINAL = HELD_MIB_FINAL + (20 * 2 * (3 * 32 + 3 * 128) + POSITIONS_BYTES) / 2**20
MEMORY_MIB_PARENT = HELD_MIB_PARENT + (20 * 2 * (4 * 32 + 3 * 64) + POSITIONS_BYTES) / 2**20


@pytest.mark.parametrize(
    ("quantity", "relative_to", "measured"),
    [
        ("decode_speed", "parent", 1.6),
        ("decode_speed", "absolute", 800.0),
        ("prefill_speed", "parent", 2.0),
        ("prefill_speed", "absolute", 1000.0),
        ("latency_ms", "absolute", 20 + 5 * 2.5),
        ("latency_ms", "parent", (20 + 5 * 2.5) / (40 + 5 * 4)),
        ("throughput", "absolute", 2 * 15 / (0.020 + 5 * 0.0025)),
        ("throughput", "parent", (40 + 5 * 4) / (20 + 5 * 2.5)),
        ("time_to_first_token_ms", "absolute", 20.0),
        ("time_to_first_token_ms", "parent", 0.5),
        ("cached_tokens", "absolute", (DEVICE_BYTES - 2 * NUM_FINAL) / KV_BYTES_FINAL),
        ("memory_mib", "absolute", MEMORY_MIB_FINAL),
        ("memory_mib", "parent", MEMORY_MIB_FINAL / MEMORY_MIB_PARENT),
        ("weights_and_cache_mib", "absolute", HELD_MIB_FINAL),
        ("weights_and_cache_mib", "parent", HELD_MIB_FINAL / HELD_MIB_PARENT),
        ("num_parameters", "absolute", NUM_FINAL),
        ("num_parameters", "parent", NUM_FINAL / NUM_PARENT),
        ("kv_bytes_per_token", "absolute", KV_BYTES_FINAL),
        ("kv_bytes_per_token", "parent", 0.5),
    ],
)
def test_check_model_measures_each_quantity_and_forgives_timings_alone(
    quantity: str, relative_to: str, measured: float
) -> None:
    is_counted = quantity in ("cached_tokens", "num_parameters", "kv_bytes_per_token")
    is_timed = not is_counted and quantity not in ("memory_mib", "weights_and_cache_mib")
    at_bound = Limit.model_validate(
        {
            "quantity": quantity,
            "scenario": None if is_counted else "chat",
            "bound": measured,
            "relative_to": relative_to,
            "device_memory_gb": DEVICE_BYTES / 1e9 if quantity == "cached_tokens" else None,
        }
    )
    is_lower_bound = quantity in ("decode_speed", "prefill_speed", "throughput", "cached_tokens")
    harder = 1.04 if is_lower_bound else 1 / 1.04
    limits = [at_bound.model_copy(update={"bound": measured * harder**power}) for power in (0, 1, 2)]
    at, near, far = check_model(
        limits,
        MEASUREMENTS,
        model="final",
        architecture=FINAL,
        parent=PARENT,
        profile=PROFILE,
        tolerance=0.05,
    )
    assert at.measured == pytest.approx(measured)
    assert (at.is_met, at.needs_tolerance) == (True, False)
    assert (near.is_met, near.needs_tolerance) == (is_timed, is_timed)
    assert (far.is_met, far.needs_tolerance) == (False, False)


def test_check_model_counts_what_four_devices_hold_together() -> None:
    """Each of the two layers with attention has two key/value heads, and each device holds one."""
    profile = PROFILE.model_copy(update={"backend": "roofline", "device": "h100-80gb", "tensor_parallel_size": 4})
    kv_bytes, weights_bytes = 2 * KV_BYTES_FINAL, 2 * (NUM_FINAL + 2 * 2 * 32 * 2 * 8)
    wanted = {
        "kv_bytes_per_token": kv_bytes,
        "cached_tokens": (DEVICE_BYTES - weights_bytes) / kv_bytes,
        "weights_and_cache_mib": (weights_bytes + 2 * 15 * kv_bytes) / 2**20,
        "num_parameters": NUM_FINAL,
    }
    limits = [
        Limit.model_validate(
            {
                "quantity": quantity,
                "scenario": "chat" if quantity == "weights_and_cache_mib" else None,
                "bound": bound,
                "relative_to": "absolute",
                "device_memory_gb": DEVICE_BYTES / 1e9 if quantity == "cached_tokens" else None,
            }
        )
        for quantity, bound in wanted.items()
    ]
    found = check_model(
        limits, MEASUREMENTS, model="final", architecture=FINAL, parent=PARENT, profile=profile, tolerance=0.05
    )
    assert [one.measured for one in found] == pytest.approx(list(wanted.values()))
