"""The AnyModel schema of NVIDIA's Model-Optimizer: a Llama's config.json with block_configs. Imports no torch.

Each entry states its sizes outright, num_key_value_heads and intermediate_size; the sizes beside block_configs are
those of the parent that was pruned. Weights have Llama's names, those of a removed subblock are absent, and the index
may put them below subblocks_safetensors/. Source: NVIDIA/Model-Optimizer, modelopt/torch/puzzletron/block_config.py.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionSpec, BlockSpec, FFNSpec, gqa, swiglu
from pipeline.errors import CheckpointError
from pipeline.model.hf_config import llama_architecture

_CLASS_NAME, _BASE_CLASS_NAME = "AnyModel", "LlamaForCausalLM"

# Beside no_op and the size. Whatever else they hold changes what a layer computes; weights_precision alone is a remark
# on how weights are to be stored, and what they are stored as is read from the weights.
_EMPTY_ATTENTION = {"replace_with_linear": False, "sparsify": None, "llama4": None, "mamba": None}
_EMPTY_FFN = {"replace_with_linear": False, "sparsify": None, "moe": None}
_REMARKS = {"weights_precision"}


def is_anymodel(config: dict[str, Any]) -> bool:
    """Return whether a config.json is a Llama's with sizes of its own for each layer."""
    return config.get("model_type") == "llama" and config.get("block_configs") is not None


def anymodel_architecture(config: dict[str, Any], *, token_ids: dict[str, Any], path: Path) -> Architecture:
    """Return what an AnyModel config.json says, with further token ids from its generation_config.json.

    Layer i does the work of parent layer i.

    Raises:
        CheckpointError: for what is no Llama around its blocks; for a block with experts, Mamba, linear matrices or
            sparsity, or a key that is not known. It names `path` and the block.
    """
    blocks = config["block_configs"]
    if not isinstance(blocks, list) or len(blocks) != config.get("num_hidden_layers"):
        got = len(blocks) if isinstance(blocks, list) else type(blocks).__name__
        raise CheckpointError(
            f"{path}: block_configs is {got}; wanted a list of num_hidden_layers = {config.get('num_hidden_layers')}"
        )
    parent = llama_architecture(_parent_config(config, path=path), token_ids=token_ids, path=path)
    read = [_read_block(block, layer=layer, at=f"{path}: block_configs[{layer}]") for layer, block in enumerate(blocks)]
    try:
        return parent.with_blocks(read)
    except ValidationError as err:
        raise CheckpointError(f"{path} does not describe a model that can be built: {err}") from err


def _parent_config(config: dict[str, Any], *, path: Path) -> dict[str, Any]:
    """Return the config.json of the Llama that was pruned; AnyModel's base_architecture says that it is one."""
    parent = {key: value for key, value in config.items() if key not in ("block_configs", "base_architecture")}
    if config.get("architectures") != [_CLASS_NAME]:
        return parent
    if config.get("base_architecture") != _BASE_CLASS_NAME:
        raise CheckpointError(
            f"{path} is an AnyModel whose base_architecture is {config.get('base_architecture')!r}; a parent must be a "
            f"{_BASE_CLASS_NAME}"
        )
    return parent | {"architectures": [_BASE_CLASS_NAME]}


def _read_block(block: Any, *, layer: int, at: str) -> BlockSpec:
    if not isinstance(block, dict) or not {"attention", "ffn"} <= set(block) <= {"attention", "ffn", "parallel_blocks"}:
        raise CheckpointError(f"{at} must have attention and ffn, and beside them at most parallel_blocks")
    if block.get("parallel_blocks") is not None:
        raise CheckpointError(f"{at} has parallel_blocks, which are not supported")
    heads = _size(block["attention"], "num_key_value_heads", empty=_EMPTY_ATTENTION, at=f"{at}.attention")
    width = _size(block["ffn"], "intermediate_size", empty=_EMPTY_FFN, at=f"{at}.ffn")
    attention: AttentionSpec = NO_ATTENTION if heads is None else gqa(heads)
    ffn: FFNSpec = NO_FFN if width is None else swiglu(width)
    return BlockSpec(attention=attention, ffn=ffn, parent_layers=(layer,))


def _size(part: Any, key: str, *, empty: dict[str, Any], at: str) -> int | None:
    """Return a subblock's size, or None where it is left out."""
    if not isinstance(part, dict):
        raise CheckpointError(f"{at} is a {type(part).__name__}, not an object")
    unknown = sorted(set(part) - {"no_op", key, *empty, *_REMARKS})
    if unknown:
        raise CheckpointError(f"{at} has keys that are not known: {', '.join(unknown)}")
    changed = [name for name, value in empty.items() if part.get(name, value) != value]
    if changed:
        raise CheckpointError(f"{at} has {changed[0]} = {part[changed[0]]!r}, which is not supported")
    no_op, size = part.get("no_op", False), part.get(key)
    if not isinstance(no_op, bool):
        raise CheckpointError(f"{at}.no_op is {no_op!r}; wanted true or false")
    if no_op:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise CheckpointError(f"{at}.{key} is {size!r}; wanted a count above 0")
    return size
