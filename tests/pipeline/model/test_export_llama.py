"""The plain-Llama export: which children are one, and that stock transformers computes the same from it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from pipeline.architecture import LINEAR_ATTENTION, LINEAR_FFN, NO_ATTENTION, NO_FFN, gqa, swiglu
from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.export_llama import export_llama, llama_obstacle
from pipeline.model.hf_import import import_checkpoint
from tests.pipeline.model.builders import (
    LLAMA3_ROPE,
    make_architecture,
    make_blocks,
    make_model,
    make_tokenizer_dir,
    random_ids,
)

EQUAL = (gqa(2), swiglu(40))
EMPTY = (NO_ATTENTION, NO_FFN)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied_llama3": {"tie_word_embeddings": False, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500_000.0},
    "biases_head_dim": {"head_dim": 12, "attention_bias": True, "mlp_bias": True, "eos_token_ids": (2, 7)},
    "two_layers_left_out": {"blocks": make_blocks(EMPTY, EQUAL, EMPTY, EQUAL)},
    "subblocks_that_pack_into_layers": {"blocks": make_blocks(EQUAL, (gqa(2), NO_FFN), (NO_ATTENTION, swiglu(40)))},
}


def saved_checkpoint(directory: Path, **changes: Any) -> Path:
    architecture = make_architecture(**({"blocks": make_blocks(EQUAL, EQUAL, EQUAL)} | changes))
    save_checkpoint(
        directory,
        architecture=architecture,
        tensors=make_model(architecture).state_dict(),
        tokenizer_dir=make_tokenizer_dir(directory.with_name("tokenizer")),
    )
    return directory


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_stock_llama_computes_what_the_checkpoint_does(tmp_path: Path, name: str):
    checkpoint_dir = saved_checkpoint(tmp_path / "checkpoint", **SHAPES[name])
    architecture = export_llama(checkpoint_dir, out_dir=tmp_path / "llama")

    llama, loading = LlamaForCausalLM.from_pretrained(
        tmp_path / "llama", dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(loading.values()), loading
    reference = make_model(make_architecture(**({"blocks": make_blocks(EQUAL, EQUAL, EQUAL)} | SHAPES[name])))
    ids_BT = random_ids(20)
    assert torch.equal(llama.eval()(ids_BT).logits, reference(ids_BT).logits)
    assert len(llama.model.layers) == architecture.num_hidden_layers
    assert llama.generation_config.eos_token_id == list(architecture.eos_token_ids)


def test_export_comes_back_byte_for_byte(tmp_path: Path):
    checkpoint_dir = saved_checkpoint(tmp_path / "checkpoint")
    architecture = export_llama(checkpoint_dir, out_dir=tmp_path / "llama")
    assert import_checkpoint(tmp_path / "llama", out_dir=tmp_path / "imported") == architecture
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "imported" / name).read_bytes() == (checkpoint_dir / name).read_bytes(), name


def test_dtype_is_kept_and_told(tmp_path: Path):
    checkpoint_dir = saved_checkpoint(tmp_path / "checkpoint")
    architecture = make_architecture(blocks=make_blocks(EQUAL, EQUAL, EQUAL))
    tensors = {
        name: tensor.to(torch.bfloat16) for name, tensor in load_file(checkpoint_dir / "model.safetensors").items()
    }
    save_checkpoint(tmp_path / "bf16", architecture=architecture, tensors=tensors, tokenizer_dir=checkpoint_dir)
    export_llama(tmp_path / "bf16", out_dir=tmp_path / "llama")
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "llama" / "model.safetensors").read_bytes() == (
        tmp_path / "bf16" / "model.safetensors"
    ).read_bytes()


def test_export_needs_nothing_of_this_project(tmp_path: Path):
    export_llama(saved_checkpoint(tmp_path / "checkpoint"), out_dir=tmp_path / "llama")
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); AutoTokenizer.from_pretrained(sys.argv[1]); "
        "print(type(model).__name__, [name for name in sys.modules if name.split('.')[0] == 'pipeline'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "llama")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PATH": ""}).stdout
    assert printed.split() == ["LlamaForCausalLM", "[]"]
    assert not list((tmp_path / "llama").glob("*.py"))
    assert AutoTokenizer.from_pretrained(tmp_path / "llama").chat_template


@pytest.mark.parametrize(
    ("layers", "obstacle"),
    [
        ([EQUAL, (gqa(1), swiglu(40))], "re-packed layer 1 is kv1+ffn40 while layer 0 is kv2+ffn40"),
        ([EQUAL, (gqa(2), swiglu(48))], "re-packed layer 1 is kv2+ffn48 while layer 0 is kv2+ffn40"),
        ([EQUAL, (NO_ATTENTION, swiglu(40))], "re-packed layer 1 is no_op+ffn40"),
        ([EQUAL, EMPTY, (gqa(2), NO_FFN)], "re-packed layer 1 is kv2+no_op"),
        ([(gqa(2), LINEAR_FFN)] * 2, "re-packed layer 0 is kv2+linear"),
        ([(LINEAR_ATTENTION, swiglu(40))] * 2, "re-packed layer 0 is linear+ffn40"),
        ([EMPTY, EMPTY], "re-packed layer 0 is no_op+no_op"),
    ],
)
def test_child_that_is_no_llama_is_refused_with_the_layer(tmp_path: Path, layers: list[Any], obstacle: str):
    checkpoint_dir = saved_checkpoint(tmp_path / "checkpoint", blocks=make_blocks(*layers))
    assert llama_obstacle(make_architecture(blocks=make_blocks(*layers))) == obstacle
    with pytest.raises(CheckpointError, match="is no plain Llama: re-packed layer"):
        export_llama(checkpoint_dir, out_dir=tmp_path / "llama")
    assert not (tmp_path / "llama").exists()
