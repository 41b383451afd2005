"""Importing GGUF: a file written with llama.cpp's conventions against the Llama it was written from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import LlamaForCausalLM

from pipeline.architecture import gqa, swiglu
from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import load_model, load_tokenizer
from pipeline.model.gguf_import import import_gguf
from pipeline.model.tokenizer_files import CHATML_TEMPLATE, byte_alphabet
from tests.pipeline.model.builders import make_architecture, make_blocks, make_llama, random_ids

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "ĊĊ", "Ġa", *(f"<r{i}>" for i in range(59))]
ARCHITECTURE = make_architecture(rope_theta=100_000.0, blocks=make_blocks(*[(gqa(2), swiglu(64))] * 2))
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outer:
        return outer[name]
    _, _, layer, *middle, _ = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(middle)]}.weight"


def interleaved(weight: np.ndarray, *, num_heads: int) -> np.ndarray:
    """llama.cpp's order: the two halves of a head become neighbours, one row from each in turn."""
    rows = []
    for head in np.split(weight, num_heads):
        first, second = np.split(head, 2)
        for pair in zip(first, second, strict=True):
            rows.extend(pair)
    return np.stack(rows)


def write_gguf(path: Path, llama: LlamaForCausalLM, *, family: str = "llama", pre: str = "smollm") -> Path:
    writer = GGUFWriter(path, family)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["Ċ Ċ", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML_TEMPLATE)
    for name, tensor in llama.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, num_heads=4 if "q_proj" in name else 2)
        writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def test_import_equals_the_llama_it_was_written_from(tmp_path: Path):
    llama = make_llama(ARCHITECTURE)
    path = write_gguf(tmp_path / "model.gguf", llama)
    assert import_gguf(path, out_dir=tmp_path / "parent") == ARCHITECTURE
    ids_BT = random_ids(12)
    logits = load_model(tmp_path / "parent", dtype=torch.float32)(ids_BT).logits
    assert torch.equal(logits, llama(ids_BT).logits)


def test_tokenizer_splits_digits_and_keeps_line_breaks_together(tmp_path: Path):
    import_gguf(write_gguf(tmp_path / "model.gguf", make_llama(ARCHITECTURE)), out_dir=tmp_path / "parent")
    tokenizer = load_tokenizer(tmp_path / "parent")
    assert tokenizer.tokenize("\n\n12 a") == ["ĊĊ", "1", "2", "Ġa"]
    assert tokenizer("<|im_start|>").input_ids == [1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.chat_template == CHATML_TEMPLATE
    assert len(tokenizer) == len(TOKENS) == 320


def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path):
    llama = make_llama(ARCHITECTURE)
    with pytest.raises(CheckpointError, match="holds a 'gemma3' model"):
        import_gguf(write_gguf(tmp_path / "a.gguf", llama, family="gemma3"), out_dir=tmp_path / "parent")
    with pytest.raises(CheckpointError, match="pre-tokenizer 'llama-bpe'"):
        import_gguf(write_gguf(tmp_path / "b.gguf", llama, pre="llama-bpe"), out_dir=tmp_path / "parent")


@pytest.mark.parametrize("keep", [10, 3000, -5000])
def test_file_that_is_cut_off_is_refused(tmp_path: Path, keep: int):
    path = write_gguf(tmp_path / "model.gguf", make_llama(ARCHITECTURE))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        import_gguf(path, out_dir=tmp_path / "parent")


def test_file_that_is_not_gguf_is_refused(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        import_gguf(tmp_path / "model.gguf", out_dir=tmp_path / "parent")
