"""Prefill and decode time of every subblock variant on a device, in closed form from its rates. Pure.

    time = max(FLOPs / (peak * MATMUL_EFFICIENCY), bytes / (bandwidth * BANDWIDTH_EFFICIENCY))
         + elementwise bytes / (bandwidth * BANDWIDTH_EFFICIENCY) + kernels * KERNEL_S + all-reduce

FLOPs are two per weight and token, and four per query value and attended token. Bytes are those that the matmuls and
the attention itself move: weights once, their inputs and outputs, cached keys and values. Norms, residual sums and the
gate of the FFN run between matmuls, not beside them, so what they move is added. Prefill is one pass over every prompt
of the batch; decode is one step of the whole batch, half-way through the generation.

The three constants are fitted to the released block library of Llama-3.3-70B (NVlabs/puzzle: one H100 80 GB, FP8, batch
256, 1,200 tokens), read as 200 prompt and 1,000 generated tokens: the whole block comes out at -6%, attention at -14%,
the seven FFN widths between -8 and +10%, the root of the mean square is 7.4%. What is left is kernels and not the
roofline: the measured times are not linear in the width (half of it takes 0.49 of the time, 62% takes 0.66). Fitted
anew for each split, 50 to 300 prompt tokens fit alike (7.3 to 7.5%), 600 worse (8.9%), 1,000 badly (14%): the table
says that the 1,200 tokens were mostly generated, not how many. tests/pipeline/puzzle/test_roofline.py has the figures.

Of a machine that measured itself (pipeline.puzzle.devices) peak and bandwidth are what it reached and count whole, and
KERNEL_S is its own. The numbers of kernels stay those of fused ones: eager PyTorch runs more of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.architecture import Architecture, AttentionSpec, FFNSpec
from pipeline.costs import (
    BYTES_PER_PARAMETER,
    LEAST_ACTIVATION_BYTES,
    attention_parameters,
    ffn_parameters,
    kv_values_per_token,
)
from pipeline.devices import DEVICES, Device
from pipeline.puzzle.calibration import PHASES, Phase
from pipeline.puzzle.predictions import FIXED
from pipeline.puzzle.search_space import SearchSpace
from pipeline.recipe import ProfileConfig, Scenario, ServedPrecision

# Of the dense peak, what large matmuls are commonly seen to reach; assumed, not fitted. The library's FFNs are bound by
# bandwidth at 256 rows and say little of it: with 0.6 or 0.98 the root of the mean square is 7.6 or 6.9%.
MATMUL_EFFICIENCY = 0.7
# Of the bandwidth, while weights and caches are read once each; fitted together with KERNEL_S.
BANDWIDTH_EFFICIENCY = 0.64
# Launch, ramp-up and tail of one kernel inside a CUDA graph. The time of the narrowest FFN is mostly this.
KERNEL_S = 4e-6
# Norm, query-key-value matmul, rotation and cache write, attention, its reduction over splits, output matmul, sum.
ATTENTION_KERNELS = 7
FFN_KERNELS = 5  # norm, gate and up matmul, gating, down matmul, sum
LINEAR_KERNELS = 3  # norm, matmul, sum
FIXED_KERNELS = 4  # look-up, norm, head, choice of the token
# Shares of the links' data-sheet figure: 366 of 450 GB/s is what NCCL's own test is reported to reach on H100s.
LINK_EFFICIENCY = 0.8
# A small all-reduce within a node, by one kernel that reads its peers' memory; assumed, not fitted.
ALL_REDUCE_S = 10e-6
# Tensor cores by precision, against bf16: fp32 matrices are multiplied as TF32.
PEAK_AGAINST_BF16: Mapping[ServedPrecision, float] = {"fp32": 0.5, "bf16": 1.0, "fp8": 2.0}

ProfileKey = tuple[str, Phase, str, str]  # scenario, phase, part, variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One forward pass over a batch: the tokens that enter, how many they attend to, and what of the cache is read.

    `attended_tokens` is summed over entering tokens, `cached_tokens_read` over sequences; `num_logits` counts the
    tokens whose logits are wanted.
    """

    num_tokens: float
    attended_tokens: float
    cached_tokens_read: float
    num_logits: float

    @classmethod
    def of(cls, scenario: Scenario, phase: Phase) -> "Pass":
        """Return the prefill of a scenario, or its decode step half-way through."""
        batch, prompt = scenario.batch_size, scenario.prompt_tokens
        if phase == "prefill":
            return cls(
                num_tokens=batch * prompt,
                attended_tokens=batch * prompt * (prompt + 1) / 2,
                cached_tokens_read=batch * prompt,
                num_logits=batch,
            )
        context = batch * (prompt + scenario.generation_tokens / 2)
        return cls(num_tokens=batch, attended_tokens=context, cached_tokens_read=context, num_logits=batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one subblock costs one device in one pass; `reduced_values` are summed over the devices that share it."""

    flops: float = 0.0
    matmul_bytes: float = 0.0
    elementwise_bytes: float = 0.0
    num_kernels: int = 0
    reduced_values: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Where and how a model is served: the device, how many share the model, and the precision."""

    device: Device
    num_devices: int
    precision: ServedPrecision

    @classmethod
    def of(cls, profile: ProfileConfig, device: Device | None = None) -> "Setting":
        """Return the setting of a profile whose backend is `roofline`; `device` where it is no named one."""
        assert profile.device is not None
        return cls(
            device=device or DEVICES[profile.device],
            num_devices=profile.num_devices,
            precision=profile.served_precision,
        )

    @property
    def value_bytes(self) -> float:
        """Bytes of a weight or a cached value."""
        return BYTES_PER_PARAMETER[self.precision]

    @property
    def peak_flops_per_s(self) -> float:
        """What matmuls reach: a share of a data sheet's peak, or what was measured."""
        peak = self.device.peak_flops_per_s
        return peak if self._is_measured else peak * PEAK_AGAINST_BF16[self.precision] * MATMUL_EFFICIENCY

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """What weights and caches are read at."""
        bandwidth = self.device.bandwidth_bytes_per_s
        return bandwidth if self._is_measured else bandwidth * BANDWIDTH_EFFICIENCY

    @property
    def kernel_s(self) -> float:
        """What a kernel takes beyond its work."""
        return KERNEL_S if self.device.kernel_s is None else self.device.kernel_s

    @property
    def _is_measured(self) -> bool:
        return self.device.kernel_s is not None

    @property
    def activation_bytes(self) -> float:
        """Bytes of a value on its way from one kernel to the next."""
        return max(LEAST_ACTIVATION_BYTES, self.value_bytes)


def attention_work(model: Architecture, spec: AttentionSpec, *, one: Pass, setting: Setting) -> Work:
    """Return the work of one attention subblock with its norm and residual sum, on one of the devices.

    Query heads are split over the devices; so are key/value heads, down to one on each (pipeline.costs).
    """
    hidden, size = model.hidden_size, setting.activation_bytes
    if spec.kind != "gqa":
        return _linear_work(model, attention_parameters(model, spec), spec.kind, one=one, setting=setting)
    queries = model.num_attention_heads * model.head_dim / setting.num_devices
    kv_values = kv_values_per_token(model, spec, num_devices=setting.num_devices) / setting.num_devices
    matrices = (attention_parameters(model, spec, num_devices=setting.num_devices) - hidden) / setting.num_devices
    # Hidden vectors in and out; queries written and read, attention output written and read.
    moved = size * one.num_tokens * (2 * hidden + 4 * queries)
    cached = setting.value_bytes * kv_values * (one.num_tokens + one.cached_tokens_read)
    return Work(
        flops=2 * matrices * one.num_tokens + 4 * queries * one.attended_tokens,
        matmul_bytes=setting.value_bytes * (matrices + hidden) + moved + cached,
        elementwise_bytes=_norm_and_sum_bytes(model, one=one, setting=setting),
        num_kernels=ATTENTION_KERNELS,
        reduced_values=hidden * one.num_tokens,
    )


def ffn_work(model: Architecture, spec: FFNSpec, *, one: Pass, setting: Setting) -> Work:
    """Return the work of one FFN subblock with its norm and residual sum, on one of the devices."""
    hidden, size = model.hidden_size, setting.activation_bytes
    if spec.kind != "swiglu":
        return _linear_work(model, ffn_parameters(model, spec), spec.kind, one=one, setting=setting)
    assert spec.intermediate_size is not None
    width = spec.intermediate_size / setting.num_devices
    matrices = (ffn_parameters(model, spec) - hidden) / setting.num_devices
    # Hidden vectors in and out; gate and up written, their product read. Gating reads the two and writes the product.
    return Work(
        flops=2 * matrices * one.num_tokens,
        matmul_bytes=setting.value_bytes * (matrices + hidden) + size * one.num_tokens * (2 * hidden + 3 * width),
        elementwise_bytes=_norm_and_sum_bytes(model, one=one, setting=setting) + size * one.num_tokens * 3 * width,
        num_kernels=FFN_KERNELS,
        reduced_values=hidden * one.num_tokens,
    )


def fixed_work(model: Architecture, *, one: Pass, setting: Setting) -> Work:
    """Return the work outside the layers: the look-up, the final norm, and the logits that are wanted."""
    hidden, size = model.hidden_size, setting.activation_bytes
    rows = model.vocab_size / setting.num_devices
    looked_up = (setting.value_bytes + size) * one.num_tokens * hidden
    return Work(
        flops=2 * rows * hidden * one.num_logits,
        matmul_bytes=setting.value_bytes * (rows + 1) * hidden + size * one.num_logits * (hidden + rows),
        elementwise_bytes=looked_up + size * one.num_logits * (2 * hidden + rows),
        num_kernels=FIXED_KERNELS,
        reduced_values=hidden * one.num_tokens,
    )


def time_ms(work: Work, *, setting: Setting) -> float:
    """Return how long one device takes for its work and, where several share it, for the sum over them."""
    bandwidth = setting.bandwidth_bytes_per_s
    seconds = max(work.flops / setting.peak_flops_per_s, work.matmul_bytes / bandwidth)
    seconds += work.elementwise_bytes / bandwidth + work.num_kernels * setting.kernel_s
    if setting.num_devices > 1 and work.reduced_values:
        assert setting.device.link_bytes_per_s is not None
        # Each device sends and receives 2 (n - 1) / n of what is summed (ring, or scatter and gather).
        sent = 2 * (setting.num_devices - 1) / setting.num_devices * setting.activation_bytes * work.reduced_values
        seconds += ALL_REDUCE_S + sent / (setting.device.link_bytes_per_s * LINK_EFFICIENCY)
    return 1000.0 * seconds


def roofline_times(
    model: Architecture, space: SearchSpace, *, profile: ProfileConfig, device: Device | None = None
) -> dict[ProfileKey, float]:
    """Return the milliseconds of every distinct variant and of what is outside the layers.

    `device` is the measured one where the profile names this machine.
    """
    setting = Setting.of(profile, device)
    return {
        (scenario.name, phase, part, variant): time_ms(work, setting=setting)
        for scenario in profile.scenarios
        for phase in PHASES
        for part, variant, work in _all_work(model, space, one=Pass.of(scenario, phase), setting=setting)
    }


def parent_times_ms(model: Architecture, times_ms: Mapping[ProfileKey, float]) -> dict[tuple[str, Phase], float]:
    """Return the parent's own sum by scenario and phase: a roofline's parent takes what its blocks take."""
    return {
        (scenario, phase): fixed_ms
        + sum(
            times_ms[scenario, phase, "attention", block.attention.key]
            + times_ms[scenario, phase, "ffn", block.ffn.key]
            for block in model.blocks
        )
        for (scenario, phase, part, _), fixed_ms in times_ms.items()
        if part == FIXED
    }


def _all_work(
    model: Architecture, space: SearchSpace, *, one: Pass, setting: Setting
) -> Iterator[tuple[str, str, Work]]:
    for attention in space.distinct_attention:
        yield "attention", attention.key, attention_work(model, attention, one=one, setting=setting)
    for ffn in space.distinct_ffn:
        yield "ffn", ffn.key, ffn_work(model, ffn, one=one, setting=setting)
    yield FIXED, FIXED, fixed_work(model, one=one, setting=setting)


def _linear_work(model: Architecture, parameters: int, kind: str, *, one: Pass, setting: Setting) -> Work:
    """Return the work of one hidden x hidden matrix with its norm and sum; none for a no-op."""
    if kind == "no_op":
        return Work()
    hidden, size = model.hidden_size, setting.activation_bytes
    matrix = (parameters - hidden) / setting.num_devices
    return Work(
        flops=2 * matrix * one.num_tokens,
        matmul_bytes=setting.value_bytes * (matrix + hidden) + size * one.num_tokens * 2 * hidden,
        elementwise_bytes=_norm_and_sum_bytes(model, one=one, setting=setting),
        num_kernels=LINEAR_KERNELS,
        reduced_values=hidden * one.num_tokens,
    )


def _norm_and_sum_bytes(model: Architecture, *, one: Pass, setting: Setting) -> float:
    """The norm reads and writes a hidden vector; the residual sum reads two and writes one."""
    return 5 * setting.activation_bytes * one.num_tokens * model.hidden_size
