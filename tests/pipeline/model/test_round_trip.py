"""Exported directories come back: the same bytes as a checkpoint, and the same directory when exported again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.architecture import LINEAR_ATTENTION, LINEAR_FFN, NO_ATTENTION, NO_FFN, Architecture, gqa, swiglu
from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import load_model, read_architecture, save_checkpoint
from pipeline.model.export_decilm import export_decilm
from pipeline.model.hf_import import import_checkpoint
from tests.pipeline.model.builders import (
    LLAMA3_ROPE,
    make_architecture,
    make_blocks,
    make_model,
    make_tokenizer_dir,
    random_ids,
)
from tests.pipeline.model.test_hf_import import edit_json

PARENT_BLOCK = (gqa(2), swiglu(256))
# What the export leaves as it is comes back as it was; the others come back as what the export made of them.
KEPT = {
    "parent": [PARENT_BLOCK] * 3,
    "no_op_attention": [PARENT_BLOCK, (NO_ATTENTION, swiglu(512)), PARENT_BLOCK],
    "no_op_ffn": [PARENT_BLOCK, (gqa(2), NO_FFN), PARENT_BLOCK],
    "linear": [PARENT_BLOCK, (LINEAR_ATTENTION, LINEAR_FFN), (LINEAR_ATTENTION, swiglu(256))],
    "wide_fused_ffn": [PARENT_BLOCK, (NO_ATTENTION, swiglu(2048)), PARENT_BLOCK],
    "fewer_heads": [(gqa(4), swiglu(256)), (gqa(1), swiglu(256)), (gqa(2), swiglu(512))],
}
CHANGED = {
    "odd_width": [PARENT_BLOCK, (gqa(2), swiglu(300))],
    "no_first_attention": [(NO_ATTENTION, swiglu(256)), PARENT_BLOCK],
    "empty_layers": [PARENT_BLOCK, (NO_ATTENTION, NO_FFN), PARENT_BLOCK, (NO_ATTENTION, NO_FFN)],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "eos_token_ids": (2, 7), "pad_token_id": None},
    "llama3_rope": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500_000.0, "bos_token_id": None},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 12},
}


def exported(directory: Path, architecture: Architecture, *, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint and the directory it is exported as, in <directory>/{checkpoint,export}; the latter is returned."""
    save_checkpoint(
        directory / "checkpoint",
        architecture=architecture,
        tensors=make_model(architecture).to(dtype).state_dict(),
        tokenizer_dir=make_tokenizer_dir(directory / "tokenizer"),
    )
    export_decilm(directory / "checkpoint", out_dir=directory / "export")
    return directory / "export"


def stored_bytes(directory: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    tensors = load_file(directory / "model.safetensors")
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("layers", [*KEPT, *CHANGED])
@torch.no_grad()
def test_export_import_export_keeps_every_byte(tmp_path: Path, layers: str, settings: str, dtype: torch.dtype):
    architecture = make_architecture(blocks=make_blocks(*(KEPT | CHANGED)[layers]), **SETTINGS[settings])
    first = exported(tmp_path, architecture, dtype=dtype)

    imported = import_checkpoint(first, out_dir=tmp_path / "imported")

    assert imported == read_architecture(tmp_path / "imported")
    assert stored_bytes(tmp_path / "imported") == stored_bytes(first)
    if layers in KEPT:
        assert imported == architecture
        assert stored_bytes(tmp_path / "imported") == stored_bytes(tmp_path / "checkpoint")
    ids_BT = random_ids(9)
    logits_BTV = load_model(tmp_path / "imported", dtype=torch.float32)(ids_BT).logits
    expected_BTV = load_model(tmp_path / "checkpoint", dtype=torch.float32)(ids_BT).logits
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-4)

    export_decilm(tmp_path / "imported", out_dir=tmp_path / "again")

    assert stored_bytes(tmp_path / "again") == stored_bytes(first)
    names = {path.name for path in first.iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    # refit.json alone tells of the parent that was searched, of which the second export knows nothing.
    for name in names - {"refit.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes(), name


def test_shards_of_an_export_are_read_as_one(tmp_path: Path):
    architecture = make_architecture(blocks=make_blocks(*KEPT["no_op_attention"]))
    export_dir = exported(tmp_path, architecture)
    tensors = load_file(export_dir / "model.safetensors")
    shards = {f"model-{number:05d}-of-00003.safetensors": sorted(tensors)[number - 1 :: 3] for number in (1, 2, 3)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, export_dir / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (export_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (export_dir / "model.safetensors").unlink()

    import_checkpoint(export_dir, out_dir=tmp_path / "imported")

    assert stored_bytes(tmp_path / "imported") == stored_bytes(tmp_path / "checkpoint")


def edit_block(config_path: Path, layer: int, part: str, **changes: Any) -> None:
    blocks = json.loads(config_path.read_text())["block_configs"]
    blocks[layer][part] |= changes
    edit_json(config_path, block_configs=blocks)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("attention", {"window_length": 1024}, r"\[1\]\.attention has window_length = 1024, which is not supported"),
        ("attention", {"num_sink_tokens": 4}, r"\[1\]\.attention has num_sink_tokens = 4"),
        ("attention", {"llama4": {}}, r"\[1\]\.attention has keys that are not known: llama4"),
        (
            "attention",
            {"replace_with_linear": True, "n_heads_in_group": None},
            r"tensor model\.layers\.1\.self_attn\.k_proj\.weight is not part of this architecture",
        ),
        ("attention", {"no_op": True}, r"model\.layers\.1\.input_layernorm\.weight is not part of this architecture"),
        (
            "attention",
            {"n_heads_in_group": 4},
            r"layers\.1\.self_attn\.k_proj\.weight has shape \(16, 32\), .*\(8, 32\)",
        ),
        ("ffn", {"ffn_mult": 24.0}, r"layers\.1\.mlp\.down_proj\.weight has shape \(32, 256\), .*\(32, 512\)"),
        ("ffn", {"moe": {"num_local_experts": 8}}, r"\[1\]\.ffn has keys that are not known: moe"),
    ],
)
def test_directory_that_says_something_else_than_its_weights_is_refused(
    tmp_path: Path, part: str, changes: dict[str, Any], message: str
):
    export_dir = exported(tmp_path, make_architecture(blocks=make_blocks(*KEPT["parent"])))
    edit_block(export_dir / "config.json", 1, part, **changes)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(export_dir, out_dir=tmp_path / "imported")
    assert not (tmp_path / "imported" / "architecture.json").exists()


def test_linear_blocks_without_their_weights_are_refused_by_name(tmp_path: Path):
    export_dir = exported(tmp_path, make_architecture(blocks=make_blocks(*KEPT["linear"])))
    tensors = load_file(export_dir / "model.safetensors")
    del tensors["model.layers.1.mlp.linear_mlp.weight"]
    save_file(tensors, export_dir / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing, the first is model\.layers\.1\.mlp\.linear_mlp\.weight"):
        import_checkpoint(export_dir, out_dir=tmp_path / "imported")


def test_code_of_an_exported_directory_is_neither_run_nor_copied(tmp_path: Path):
    export_dir = exported(tmp_path, make_architecture(blocks=make_blocks(*KEPT["parent"])))
    for name in ("configuration_decilm.py", "modeling_decilm.py"):
        (export_dir / name).write_text("raise SystemExit('code of the checkpoint ran')")
    import_checkpoint(export_dir, out_dir=tmp_path / "imported")
    assert not list((tmp_path / "imported").glob("*.py"))


def test_quantised_export_is_refused(tmp_path: Path):
    export_dir = exported(tmp_path, make_architecture(blocks=make_blocks(*KEPT["parent"])))
    edit_json(export_dir / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(CheckpointError, match="quantization_config; give the unquantised"):
        import_checkpoint(export_dir, out_dir=tmp_path / "imported")
