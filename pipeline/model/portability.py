"""Which runtimes take an architecture as it is, after re-packing, or not at all, by rule. Pure.

No runtime is started here: `make test-serving` holds every rule against the runtimes themselves, and docs/serving.md
has their versions and the table. One that fails loudly and one that computes something else both count as "cannot".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.architecture import Architecture, BlockSpec
from pipeline.model.decilm_config import WIDTH_MULTIPLE
from pipeline.model.repacking import portable

Verdict = Literal["as is", "after re-packing", "cannot"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeSupport:
    """What a runtime makes of an architecture, and why or how."""

    runtime: str
    runs: Verdict
    reason: str


def runtime_support(architecture: Architecture, *, tokenizer_obstacle: str | None = None) -> list[RuntimeSupport]:
    """Return what each runtime makes of a checkpoint's architecture, and of what the export turns it into.

    `tokenizer_obstacle` is the reason for which the tokenizer cannot be written into a GGUF file.
    """
    beyond_layers = [] if tokenizer_obstacle is None else [tokenizer_obstacle]
    return [
        _support("transformers", architecture, lambda _: [], otherwise="its class registered, or trust_remote_code"),
        _support("vLLM", architecture, _vllm_obstacles, otherwise="as DeciLMForCausalLM, with --trust-remote-code"),
        _support(
            "llama.cpp",
            architecture,
            lambda one: _llama_cpp_obstacles(one) + beyond_layers,
            mended=lambda one: _llama_cpp_refusals(one) + beyond_layers,
            otherwise="the GGUF file, architecture deci",
        ),
        _support("mlx-lm", architecture, _mlx_obstacles, otherwise="as nemotron-nas"),
    ]


def _support(
    runtime: str,
    architecture: Architecture,
    obstacles: Callable[[Architecture], list[str]],
    *,
    otherwise: str,
    mended: Callable[[Architecture], list[str]] | None = None,
) -> RuntimeSupport:
    """Hold the architecture against the runtime's rules, then what the export makes of it (against `mended`)."""
    found = _width_obstacles(architecture) + obstacles(architecture)
    if not found:
        return RuntimeSupport(runtime=runtime, runs="as is", reason=otherwise)
    left = (mended or obstacles)(portable(architecture).architecture)
    if left:
        return RuntimeSupport(runtime=runtime, runs="cannot", reason="; ".join(left))
    return RuntimeSupport(runtime=runtime, runs="after re-packing", reason=f"{otherwise}; mended: {'; '.join(found)}")


def _width_obstacles(architecture: Architecture) -> list[str]:
    odd = [
        layer for layer, block in enumerate(architecture.blocks) if (block.ffn.intermediate_size or 0) % WIDTH_MULTIPLE
    ]
    return [f"FFN of {_spelled(odd)}: its width is no multiple of {WIDTH_MULTIPLE}, as the schema asks"] if odd else []


def _vllm_obstacles(architecture: Architecture) -> list[str]:
    obstacles = []
    if architecture.blocks[0].attention.kind == "no_op":
        obstacles.append("layer 0 has no attention: its first forward pass fails")
    if _layers(architecture, attention="linear"):
        obstacles.append(f"linear attention in {_layers(architecture, attention='linear')}: not implemented")
    if _layers(architecture, ffn="linear"):
        obstacles.append(f"linear FFN in {_layers(architecture, ffn='linear')}: not implemented")
    return obstacles


def _llama_cpp_obstacles(architecture: Architecture) -> list[str]:
    obstacles = _llama_cpp_refusals(architecture)
    first, last = architecture.blocks[0], architecture.blocks[-1]
    if first.attention.kind == "no_op":
        obstacles.append("layer 0 has no attention: the model does not load")
    if last.ffn.kind == "no_op":
        obstacles.append("the last layer has no FFN: decoding aborts")
    silent = [
        layer
        for layer, block in enumerate(architecture.blocks)
        if block.ffn.kind == "no_op" and block.attention.kind != "no_op"
    ]
    if silent:
        obstacles.append(f"attention without FFN in {_spelled(silent)}: silently computes something else")
    return obstacles


def _llama_cpp_refusals(architecture: Architecture) -> list[str]:
    """Return what re-packing and the GGUF file's FFNs of zeros do not mend."""
    obstacles = []
    if architecture.attention_bias or architecture.mlp_bias:
        obstacles.append("biases: they are not written into GGUF files")
    if _layers(architecture, ffn="linear"):
        obstacles.append(f"linear FFN in {_layers(architecture, ffn='linear')}: not implemented")
    return obstacles


def _mlx_obstacles(architecture: Architecture) -> list[str]:
    obstacles = []
    if architecture.head_dim * architecture.num_attention_heads != architecture.hidden_size:
        obstacles.append(
            f"head_dim {architecture.head_dim} times {architecture.num_attention_heads} heads is not hidden_size "
            f"{architecture.hidden_size}: it takes the quotient for head_dim"
        )
    if _layers(architecture, attention="linear"):
        obstacles.append(
            f"linear attention in {_layers(architecture, attention='linear')}: other tensor names expected"
        )
    if _layers(architecture, ffn="linear"):
        obstacles.append(f"linear FFN in {_layers(architecture, ffn='linear')}: other tensor names expected")
    return obstacles


def _layers(architecture: Architecture, *, attention: str | None = None, ffn: str | None = None) -> str:
    def matches(block: BlockSpec) -> bool:
        return block.attention.kind == attention or block.ffn.kind == ffn

    return _spelled([layer for layer, block in enumerate(architecture.blocks) if matches(block)])


def _spelled(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}" if layers else ""
