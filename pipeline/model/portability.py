"""Which runtimes take an exported architecture as it is, by rule; no runtime is started here. Pure.

The rules on layers come from runs against a reference in fp32 with vLLM 0.32.0, llama.cpp 0c1e5709, mlx-lm 0.32.2 and
transformers 5.23.0; those on biases and head_dim are on the safe side, from the schema having no place for them. A
runtime that fails loudly and one that computes something else both count as "does not run".
"""

from dataclasses import dataclass

from pipeline.architecture import Architecture, BlockSpec

# llama.cpp's converter knows the tokenizer of a deci model by this size alone.
_LLAMA3_VOCAB_SIZE = 128_256


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeSupport:
    """Whether a runtime takes the exported directory as it is, and why or how."""

    runtime: str
    runs_as_is: bool
    reason: str


def runtime_support(architecture: Architecture) -> list[RuntimeSupport]:
    """Return what each runtime makes of an exported architecture."""
    return [
        RuntimeSupport(
            runtime="transformers",
            runs_as_is=True,
            reason="with trust_remote_code=True, or without it after pipeline.model.decilm.register()",
        ),
        _verdict("vLLM", _vllm_obstacles(architecture), otherwise="with --trust-remote-code, as DeciLMForCausalLM"),
        _verdict(
            "llama.cpp",
            _llama_cpp_obstacles(architecture),
            otherwise="after convert_hf_to_gguf.py, as architecture deci",
        ),
        _verdict("mlx-lm", _mlx_obstacles(architecture), otherwise="as nemotron-nas"),
    ]


def _verdict(runtime: str, obstacles: list[str], *, otherwise: str) -> RuntimeSupport:
    return RuntimeSupport(runtime=runtime, runs_as_is=not obstacles, reason="; ".join(obstacles) or otherwise)


def _vllm_obstacles(architecture: Architecture) -> list[str]:
    obstacles = _shape_obstacles(architecture)
    if architecture.blocks[0].attention.kind == "no_op":
        obstacles.append("layer 0 has no attention: its first forward pass fails")
    if _layers(architecture, attention="linear"):
        obstacles.append(f"linear attention in {_layers(architecture, attention='linear')}: not implemented")
    if _layers(architecture, ffn="linear"):
        obstacles.append(f"linear FFN in {_layers(architecture, ffn='linear')}: not implemented")
    return obstacles


def _llama_cpp_obstacles(architecture: Architecture) -> list[str]:
    obstacles = _shape_obstacles(architecture)
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
    if _layers(architecture, ffn="linear"):
        obstacles.append(f"linear FFN in {_layers(architecture, ffn='linear')}: not implemented")
    if architecture.vocab_size != _LLAMA3_VOCAB_SIZE:
        obstacles.append(
            f"vocab_size is {architecture.vocab_size}: the stock converter reads BPE tokenizers of "
            f"{_LLAMA3_VOCAB_SIZE} tokens only"
        )
    return obstacles


def _mlx_obstacles(architecture: Architecture) -> list[str]:
    obstacles = _shape_obstacles(architecture)
    if _layers(architecture, attention="linear"):
        obstacles.append(
            f"linear attention in {_layers(architecture, attention='linear')}: other tensor names expected"
        )
    if _layers(architecture, ffn="linear"):
        obstacles.append(f"linear FFN in {_layers(architecture, ffn='linear')}: other tensor names expected")
    return obstacles


def _shape_obstacles(architecture: Architecture) -> list[str]:
    obstacles = []
    if architecture.head_dim * architecture.num_attention_heads != architecture.hidden_size:
        obstacles.append(
            f"head_dim {architecture.head_dim} times {architecture.num_attention_heads} heads is not hidden_size "
            f"{architecture.hidden_size}: the schema's readers assume it is"
        )
    if architecture.attention_bias or architecture.mlp_bias:
        obstacles.append("biases: the schema's readers build layers without them")
    return obstacles


def _layers(architecture: Architecture, *, attention: str | None = None, ffn: str | None = None) -> str:
    def matches(block: BlockSpec) -> bool:
        return block.attention.kind == attention or block.ffn.kind == ffn

    return _spelled([layer for layer, block in enumerate(architecture.blocks) if matches(block)])


def _spelled(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}" if layers else ""
