"""What joining a run of FFNs into one wide FFN is worth: python bench/bench_fusion.py.

On a GPU, slices of one eighth of the 405B's FFN (hidden 16384, intermediate 53248 / 8), in bf16: what one of eight
tensor-parallel devices computes. On a CPU, SmolLM2's FFN, slices of one eighth of the 8B's, and two of the 405B's
slices: what fits in 3 GiB and a minute of an idle machine, in processor time of one thread, which other work on the
machine lengthens little. Both orders read the same weights and do the same arithmetic; fusion saves norms, additions,
and waiting between matrices. The sum over devices behind every FFN, of which fusion saves all but one, is not in these
times.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.architecture import NO_ATTENTION, Architecture, BlockSpec, swiglu
from pipeline.hardware import describe_hardware
from pipeline.model.fusion import fuse_ffns
from pipeline.model.heterogeneous import HeterogeneousDecoderLayer, HeterogeneousLlamaConfig
from pipeline.puzzle.measure import Interval, median_interval

NUM_THREADS = 1
NUM_ROUNDS, NUM_WARMUPS = 15, 3
SHORTEST_TIMING_S = 0.01  # a timing repeats its work until it lasts that long


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One shape: `num_ffns` FFNs of this width in a row, for a batch of `num_tokens`."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_ffns: int
    num_tokens: int


def cases(device: torch.device) -> list[Case]:
    """Return the shapes for this device, from one user's decoding to a prefill."""
    slice_405b = {"name": "405B / 8", "hidden_size": 16384, "intermediate_size": 53248 // 8}
    if device.type == "cuda":
        return [
            Case(**slice_405b, num_ffns=num_ffns, num_tokens=num_tokens)
            for num_ffns in (2, 4, 8, 12)
            for num_tokens in (1, 32, 2048)
        ]
    smol = {"name": "SmolLM2-135M", "hidden_size": 576, "intermediate_size": 1536}
    slice_8b = {"name": "8B / 8", "hidden_size": 4096, "intermediate_size": 14336 // 8}
    return [
        *(Case(**smol, num_ffns=num_ffns, num_tokens=tokens) for num_ffns in (2, 5) for tokens in (1, 32, 512)),
        *(Case(**slice_8b, num_ffns=num_ffns, num_tokens=tokens) for num_ffns in (2, 4, 8) for tokens in (1, 32)),
        Case(**slice_405b, num_ffns=2, num_tokens=1),
    ]


def main() -> None:
    """Measure every shape both ways, in turn, and print medians and their ratio."""
    torch.set_num_threads(NUM_THREADS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'FFN':14} {'joined':>6} {'tokens':>6} {'sequential ms':>14} {'fused ms':>9} {'ratio':>6}  95% interval")
    for case in cases(device):
        sequential, fused, ratio = measure(case, device)
        print(
            f"{case.name:14} {case.num_ffns:6} {case.num_tokens:6} {sequential.median:14.4f} {fused.median:9.4f} "
            f"{ratio.median:6.3f}  {ratio.low:.3f} to {ratio.high:.3f}",
            flush=True,
        )
    threads = "" if device.type == "cuda" else f", {NUM_THREADS} thread"
    print(f"({describe_hardware()}{threads}, bf16, {NUM_ROUNDS} rounds, eager PyTorch)")


@torch.inference_mode()
def measure(case: Case, device: torch.device) -> tuple[Interval, Interval, Interval]:
    """Return the times of both orders in ms and sequential over fused, medians of rounds in turn."""
    ffns = [random_ffn(case, device, seed=seed) for seed in range(case.num_ffns)]
    layers = [layer_with(case, ffn) for ffn in ffns]
    wide = layer_with(case, fuse_ffns(ffns, norm_rule="fold_each"))
    hidden_BTD = torch.randn(1, case.num_tokens, case.hidden_size, device=device).to(torch.bfloat16)
    num_repeats = 1
    while timed(layers, hidden_BTD, num_repeats=num_repeats) * num_repeats < SHORTEST_TIMING_S:
        num_repeats *= 2
    sequential, fused = [], []
    for round_index in range(NUM_WARMUPS + NUM_ROUNDS):
        both = [(sequential, layers), (fused, [wide])]
        for times, order in both if round_index % 2 else both[::-1]:
            times.append(1000 * timed(order, hidden_BTD, num_repeats=num_repeats))
    sequential, fused = sequential[NUM_WARMUPS:], fused[NUM_WARMUPS:]
    ratios = [slow / fast for slow, fast in zip(sequential, fused, strict=True)]
    return median_interval(sequential), median_interval(fused), median_interval(ratios)


def timed(layers: list[HeterogeneousDecoderLayer], hidden_BTD: Tensor, *, num_repeats: int) -> float:
    """Return the seconds of one pass through the layers."""
    began = now_s(hidden_BTD.device)
    for _ in range(num_repeats):
        state_BTD = hidden_BTD
        for layer in layers:
            state_BTD = layer.feed_forward(state_BTD)
    return (now_s(hidden_BTD.device) - began) / num_repeats


def now_s(device: torch.device) -> float:
    """Return wall-clock time once a GPU's queue has run dry; on a CPU, this process's time on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def random_ffn(case: Case, device: torch.device, *, seed: int) -> dict[str, Tensor]:
    """Return the tensors of one FFN subblock."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = {
        "gate_proj": (case.intermediate_size, case.hidden_size),
        "up_proj": (case.intermediate_size, case.hidden_size),
        "down_proj": (case.hidden_size, case.intermediate_size),
    }
    tensors = {
        f"mlp.{name}.weight": torch.empty(shape, device=device, dtype=torch.bfloat16).uniform_(
            -0.02, 0.02, generator=generator
        )
        for name, shape in shapes.items()
    }
    return tensors | {
        "post_attention_layernorm.weight": torch.ones(case.hidden_size, device=device, dtype=torch.bfloat16)
    }


def layer_with(case: Case, tensors: dict[str, Tensor]) -> HeterogeneousDecoderLayer:
    """Return an attention-free layer that holds these tensors and no others."""
    block = BlockSpec(attention=NO_ATTENTION, ffn=swiglu(tensors["mlp.gate_proj.weight"].shape[0]), parent_layers=(0,))
    architecture = Architecture(
        vocab_size=8,
        hidden_size=case.hidden_size,
        num_attention_heads=1,
        head_dim=case.hidden_size,
        max_position_embeddings=8,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_ids=(2,),
        pad_token_id=None,
        blocks=(block,),
    )
    with torch.device("meta"):
        layer = HeterogeneousDecoderLayer(
            HeterogeneousLlamaConfig(architecture=architecture), block=block, cache_index=0
        )
    layer.load_state_dict(tensors, assign=True)
    return layer.eval()


if __name__ == "__main__":
    main()
