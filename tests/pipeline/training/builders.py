"""Tiny models, windows and checkpoints that the training tests share."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, BlockSpec, Frozen, gqa, swiglu
from pipeline.data.packed import IGNORED_LABEL, PackedTokens
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.heterogeneous import HeterogeneousDecoderLayer, build_model
from pipeline.progress import SilentReporter
from pipeline.recipe import DistillationConfig, OptimizerConfig
from pipeline.stage import StageInputs
from pipeline.stages.spec import StageSpec

VOCAB_SIZE = 96
OPTIMIZER = OptimizerConfig(
    learning_rate=2e-3,
    min_learning_rate_ratio=0.1,
    warmup_ratio=0.2,
    schedule="cosine",
    weight_decay=0.1,
    betas=(0.9, 0.95),
    max_grad_norm=1.0,
)
KD = DistillationConfig(
    tokens=20 * 4 * 16,
    global_batch_size=4,
    long_context=(),
    cosine_weight=1.0,
    kl_weight=1.0,
    optimizer=OPTIMIZER,
    precision="fp32",
)


class Interrupted(Exception):  # noqa: N818 (it stands for a kill, not for an error of the code)
    """Raised by a reporter in place of a kill."""


class InterruptingReporter(SilentReporter):
    """Ends the stage right after it reported a step."""

    def __init__(self, *, at_step: int) -> None:
        self._at_step = at_step

    def step(self, step: int, total: int, /, *, what: str, **metrics: float) -> None:
        """Raise at the chosen step."""
        if step == self._at_step:
            raise Interrupted


def parent_architecture(*, num_layers: int = 3) -> Architecture:
    return Architecture(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_attention_heads=4,
        head_dim=8,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_ids=(2,),
        pad_token_id=None,
        blocks=tuple(
            BlockSpec(attention=gqa(2), ffn=swiglu(64), parent_layers=(layer,)) for layer in range(num_layers)
        ),
    )


def child_architecture() -> Architecture:
    """A child of the 3-layer parent: a narrow layer, then layers 1 and 2 fused into one without attention."""
    return parent_architecture().with_blocks(
        [
            BlockSpec(attention=gqa(1), ffn=swiglu(48), parent_layers=(0,)),
            BlockSpec(attention=NO_ATTENTION, ffn=swiglu(128), parent_layers=(1, 2)),
        ]
    )


def identity_tail_architecture() -> Architecture:
    return parent_architecture().with_blocks(
        [
            BlockSpec(attention=gqa(2), ffn=swiglu(64), parent_layers=(0,)),
            BlockSpec(attention=NO_ATTENTION, ffn=NO_FFN, parent_layers=(1,)),
            BlockSpec(attention=gqa(1), ffn=NO_FFN, parent_layers=(2,)),
        ]
    )


def write_checkpoint(
    directory: Path, architecture: Architecture, *, seed: int, dtype: torch.dtype = torch.float32
) -> Path:
    model = build_model(architecture, dtype=dtype, seed=seed, initializer_range=0.1)
    save_checkpoint(directory, architecture=architecture, tensors=model.state_dict(), tokenizer_dir=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_text("{}", encoding="utf-8")
    return directory


def random_tokens(num_windows: int, num_tokens: int, *, seed: int) -> Tensor:
    """Walks through the vocabulary: random, and yet something can be learned."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cumsum(torch.randint(0, 7, (num_windows, num_tokens), generator=generator), dim=1) % VOCAB_SIZE


def text_windows(num_windows: int, *, num_tokens: int = 16, seed: int = 1) -> PackedTokens:
    tokens_NT = random_tokens(num_windows, num_tokens, seed=seed)
    return PackedTokens(
        tokens_NT=tokens_NT,
        labels_NT=tokens_NT,
        position_ids_NT=torch.arange(num_tokens).expand(num_windows, -1).contiguous(),
    )


def sample_windows(num_windows: int, *, num_tokens: int = 16, seed: int = 2) -> PackedTokens:
    """Two samples a window, of lengths that differ, each with a prompt without loss: ragged trained-token counts."""
    tokens_NT = random_tokens(num_windows, num_tokens, seed=seed)
    labels_NT = tokens_NT.clone()
    position_ids_NT = torch.zeros_like(tokens_NT)
    for window in range(num_windows):
        cut = 5 + window % 7
        for first, last in ((0, cut), (cut, num_tokens)):
            position_ids_NT[window, first:last] = torch.arange(last - first)
            labels_NT[window, first : first + 1 + (window * 3) % (last - first - 1)] = IGNORED_LABEL
    return PackedTokens(tokens_NT=tokens_NT, labels_NT=labels_NT, position_ids_NT=position_ids_NT)


@contextlib.contextmanager
def counted_layer_runs() -> Iterator[Callable[[], int]]:
    """Count how often any layer runs, a second time for its gradient included."""
    attend, num_runs = HeterogeneousDecoderLayer.attend, 0

    def counted(self: HeterogeneousDecoderLayer, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal num_runs
        num_runs += 1
        return attend(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeterogeneousDecoderLayer, "attend", counted)
        yield lambda: num_runs


def write_spec(path: Path, config: Frozen, inputs: StageInputs, *, out_dir: Path) -> Path:
    """Write what a stage is given to a file, for a process of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(StageSpec.of(config, inputs, out_dir).model_dump_json(), encoding="utf-8")
    return path
