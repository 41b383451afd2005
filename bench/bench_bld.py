"""What block distillation of a whole library costs beside runs of its own for each block: python bench/bench_bld.py.

Random weights, bf16: all of SmolLM2-135M on a CPU; on a GPU, which that would leave idle, two layers of Llama-3.1-8B.
Every block's loss is back-propagated through its own subblock (an attention variant's through the parent's frozen FFN
as well), so its FLOPs are counted by hand and held against the matmul peak that the same process measures at the same
shapes: by the clock and, without a GPU, by the CPU time that both took, which says the same on an idle machine and is
all that counts on one where others run.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.architecture import Architecture
from pipeline.data.packed import PackedTokens
from pipeline.hardware import describe_hardware
from pipeline.model.architecture_files import load_architecture
from pipeline.model.checkpoint import TensorReader, load_model, save_checkpoint
from pipeline.model.heterogeneous import build_model
from pipeline.progress import SilentReporter
from pipeline.puzzle.bld import TrainedBlock, train_blocks
from pipeline.puzzle.bld_cost import parent_flops_per_token, training_flops_per_token
from pipeline.puzzle.block_keys import BlockKey, trainable_keys
from pipeline.puzzle.devices import NUM_TRIALS, Ranks, matmul_peak, place
from pipeline.puzzle.importance import Importance
from pipeline.puzzle.parent_layers import ParentLayers
from pipeline.puzzle.search_space import resolve
from pipeline.recipe import BlockLibraryConfig, SearchSpaceConfig

NUM_THREADS = 2
NUM_STEPS = 6
VOCAB_SIZE = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is trained on one kind of device: layers of an architecture, narrower FFNs, and the batch of a step."""

    architecture: str
    num_layers: int
    widths: tuple[int, ...]
    batch_size: int
    window_tokens: int

    @property
    def tokens_per_step(self) -> int:
        """Windows times their length."""
        return self.batch_size * self.window_tokens


CPU_CASE = Case(
    architecture="smollm2-135m-instruct", num_layers=30, widths=(1024, 512, 256), batch_size=4, window_tokens=512
)
GPU_CASE = Case(
    architecture="llama-3.1-8b-instruct", num_layers=2, widths=(10752, 7168, 3584), batch_size=4, window_tokens=2048
)
DEVICE = Ranks().device
CASE = GPU_CASE if DEVICE.type == "cuda" else CPU_CASE
SPACE = SearchSpaceConfig(attention=("parent", 1, "no_op"), ffn=("parent", *CASE.widths), overrides=(), portable=True)
SETTINGS = BlockLibraryConfig(
    mode="decoupled",
    coupled_space=None,
    tokens=NUM_STEPS * CASE.tokens_per_step,
    closed_form_tokens=0,
    loss="token",
    batch_size=CASE.batch_size,
    learning_rate=1e-3,
    min_learning_rate_ratio=0.1,
    warmup_ratio=0.0,
    schedule="cosine",
    weight_decay=0.0,
    betas=(0.9, 0.95),
    max_grad_norm=1.0,
    overrides=(),
    precision="bf16",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one run took, by the clock and on the processors."""

    wall_s: float
    cpu_s: float


def main() -> None:
    """Train the library at once, by variant and by block, and print the ratios."""
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(1)
    whole = load_architecture(CASE.architecture)
    # No block reads the vocabulary, and drawing 128,256 random embeddings takes longer than all that is measured.
    architecture = whole.model_copy(update={"blocks": whole.blocks[: CASE.num_layers], "vocab_size": VOCAB_SIZE})
    space = resolve(SPACE, architecture)
    keys = trainable_keys(space)
    with tempfile.TemporaryDirectory() as parent_dir:
        model = build_model(architecture, dtype=torch.bfloat16, seed=1)
        save_checkpoint(Path(parent_dir), architecture=architecture, tensors=model.state_dict(), tokenizer_dir=None)
        train = make_trainer(Path(parent_dir), architecture)
        train(keys[:2])  # warms up
        peak, peak_per_cpu_s = matmul_rates(architecture)
        together = train(keys)
        by_variant: dict[tuple[str, str], list[BlockKey]] = {}
        for key in keys:
            by_variant.setdefault((key.subblock, key.variant), []).append(key)
        variants = [train(group) for group in by_variant.values()]
        # One run for each block: the middle layer of every variant stands for all of them.
        blocks = [(len(group), train([group[len(group) // 2]])) for group in by_variant.values()]
    per_token = parent_flops_per_token(architecture, num_layers=CASE.num_layers, context_tokens=CASE.window_tokens)
    per_token += training_flops_per_token(architecture, keys, context_tokens=CASE.window_tokens)
    flops = SETTINGS.tokens * per_token
    by_variant_s = sum(one.wall_s for one in variants), sum(one.cpu_s for one in variants)
    by_block_s = sum(n * one.wall_s for n, one in blocks), sum(n * one.cpu_s for n, one in blocks)
    print(
        f"{len(keys)} blocks of {CASE.num_layers} layers of {CASE.architecture}, {SETTINGS.tokens:,} tokens each, "
        f"at once: {together.wall_s:.1f} s, {together.cpu_s:.1f} CPU-s"
    )
    for name, (wall_s, cpu_s), wanted in (
        ("one run per variant over all layers", by_variant_s, ""),
        ("one run per block", by_block_s, " (wanted >= 5)"),
    ):
        ratios = f"{wall_s / together.wall_s:.2f} times as long, {cpu_s / together.cpu_s:.2f} times the CPU time"
        print(f"{name}: {wall_s:.1f} s, {cpu_s:.1f} CPU-s: {ratios}{wanted}")
    print(
        f"{flops / together.wall_s / 1e9:.0f} GFLOP/s, {flops / together.wall_s / peak:.0%} of the {peak / 1e9:.0f} "
        "that bf16 matrix products of these shapes reach here (wanted >= 35 %)"
    )
    if DEVICE.type == "cpu":
        print(
            f"{flops / together.cpu_s / 1e9:.0f} GFLOP per CPU-s, {flops / together.cpu_s / peak_per_cpu_s:.0%} of "
            f"their {peak_per_cpu_s / 1e9:.0f}"
        )
    print(f"({describe_hardware()}, {NUM_THREADS} threads, bf16)")


def matmul_rates(architecture: Architecture) -> tuple[float, float]:
    """Return the peak of matrix products in FLOP/s, and what 60 of them do in a second of CPU time."""
    shape = {"num_tokens": CASE.tokens_per_step, "dtype": torch.bfloat16, "device": DEVICE}
    peak = matmul_peak(architecture, **shape)
    began = time.process_time()
    matmul_peak(architecture, **shape)
    cpu_s = time.process_time() - began
    width = architecture.homogeneous_block().ffn.intermediate_size
    assert width is not None
    flops = 2 * NUM_TRIALS * 2.0 * CASE.tokens_per_step * architecture.hidden_size * width
    return peak, flops / cpu_s


def make_trainer(parent_dir: Path, architecture: Architecture) -> Callable[[Sequence[BlockKey]], Cost]:
    """Return what trains some blocks as a run of its own, its loading of the parent included, and gives its cost."""
    parent = architecture.homogeneous_block()
    width, heads = parent.ffn.intermediate_size, parent.attention.num_key_value_heads
    assert width is not None
    assert heads is not None
    importance = Importance(
        ffn_contribution=tuple(torch.rand(width) for _ in architecture.blocks),
        kv_contribution=tuple(torch.rand(heads) for _ in architecture.blocks),
        channel_order=tuple(torch.randperm(width) for _ in architecture.blocks),
        kv_heads="mean",
    )
    tokens_NT = torch.randint(0, architecture.vocab_size, (NUM_STEPS * CASE.batch_size, CASE.window_tokens))
    packed = PackedTokens(
        tokens_NT=tokens_NT, labels_NT=tokens_NT, position_ids_NT=torch.arange(CASE.window_tokens).expand_as(tokens_NT)
    )

    def train(keys: Sequence[BlockKey]) -> Cost:
        began, cpu_began = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as work_dir:
            training = train_blocks(
                ParentLayers.whole(place(load_model(parent_dir, dtype=torch.bfloat16), DEVICE)),
                {key: str(key) for key in keys},
                parent_tensors=TensorReader(parent_dir),
                importance=importance,
                train=packed,
                validation=packed,
                settings=SETTINGS,
                work_dir=Path(work_dir),
                max_activation_bytes=4 * 2**30,
                checkpoint_interval_steps=NUM_STEPS,
                reporter=SilentReporter(),
            )
        assert all(isinstance(outcome, TrainedBlock) for outcome in training.outcomes)
        return Cost(wall_s=time.perf_counter() - began, cpu_s=time.process_time() - cpu_began)

    return train


if __name__ == "__main__":
    main()
