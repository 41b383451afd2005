"""What scoring costs beside its arithmetic and beside a plain loop: python bench/bench_scoring.py.

SmolLM2-135M's shape with random weights, fp32. The loop runs the whole child for each candidate with the parent's
log-probabilities kept and all weights in memory; the bound is the arithmetic of the layers behind each candidate at the
rate this very model reaches in plain forward passes before and after. The loop is timed on a sample of candidates: what
it costs does not depend on the layer.
"""

import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pipeline.architecture import Architecture, BlockSpec
from pipeline.costs import forward_flops_per_token
from pipeline.data.packed import PackedTokens
from pipeline.hardware import describe_hardware
from pipeline.model.architecture_files import load_architecture
from pipeline.model.checkpoint import load_model, save_checkpoint
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, build_model
from pipeline.progress import SilentReporter
from pipeline.puzzle.composition import LayerVariants, compose, embed, run_group, window_groups
from pipeline.puzzle.devices import Ranks, place
from pipeline.puzzle.score_functions import DivergenceScore
from pipeline.puzzle.scoring import Scores, score_blocks
from pipeline.puzzle.search_space import SearchSpace, resolve
from pipeline.puzzle.timing import now_s
from pipeline.recipe import SearchSpaceConfig

NUM_THREADS = 2
DEVICE = Ranks().device
# A GPU is idle most of the time of a thousand tokens.
NUM_WINDOWS, WINDOW_TOKENS = (16 if DEVICE.type == "cuda" else 2), 512
NUM_LOOPED = 10
NUM_TRIALS = 3
SPACE = SearchSpaceConfig(attention=("parent", 1), ffn=("parent", 512), overrides=(), portable=True)


def main() -> None:
    """Time all four and print the ratios."""
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(1)
    architecture = load_architecture("smollm2-135m-instruct")
    space = resolve(SPACE, architecture)
    model = place(build_model(architecture, dtype=torch.float32, seed=1), DEVICE).eval()
    model.requires_grad_(requires_grad=False)
    variants = make_variants(architecture, space)
    tokens_NT = torch.randint(0, architecture.vocab_size, (NUM_WINDOWS, WINDOW_TOKENS))
    packed = PackedTokens(
        tokens_NT=tokens_NT,
        labels_NT=tokens_NT,
        position_ids_NT=torch.arange(WINDOW_TOKENS).expand_as(tokens_NT),
    )
    rates = [forward_rate(model, packed)]
    began = now_s(DEVICE)
    with tempfile.TemporaryDirectory() as work_dir:
        scores = score_blocks(
            model,
            space,
            variants.__getitem__,
            [DivergenceScore(packed=packed)],
            work_dir=Path(work_dir),
            max_activation_bytes=2**30,
            reporter=SilentReporter(),
        )
    ours_s = now_s(DEVICE) - began
    rates.append(forward_rate(model, packed))
    rate = statistics.fmean(rates)
    bound_s = suffix_flops(architecture, scores) * packed.num_tokens / rate
    looped_s, difference = loop(model, variants, scores, packed)
    reload_s = reload(model)
    count = len(scores.candidates)
    shown = " and ".join(f"{one / 1e9:.0f}" for one in rates)
    print(f"{count} candidates, {packed.num_tokens:,} tokens; forward pass at {shown} GFLOP/s before and after")
    print(f"scoring: {ours_s:.1f} s; {ours_s / bound_s:.2f} times the arithmetic behind each candidate (wanted <= 1.2)")
    print(
        f"a loop over whole children: {looped_s * count:.1f} s, {looped_s * count / ours_s:.2f} times as long (>= 1.4)"
    )
    print(f"a loop that loads each child: {(looped_s + reload_s) * count / ours_s:.2f} times as long")
    print(f"largest relative difference of KL to the loop: {difference:.1e} (wanted <= 1e-5)")
    print(f"({describe_hardware()}, {NUM_THREADS} threads, fp32)")


def make_variants(architecture: Architecture, space: SearchSpace) -> list[LayerVariants]:
    """Return random modules of every alternative subblock of every layer."""
    attention = next(spec for spec in space.distinct_attention if spec != space.parent.attention)
    ffn = next(spec for spec in space.distinct_ffn if spec != space.parent.ffn)
    blocks = [BlockSpec(attention=attention, ffn=ffn, parent_layers=(layer,)) for layer in range(len(space.layers))]
    donor = place(build_model(architecture.with_blocks(blocks), dtype=torch.float32, seed=2), DEVICE).eval()
    donor.requires_grad_(requires_grad=False)
    return [{("attention", attention.key): layer, ("ffn", ffn.key): layer} for layer in donor.model.layers]  # pyright: ignore[reportReturnType]


def forward_rate(model: HeterogeneousLlamaForCausalLM, packed: PackedTokens) -> float:
    """Return the FLOP/s of the model's own forward pass, head included; the median of a few."""
    flops = packed.num_tokens * forward_flops_per_token(model.architecture, context_tokens=WINDOW_TOKENS)
    times_s = []
    with torch.inference_mode():
        for _ in range(NUM_TRIALS + 1):
            began = now_s(DEVICE)
            model(input_ids=packed.tokens_NT.to(DEVICE), use_cache=False)
            times_s.append(now_s(DEVICE) - began)
    return flops / statistics.median(times_s[1:])


def suffix_flops(architecture: Architecture, scores: Scores) -> float:
    """Return the FLOPs per token of every candidate's own block, the layers behind it and the head."""
    total = 0.0
    for one in scores.candidates:
        child = architecture.with_blocks([one.block, *architecture.blocks[one.layer + 1 :]])
        total += forward_flops_per_token(child, context_tokens=WINDOW_TOKENS)
    return total


@torch.inference_mode()
def loop(
    model: HeterogeneousLlamaForCausalLM, variants: list[LayerVariants], scores: Scores, packed: PackedTokens
) -> tuple[float, float]:
    """Return the seconds of one candidate in a plain loop, and the largest relative difference of its KL to ours."""
    parent_NTV = model(input_ids=packed.tokens_NT.to(DEVICE), use_cache=False).logits
    parent_log_NTV = parent_NTV.log_softmax(dim=-1)
    parent = [compose(model, layer, block, {}) for layer, block in enumerate(model.architecture.blocks)]
    step = max(1, len(scores.candidates) // NUM_LOOPED)
    differences, times_s = [], []
    for one in scores.candidates[::step]:
        layers = list(parent)
        layers[one.layer] = compose(model, one.layer, one.block, variants[one.layer])
        began = now_s(DEVICE)
        final_NTD = torch.cat(
            [run_group(model, layers, embed(model, packed, rows), packed, rows) for rows in window_groups(packed)]
        )
        child_NTV = model.lm_head(model.model.norm(final_NTD))
        kl = torch.nn.functional.kl_div(child_NTV.log_softmax(dim=-1), parent_log_NTV, log_target=True, reduction="sum")
        kl = kl.item() / packed.num_tokens
        times_s.append(now_s(DEVICE) - began)
        exact = exact_kl(child_NTV, parent_NTV) / packed.num_tokens
        differences.append(abs(one.divergence.kl - exact) / exact)
    return statistics.median(times_s), max(differences)


def exact_kl(child_NTV: Tensor, parent_NTV: Tensor) -> float:
    """Return the sum of KL over tokens in float64, window by window: float32 logits are rounded, these sums are not."""
    return sum(
        torch.nn.functional.kl_div(
            child_TV.double().log_softmax(dim=-1),
            parent_TV.double().log_softmax(dim=-1),
            log_target=True,
            reduction="sum",
        ).item()
        for child_TV, parent_TV in zip(child_NTV, parent_NTV, strict=True)
    )


def reload(model: HeterogeneousLlamaForCausalLM) -> float:
    """Return the seconds that reading the whole model from disk takes."""
    with tempfile.TemporaryDirectory() as directory:
        save_checkpoint(
            Path(directory), architecture=model.architecture, tensors=model.state_dict(), tokenizer_dir=None
        )
        began = now_s(DEVICE)
        load_model(Path(directory), dtype=torch.float32)
        return now_s(DEVICE) - began


if __name__ == "__main__":
    main()
