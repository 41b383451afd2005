"""AnyModel directories: a Llama's config.json with sizes per layer, its weights in files per subblock."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, gqa, swiglu
from pipeline.errors import CheckpointError
from pipeline.model.architecture_files import load_architecture
from pipeline.model.checkpoint import load_model
from pipeline.model.export_decilm import export_decilm
from pipeline.model.hf_import import import_checkpoint
from tests.pipeline.model.builders import (
    LLAMA3_ROPE,
    make_architecture,
    make_blocks,
    make_llama,
    make_model,
    make_tokenizer_dir,
    random_ids,
)
from tests.pipeline.model.test_hf_import import edit_json

BLOCKS = make_blocks(
    (gqa(2), swiglu(40)), (gqa(1), swiglu(48)), (NO_ATTENTION, swiglu(17)), (gqa(4), NO_FFN), (NO_ATTENTION, NO_FFN)
)
SETTINGS = {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500_000.0, "tie_word_embeddings": False}
ARCHITECTURE = make_architecture(blocks=BLOCKS, **SETTINGS)


def subblock_json(size_key: str, size: int | None, **empty: None) -> dict[str, Any]:
    """A subblock as Model-Optimizer's dataclasses are written: every field, also where it says nothing."""
    plain = {"no_op": size is None, "replace_with_linear": False, "sparsify": None, "weights_precision": "bf16"}
    return {**plain, size_key: size, **empty}


def block_json(attention_heads: int | None, width: int | None) -> dict[str, Any]:
    return {
        "attention": subblock_json("num_key_value_heads", attention_heads, llama4=None, mamba=None),
        "ffn": subblock_json("intermediate_size", width, moe=None),
        "parallel_blocks": None,
    }


def saved_anymodel(directory: Path, architecture: Architecture = ARCHITECTURE) -> Path:
    """The files of an AnyModel: the parent's config.json with block_configs, and one file of weights per subblock."""
    parent = architecture.with_blocks(make_blocks(*[(gqa(2), swiglu(48))] * architecture.num_hidden_layers))
    make_tokenizer_dir(directory)
    (directory / "architecture.json").unlink()
    make_llama(parent).config.save_pretrained(directory)
    edit_json(
        directory / "config.json",
        architectures=["LlamaForCausalLM"],
        block_configs=[
            block_json(block.attention.num_key_value_heads, block.ffn.intermediate_size)
            for block in architecture.blocks
        ],
    )
    tensors = make_model(architecture).state_dict()
    (directory / "model.safetensors").unlink()
    (directory / "subblocks_safetensors").mkdir()
    weight_map = {}
    for name in tensors:
        part = "attention" if ("self_attn" in name or "input_layernorm" in name) else "ffn"
        file = f"block_{name.split('.')[2]}_{part}" if ".layers." in name else name.split(".")[-2]
        weight_map[name] = f"subblocks_safetensors/{file}.safetensors"
    for shard in sorted(set(weight_map.values())):
        save_file({name: tensors[name].clone() for name in tensors if weight_map[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"format": "pt"}, "weight_map": weight_map})
    )
    return directory


class NoAttention(nn.Module):
    """What stands where an attention was."""

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        """Return zeros, and a place for weights."""
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """What stands where an FFN was."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(hidden_states)


def patched_llama(architecture: Architecture) -> LlamaForCausalLM:
    """The Llama of transformers with its layers replaced one by one: the definition of the format."""
    parent = architecture.with_blocks(make_blocks(*[(gqa(2), swiglu(48))] * architecture.num_hidden_layers))
    llama = make_llama(parent)
    for index, block in enumerate(architecture.blocks):
        config = copy.deepcopy(llama.config)
        config.num_key_value_heads = block.attention.num_key_value_heads or config.num_key_value_heads
        config.intermediate_size = block.ffn.intermediate_size or config.intermediate_size
        layer = LlamaDecoderLayer(config, index)
        if block.attention == NO_ATTENTION:
            layer.input_layernorm, layer.self_attn = nn.Identity(), NoAttention()
        if block.ffn == NO_FFN:
            layer.post_attention_layernorm, layer.mlp = nn.Identity(), NoMLP()
        llama.model.layers[index] = layer
    llama.load_state_dict(make_model(architecture).state_dict(), strict=True)
    return llama.eval()


@torch.no_grad()
def test_import_computes_what_the_patched_llama_does(tmp_path: Path):
    source = saved_anymodel(tmp_path / "anymodel")
    assert import_checkpoint(source, out_dir=tmp_path / "imported") == ARCHITECTURE
    ids_BT = random_ids(12)
    logits_BTV = load_model(tmp_path / "imported", dtype=torch.float32)(ids_BT).logits
    expected_BTV = patched_llama(ARCHITECTURE)(ids_BT, use_cache=False).logits
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-5, atol=1e-5)


def test_import_can_be_exported_as_decilm(tmp_path: Path):
    import_checkpoint(saved_anymodel(tmp_path / "anymodel"), out_dir=tmp_path / "imported")
    export_decilm(tmp_path / "imported", out_dir=tmp_path / "export")
    widths = [block.ffn.intermediate_size for block in load_architecture(str(tmp_path / "export")).blocks]
    assert widths == [256, 256, 256, None]


def test_class_name_of_servers_is_read_too_and_its_base_must_be_a_llama(tmp_path: Path):
    source = saved_anymodel(tmp_path / "anymodel")
    edit_json(source / "config.json", architectures=["AnyModel"], base_architecture="LlamaForCausalLM")
    assert load_architecture(str(source)) == ARCHITECTURE
    edit_json(source / "config.json", base_architecture="Qwen3ForCausalLM")
    with pytest.raises(CheckpointError, match="base_architecture is 'Qwen3ForCausalLM'"):
        load_architecture(str(source))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("attention", {"replace_with_linear": True}, r"\[1\]\.attention has replace_with_linear = True"),
        ("attention", {"mamba": {"state_dim": 128}}, r"\[1\]\.attention has mamba = "),
        ("attention", {"llama4": {"attention_chunk_size": 8192}}, r"\[1\]\.attention has llama4 = "),
        ("attention", {"window_length": 1024}, r"\[1\]\.attention has keys that are not known: window_length"),
        ("attention", {"num_key_value_heads": None}, r"\[1\]\.attention\.num_key_value_heads is None"),
        ("attention", {"num_key_value_heads": 3}, "3 key/value heads, which does not divide 4"),
        ("attention", {"no_op": "yes"}, r"\[1\]\.attention\.no_op is 'yes'"),
        ("ffn", {"moe": {"num_local_experts": 8}}, r"\[1\]\.ffn has moe = "),
        ("ffn", {"sparsify": ["gate_proj"]}, r"\[1\]\.ffn has sparsify = "),
        ("ffn", {"intermediate_size": 0}, r"\[1\]\.ffn\.intermediate_size is 0"),
        ("ffn", {"intermediate_size": 40}, r"layers\.1\.mlp\.down_proj\.weight has shape \(32, 48\)"),
        ("ffn", {"no_op": True}, r"layers\.1\.mlp\.down_proj\.weight is not part of this architecture"),
    ],
)
def test_block_that_is_not_supported_is_refused_by_name(
    tmp_path: Path, part: str, changes: dict[str, Any], message: str
):
    source = saved_anymodel(tmp_path / "anymodel")
    blocks = json.loads((source / "config.json").read_text())["block_configs"]
    blocks[1][part] |= changes
    edit_json(source / "config.json", block_configs=blocks)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(source, out_dir=tmp_path / "imported")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, "block_configs is 5; wanted a list of num_hidden_layers = 4"),
        ({"block_configs": {"0": {}}}, "block_configs is dict"),
        ({"block_configs": [{"attention": {}}] * 5}, r"block_configs\[0\] must have attention and ffn"),
        ({"block_configs": [block_json(2, 48) | {"parallel_blocks": [{}]}] * 5}, "has parallel_blocks"),
        ({"per_layer_config": {"0": {"skip": ["mlp"]}}}, "per_layer_config"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_config_that_is_not_supported_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    source = saved_anymodel(tmp_path / "anymodel")
    edit_json(source / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(source, out_dir=tmp_path / "imported")


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "subblocks_safetensors/../../outside.safetensors",
        "/outside.safetensors",
        "elsewhere/block.safetensors",
        "subblocks_safetensors/subblocks_safetensors/block.safetensors",
    ],
)
def test_index_that_points_elsewhere_is_refused(tmp_path: Path, shard: str):
    source = saved_anymodel(tmp_path / "anymodel")
    index_path = source / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["model.norm.weight"] = shard
    index_path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"a shard is a \.safetensors file in the same directory"):
        import_checkpoint(source, out_dir=tmp_path / "imported")
