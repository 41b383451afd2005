"""The roofline against bytes and FLOPs counted by hand, the released block times, and how each quantity must move."""

import itertools
import math

import pytest

from pipeline.architecture import LINEAR_ATTENTION, LINEAR_FFN, NO_ATTENTION, NO_FFN, gqa, swiglu
from pipeline.devices import DEVICES, Device
from pipeline.model.architecture_files import load_architecture
from pipeline.puzzle.roofline import (
    ALL_REDUCE_S,
    BANDWIDTH_EFFICIENCY,
    KERNEL_S,
    LINK_EFFICIENCY,
    MATMUL_EFFICIENCY,
    Pass,
    Setting,
    Work,
    attention_work,
    ffn_work,
    fixed_work,
    parent_times_ms,
    roofline_times,
    time_ms,
)
from pipeline.puzzle.search_space import resolve
from pipeline.recipe import ProfileConfig, Scenario, SearchSpaceConfig, ServedPrecision
from tests.pipeline.puzzle.builders import make_architecture

# Hidden 32, four query heads of 8, two key/value heads, FFN 64, 48 tokens in the vocabulary.
TINY = make_architecture()
CHAT = Scenario(name="chat", batch_size=2, prompt_tokens=10, generation_tokens=6)
H100 = DEVICES["h100-80gb"]


def setting(*, precision: ServedPrecision = "bf16", num_devices: int = 1) -> Setting:
    return Setting(device=H100, num_devices=num_devices, precision=precision)


def test_pass_counts_tokens_of_a_prefill_and_of_the_step_half_way():
    # Of 10 prompt tokens the first sees one, the last ten: 55 for each of the two prompts.
    assert Pass.of(CHAT, "prefill") == Pass(num_tokens=20, attended_tokens=110, cached_tokens_read=20, num_logits=2)
    # Half-way through six tokens, 13 are in the cache of each.
    assert Pass.of(CHAT, "decode") == Pass(num_tokens=2, attended_tokens=26, cached_tokens_read=26, num_logits=2)


def test_attention_decode_step_by_hand():
    work = attention_work(TINY, gqa(2), one=Pass.of(CHAT, "decode"), setting=setting())
    matrices = 32 * 32 + 32 * 16 + 32 * 16 + 32 * 32  # query, key, value, output
    assert work.flops == 2 * matrices * 2 + 4 * 32 * 26
    # The weights and the norm's; for each of two tokens its hidden vector in and out, queries and attention output
    # written and read; 32 cached values for each of 26 tokens read and 2 written.
    assert work.matmul_bytes == 2 * (matrices + 32) + 2 * 2 * (2 * 32 + 4 * 32) + 2 * 32 * (26 + 2)
    assert work.elementwise_bytes == 2 * 2 * 5 * 32
    assert (work.num_kernels, work.reduced_values) == (7, 2 * 32)


def test_attention_prefill_at_fp8_halves_weights_and_cache_and_not_activations():
    work = attention_work(TINY, gqa(2), one=Pass.of(CHAT, "prefill"), setting=setting(precision="fp8"))
    assert work.flops == 2 * 3072 * 20 + 4 * 32 * 110
    assert work.matmul_bytes == (3072 + 32) + 2 * 20 * (2 * 32 + 4 * 32) + 32 * (20 + 20)
    assert work.elementwise_bytes == 2 * 20 * 5 * 32


def test_ffn_linear_no_op_and_the_fixed_part_by_hand():
    one = Pass.of(CHAT, "decode")
    ffn = ffn_work(TINY, swiglu(64), one=one, setting=setting())
    assert ffn.flops == 2 * (3 * 32 * 64) * 2
    assert ffn.matmul_bytes == 2 * (3 * 32 * 64 + 32) + 2 * 2 * (2 * 32 + 3 * 64)
    assert ffn.elementwise_bytes == 2 * 2 * (5 * 32 + 3 * 64)
    linear = attention_work(TINY, LINEAR_ATTENTION, one=one, setting=setting())
    assert linear == ffn_work(TINY, LINEAR_FFN, one=one, setting=setting())
    assert linear.flops == 2 * 32 * 32 * 2
    assert linear.matmul_bytes == 2 * (32 * 32 + 32) + 2 * 2 * 2 * 32
    assert attention_work(TINY, NO_ATTENTION, one=one, setting=setting()) == Work()
    assert time_ms(ffn_work(TINY, NO_FFN, one=one, setting=setting()), setting=setting()) == 0.0
    fixed = fixed_work(TINY, one=one, setting=setting())
    assert fixed.flops == 2 * 48 * 32 * 2
    assert fixed.matmul_bytes == 2 * (48 + 1) * 32 + 2 * 2 * (32 + 48)


def test_prefill_wants_the_logits_of_each_last_token_alone():
    prefill, decode = (fixed_work(TINY, one=Pass.of(CHAT, phase), setting=setting()) for phase in ("prefill", "decode"))
    assert prefill.flops == decode.flops


@pytest.mark.parametrize(("precision", "peak"), [("fp32", 494.5e12), ("bf16", 989e12), ("fp8", 1978e12)])
def test_time_is_that_of_the_slower_resource_and_what_cannot_overlap(precision: ServedPrecision, peak: float):
    where = setting(precision=precision)
    at_peak, at_bandwidth = peak * MATMUL_EFFICIENCY, 3.35e12 * BANDWIDTH_EFFICIENCY
    computing = Work(
        flops=at_peak, matmul_bytes=0.5 * at_bandwidth, elementwise_bytes=0.1 * at_bandwidth, num_kernels=5
    )
    assert time_ms(computing, setting=where) == pytest.approx(1000 * (1 + 0.1 + 5 * KERNEL_S))
    reading = Work(flops=0.5 * at_peak, matmul_bytes=2 * at_bandwidth)
    assert time_ms(reading, setting=where) == pytest.approx(2000)


def test_devices_share_the_work_and_sum_over_their_links():
    one = Pass.of(CHAT, "decode")
    alone, two = setting(), setting(num_devices=2)
    whole, half = (ffn_work(TINY, swiglu(64), one=one, setting=where) for where in (alone, two))
    assert half.flops == whole.flops / 2
    assert half.matmul_bytes == 2 * (3 * 32 * 32 + 32) + 2 * 2 * (2 * 32 + 3 * 32)
    # With two devices each sends and receives once what is summed: 2 tokens x 32 values x 2 bytes.
    without = Work(
        flops=half.flops,
        matmul_bytes=half.matmul_bytes,
        elementwise_bytes=half.elementwise_bytes,
        num_kernels=half.num_kernels,
    )
    summing_ms = 1000 * (ALL_REDUCE_S + 128 / (450e9 * LINK_EFFICIENCY))
    assert time_ms(half, setting=two) == pytest.approx(time_ms(without, setting=two) + summing_ms)
    no_op = attention_work(TINY, NO_ATTENTION, one=one, setting=two)
    assert time_ms(no_op, setting=two) == 0.0


def test_more_devices_than_key_value_heads_hold_copies_of_them():
    one = Pass.of(CHAT, "decode")
    four = attention_work(TINY, gqa(2), one=one, setting=setting(num_devices=4))
    # One query head each, and on each one of the two key/value heads.
    matrices = 32 * 8 + 2 * 32 * 8 + 8 * 32
    assert four.flops == 2 * matrices * 2 + 4 * 8 * 26
    assert four.matmul_bytes == 2 * (matrices + 32) + 2 * 2 * (2 * 32 + 4 * 8) + 2 * 16 * (26 + 2)


RELEASED_ATTENTION_MS = 353.84
RELEASED_FFN_MS = {
    28672: 463.15,
    21504: 354.68,
    17920: 306.18,
    14336: 226.34,
    7168: 130.42,
    5632: 115.92,
    2816: 83.98,
}


def test_released_block_times_of_llama_70b_are_met_as_well_as_the_module_says():
    model = load_architecture("llama-3.3-70b-instruct")
    scenario = Scenario(name="released", batch_size=256, prompt_tokens=200, generation_tokens=1000)
    where = setting(precision="fp8")
    passes = [(1, Pass.of(scenario, "prefill")), (1000, Pass.of(scenario, "decode"))]
    attention = sum(
        times * time_ms(attention_work(model, gqa(8), one=one, setting=where), setting=where) for times, one in passes
    )
    ffn = {
        width: sum(
            times * time_ms(ffn_work(model, swiglu(width), one=one, setting=where), setting=where)
            for times, one in passes
        )
        for width in RELEASED_FFN_MS
    }
    errors = [ffn[width] / released - 1 for width, released in RELEASED_FFN_MS.items()]
    assert attention / RELEASED_ATTENTION_MS - 1 == pytest.approx(-0.139, abs=0.001)
    assert (min(errors), max(errors)) == pytest.approx((-0.077, 0.099), abs=0.001)
    assert (attention + ffn[28672]) / 816.97 - 1 == pytest.approx(-0.062, abs=0.001)
    errors.append(attention / RELEASED_ATTENTION_MS - 1)
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) == pytest.approx(0.074, abs=0.001)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("batch_size", [1, 64, 1024])
def test_time_never_falls_with_width_heads_context_or_batch(
    precision: ServedPrecision, num_devices: int, batch_size: int
):
    model = load_architecture("llama-3.1-8b-instruct")
    where = setting(precision=precision, num_devices=num_devices)
    for phase in ("prefill", "decode"):
        one, longer, larger = (
            Pass.of(Scenario(name="x", batch_size=batch, prompt_tokens=prompt, generation_tokens=128), phase)
            for batch, prompt in ((batch_size, 512), (batch_size, 2048), (2 * batch_size, 512))
        )
        ffn = [
            time_ms(ffn_work(model, spec, one=one, setting=where), setting=where)
            for spec in (NO_FFN, *(swiglu(256 * 2**power) for power in range(7)))
        ]
        attention = [
            time_ms(attention_work(model, spec, one=one, setting=where), setting=where)
            for spec in (NO_ATTENTION, *(gqa(heads) for heads in (1, 2, 4, 8)))
        ]
        for times in (ffn, attention):
            assert all(small <= large for small, large in itertools.pairwise(times))
            assert times[0] < times[-1]
        for more in (longer, larger):
            assert attention[-1] < time_ms(attention_work(model, gqa(8), one=more, setting=where), setting=where)


def test_roofline_times_key_every_variant_and_the_parent_is_their_sum():
    space = resolve(
        SearchSpaceConfig(attention=("parent", 1, "no_op"), ffn=("parent", 16), overrides=(), portable=False), TINY
    )
    profile = ProfileConfig(
        backend="roofline",
        device="h200-141gb",
        scenarios=(CHAT,),
        precision="bf16",
        served_precision="fp8",
        num_threads=1,
        warmups=1,
        repeats=1,
    )
    times = roofline_times(TINY, space, profile=profile)
    parts = {("attention", key) for key in ("kv2", "kv1", "no_op")} | {("ffn", "ffn64"), ("ffn", "ffn16")}
    assert set(times) == {("chat", phase, *key) for phase in ("prefill", "decode") for key in {*parts, ("fixed",) * 2}}
    sums = parent_times_ms(TINY, times)
    for phase in ("prefill", "decode"):
        layer = times["chat", phase, "attention", "kv2"] + times["chat", phase, "ffn", "ffn64"]
        assert sums["chat", phase] == pytest.approx(times["chat", phase, "fixed", "fixed"] + 3 * layer)


def test_rates_of_a_measured_device_count_whole():
    here = Device(name="here", peak_flops_per_s=1e9, bandwidth_bytes_per_s=1e8, memory_bytes=None, kernel_s=1e-5)
    work = Work(flops=3e6, matmul_bytes=1e5, elementwise_bytes=2e5, num_kernels=4)
    one = Setting(device=here, num_devices=1, precision="fp32")
    assert time_ms(work, setting=one) == pytest.approx(3.0 + 2.0 + 4 * 0.01)
