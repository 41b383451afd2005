"""A child's FFN runs fused, put in reverse order or deleted: what each does to its predictions. No training, no files.

    fused       each run is one wide FFN: its layers read one input (FFN Fusion, equation 5), by either norm rule
    reversed    the run's layers, unfused, last first: what reading inputs they were not trained on costs by itself
    deleted     FFNs of the runs left out, the harmless first: the other way to save their time

Letters: T tokens, D hidden_size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from pipeline.architecture import swiglu
from pipeline.data.packed import PackedTokens
from pipeline.evaluation.closeness import Comparison, Reference, compare
from pipeline.model.checkpoint import model_from_tensors
from pipeline.model.fusion import NormRule, arrange, fuse_ffns
from pipeline.model.fusion_runs import FusionRun
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, build_subblock_ffn

NORM_RULES: tuple[NormRule, ...] = get_args(NormRule)


class ModelTensors:
    """A model's own tensors by name, so that an arrangement shares those it does not change."""

    def __init__(self, model: HeterogeneousLlamaForCausalLM) -> None:
        self._tensors = model.state_dict()
        if model.architecture.tie_word_embeddings:
            del self._tensors["lm_head.weight"]

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        return tuple(self._tensors)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._tensors[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """One order of the child's layers, some of them joined; `norm_rule` matters where there are runs."""

    name: str
    order: tuple[FusionRun | int, ...]
    norm_rule: NormRule = "fold_each"


def unchanged(num_layers: int) -> Arrangement:
    """Return the child itself."""
    return Arrangement(name="child", order=tuple(range(num_layers)))


def fused(num_layers: int, runs: Sequence[FusionRun], *, norm_rule: NormRule) -> Arrangement:
    """Return the child with its runs joined."""
    return Arrangement(
        name=f"fused, {norm_rule}",
        order=_with_runs(num_layers, {run: (run,) for run in runs}),
        norm_rule=norm_rule,
    )


def reverse(num_layers: int, runs: Sequence[FusionRun]) -> Arrangement:
    """Return the child with the layers of each run the other way round."""
    return Arrangement(
        name="runs in reverse order", order=_with_runs(num_layers, {run: run.ffn_layers[::-1] for run in runs})
    )


def without(num_layers: int, layers: Sequence[int]) -> Arrangement:
    """Return the child without these attention-free layers."""
    name = f"{len(layers)} FFN{'s' if len(layers) != 1 else ''} deleted: {', '.join(map(str, sorted(layers)))}"
    return Arrangement(name=name, order=tuple(layer for layer in range(num_layers) if layer not in layers))


def arranged(child: HeterogeneousLlamaForCausalLM, arrangement: Arrangement) -> HeterogeneousLlamaForCausalLM:
    """Return the arrangement as a model of the child's dtype, on its device; unchanged tensors are shared."""
    found = arrange(
        child.architecture,
        source=ModelTensors(child),
        order=arrangement.order,
        norm_rule=arrangement.norm_rule,
    )
    model = model_from_tensors(found.architecture, found.tensors, dtype=child.dtype)
    _move(model, child.device)
    return model


def measure_arrangements(
    child: HeterogeneousLlamaForCausalLM,
    arrangements: Sequence[Arrangement],
    packed: PackedTokens,
    references: Sequence[Reference],
) -> Iterator[Comparison]:
    """Compare each arrangement of the child with the references, one model at a time."""
    for arrangement in arrangements:
        yield compare(arranged(child, arrangement), packed, references)


def deletion_order(
    child: HeterogeneousLlamaForCausalLM, runs: Sequence[FusionRun], packed: PackedTokens, reference: Reference
) -> Iterator[tuple[int, float]]:
    """Give every FFN of the runs with the KL to `reference`, nats per token, of the child without it alone."""
    layers = [layer for run in runs for layer in run.ffn_layers]
    arrangements = [without(child.architecture.num_hidden_layers, [layer]) for layer in layers]
    for layer, found in zip(layers, measure_arrangements(child, arrangements, packed, [reference]), strict=True):
        yield layer, found.to_references[0].kl_nats.value


@torch.no_grad()
def identity_error(
    child: HeterogeneousLlamaForCausalLM, run: FusionRun, packed: PackedTokens, *, norm_rule: NormRule
) -> float:
    """Return |wide(X) - sum_k FFN_k(norm(X))| / |sum|, in float32, at the states X that reach the run.

    The part of fusion that is exact (theorem 3.1): `norm` is each layer's own (`fold_each`) or the last one's (`last`).
    X are those of the first window.
    """
    inputs = {
        "input_ids": packed.tokens_NT[:1].to(child.device),
        "position_ids": packed.position_ids_NT[:1].to(child.device),
    }
    states = child.model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    assert states is not None
    hidden_TD = states[run.layers[0]][0].float()
    ffns, expected_TD = [], torch.zeros_like(hidden_TD)
    last_norm = child.model.layers[run.ffn_layers[-1]].state_dict()["post_attention_layernorm.weight"]
    for layer in run.ffn_layers:
        spec = child.architecture.blocks[layer].ffn
        tensors = {name: one.float() for name, one in child.model.layers[layer].state_dict().items()}
        ffns.append(tensors)
        own = build_subblock_ffn(child.architecture, spec, dtype=torch.float32)
        _move(own, child.device)
        shared = {"post_attention_layernorm.weight": last_norm.float()} if norm_rule == "last" else {}
        own.load_state_dict(tensors | shared)
        expected_TD += own.feed_forward(hidden_TD) - hidden_TD
    joined = fuse_ffns(ffns, norm_rule=norm_rule)
    width = joined["mlp.gate_proj.weight"].shape[0]
    wide = build_subblock_ffn(child.architecture, swiglu(width), dtype=torch.float32)
    _move(wide, child.device)
    wide.load_state_dict(joined)
    got_TD = wide.feed_forward(hidden_TD) - hidden_TD
    return float((got_TD - expected_TD).norm() / expected_TD.norm())


def num_deleted_at_equal_latency(*, child_ms: float, fused_ms: float, without_ms: float, num_ffns: int) -> int:
    """Return how many FFNs must go to save what fusion saves, when all `num_ffns` of them save child - without.

    Nearest whole number; 0 where fusion saves less than half of what one FFN takes.
    """
    saved_per_ffn_ms = (child_ms - without_ms) / num_ffns
    if saved_per_ffn_ms <= 0:
        return 0
    return min(num_ffns, max(0, math.floor((child_ms - fused_ms) / saved_per_ffn_ms + 0.5)))


def _move(module: nn.Module, device: torch.device) -> None:
    module.to(device)


def _with_runs(num_layers: int, replaced: dict[FusionRun, tuple[FusionRun | int, ...]]) -> tuple[FusionRun | int, ...]:
    first = {run.layers[0]: new for run, new in replaced.items()}
    inside = {layer for run in replaced for layer in run.layers}
    order: list[FusionRun | int] = []
    for layer in range(num_layers):
        if layer in first:
            order += first[layer]
        elif layer not in inside:
            order.append(layer)
    return tuple(order)
