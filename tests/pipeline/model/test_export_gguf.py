"""GGUF files, read back with the reader of the `gguf` package: every value, every key, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.architecture import LINEAR_ATTENTION, LINEAR_FFN, NO_ATTENTION, NO_FFN, Architecture, gqa, swiglu
from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.export_gguf import export_gguf, rope_factors, write_gguf
from pipeline.model.gguf_tokenizer import tokenizer_obstacle
from pipeline.model.heterogeneous import HeterogeneousLlamaConfig
from pipeline.model.tokenizer_files import (
    CHATML_TEMPLATE,
    SpecialTokens,
    byte_alphabet,
    save_byte_level_bpe,
    smollm_pre_tokenizer,
)
from tests.pipeline.model.builders import LLAMA3_ROPE, make_architecture, make_blocks, make_model, make_tokenizer_dir

# Re-packing leaves these layers alone: attention in layer 0, FFNs of multiples of 256.
LAYERS = make_blocks(
    (gqa(2), swiglu(256)),
    (gqa(1), NO_FFN),
    (LINEAR_ATTENTION, swiglu(512)),
    (NO_ATTENTION, swiglu(256)),
    (gqa(4), NO_FFN),
)


def written(tmp_path: Path, architecture: Architecture, **options: Any) -> GGUFReader:
    state = make_model(architecture).state_dict()
    options = {"precision": "fp32", "tokenizer_dir": None} | options
    write_gguf(tmp_path / "model.gguf", architecture=architecture, read=state.__getitem__, **options)
    return GGUFReader(tmp_path / "model.gguf")


def values_of(reader: GGUFReader) -> dict[str, np.ndarray]:
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape([int(size) for size in reversed(tensor.shape)])
        for tensor in reader.tensors
    }


def key(reader: GGUFReader, name: str) -> Any:
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def rows_in_pairs(head_dim: int, num_heads: int) -> list[int]:
    """The Hugging Face row of each GGUF row, counted out: pair 0 of head 0, both halves, then pair 1."""
    return [
        head * head_dim + half * head_dim // 2 + pair
        for head in range(num_heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]


def test_every_tensor_is_there_bit_for_bit(tmp_path: Path):
    architecture = make_architecture(blocks=LAYERS, tie_word_embeddings=False)
    values = values_of(written(tmp_path, architecture))
    state = {name: tensor.numpy() for name, tensor in make_model(architecture).state_dict().items()}
    expected = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer, heads in ((0, 2), (1, 1), (4, 4)):
        own = {name.removeprefix(f"model.layers.{layer}.self_attn."): value for name, value in state.items()}
        expected |= {
            f"blk.{layer}.attn_norm.weight": state[f"model.layers.{layer}.input_layernorm.weight"],
            f"blk.{layer}.attn_q.weight": own["q_proj.weight"][rows_in_pairs(8, 4)],
            f"blk.{layer}.attn_k.weight": own["k_proj.weight"][rows_in_pairs(8, heads)],
            f"blk.{layer}.attn_v.weight": own["v_proj.weight"],
            f"blk.{layer}.attn_output.weight": own["o_proj.weight"],
        }
    expected["blk.2.attn_norm.weight"] = state["model.layers.2.input_layernorm.weight"]
    expected["blk.2.attn_output.weight"] = state["model.layers.2.self_attn.linear_attn.weight"]
    for layer in (0, 2, 3):
        expected[f"blk.{layer}.ffn_norm.weight"] = state[f"model.layers.{layer}.post_attention_layernorm.weight"]
        for part in ("gate", "up", "down"):
            expected[f"blk.{layer}.ffn_{part}.weight"] = state[f"model.layers.{layer}.mlp.{part}_proj.weight"]
    for layer in (1, 4):  # attention alone, which llama.cpp would skip
        expected[f"blk.{layer}.ffn_norm.weight"] = np.zeros(32, np.float32)
        for part, shape in (("gate", (32, 32)), ("up", (32, 32)), ("down", (32, 32))):
            expected[f"blk.{layer}.ffn_{part}.weight"] = np.zeros(shape, np.float32)
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(values[name], value), name


def test_sizes_stand_per_layer(tmp_path: Path):
    reader = written(tmp_path, make_architecture(blocks=LAYERS))
    assert key(reader, "general.architecture") == "deci"
    assert key(reader, "deci.block_count") == 5
    assert key(reader, "deci.attention.head_count") == [4, 4, 4, 0, 4]
    assert key(reader, "deci.attention.head_count_kv") == [2, 1, 0, 0, 4]
    assert key(reader, "deci.feed_forward_length") == [256, 32, 512, 256, 32]
    assert key(reader, "deci.rope.dimension_count") == key(reader, "deci.attention.key_length") == 8
    assert key(reader, "deci.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert "output.weight" not in values_of(reader)


@pytest.mark.parametrize(
    ("precision", "stored", "dtype"),
    [("fp16", GGMLQuantizationType.F16, torch.float16), ("bf16", GGMLQuantizationType.BF16, torch.bfloat16)],
)
def test_half_precisions_round_matrices_and_keep_norms(
    tmp_path: Path, precision: str, stored: GGMLQuantizationType, dtype: torch.dtype
):
    architecture = make_architecture()
    reader = written(tmp_path, architecture, precision=precision)
    state = make_model(architecture).state_dict()
    values = values_of(reader)
    up_DF = state["model.layers.1.mlp.up_proj.weight"]
    assert np.array_equal(values["blk.1.ffn_up.weight"], up_DF.to(dtype).float().numpy())
    assert np.array_equal(values["blk.1.ffn_norm.weight"], state["model.layers.1.post_attention_layernorm.weight"])
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert types["blk.1.ffn_up.weight"] == types["token_embd.weight"] == stored
    assert types["blk.1.ffn_norm.weight"] == GGMLQuantizationType.F32


@pytest.mark.parametrize(
    ("head_dim", "theta", "original"), [(8, 10_000.0, 16), (64, 500_000.0, 8192), (128, 500_000.0, 8192)]
)
def test_rope_factors_are_those_of_transformers(head_dim: int, theta: float, original: int):
    scaling = LLAMA3_ROPE.model_copy(update={"original_max_position_embeddings": original})
    changes = {"head_dim": head_dim, "rope_theta": theta, "max_position_embeddings": 8 * original}
    scaled, plain = (
        HeterogeneousLlamaConfig(architecture=make_architecture(rope_scaling=rule, **changes))
        for rule in (scaling, None)
    )
    scaled_frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    frequencies = plain.rope_parameters["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
    factors = rope_factors(scaling, theta=theta, head_dim=head_dim)
    torch.testing.assert_close(factors, frequencies / scaled_frequencies, rtol=1e-5, atol=0.0)
    assert factors[-1] == 8.0


def test_llama3_scaling_is_written_as_a_tensor(tmp_path: Path):
    values = values_of(written(tmp_path, make_architecture(rope_scaling=LLAMA3_ROPE)))
    assert np.array_equal(values["rope_freqs.weight"], rope_factors(LLAMA3_ROPE, theta=10_000.0, head_dim=8).numpy())


def test_byte_tokenizer_and_template_travel_along(tmp_path: Path):
    directory = make_tokenizer_dir(tmp_path / "tokenizer")
    reader = written(tmp_path, make_architecture(), tokenizer_dir=directory)
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = key(reader, "tokenizer.ggml.tokens")
    assert {token: index for index, token in enumerate(tokens)} == vocabulary
    kinds = key(reader, "tokenizer.ggml.token_type")
    assert [kinds[index] for index in (0, 1, 2, 3, 258, 259)] == [3, 3, 3, 1, 1, 3]
    assert (key(reader, "tokenizer.ggml.bos_token_id"), key(reader, "tokenizer.ggml.eos_token_id")) == (1, 2)
    assert key(reader, "tokenizer.ggml.add_bos_token") is False
    assert key(reader, "tokenizer.chat_template") == (directory / "chat_template.jinja").read_text()


def save_tokenizer(directory: Path, **changes: Any) -> Path:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "\u010a\u010a"]
    save_byte_level_bpe(
        directory,
        tokens=tokens,
        merges=[("\u010a", "\u010a")],
        pre_tokenizer=smollm_pre_tokenizer(),
        special=SpecialTokens(bos=tokens[1], eos=tokens[2], pad=None, unk=None, control=tuple(tokens[:3])),
        chat_template=CHATML_TEMPLATE,
        max_tokens=128,
    )
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_smollm_tokenizer_is_named_and_ids_beyond_it_are_unused(tmp_path: Path):
    architecture = make_architecture(eos_token_ids=(0, 2, 5, 4))
    reader = written(tmp_path, architecture, tokenizer_dir=save_tokenizer(tmp_path / "tokenizer"))
    assert key(reader, "tokenizer.ggml.pre") == "smollm"
    assert key(reader, "tokenizer.ggml.merges") == ["\u010a \u010a"]
    assert key(reader, "tokenizer.ggml.tokens")[259:262] == ["\u010a\u010a", "[PAD260]", "[PAD261]"]
    assert key(reader, "tokenizer.ggml.token_type")[259:262] == [1, 5, 5]
    assert key(reader, "tokenizer.ggml.eos_token_id") == 2
    # Whatever their order in generation_config.json, none of the first three is lost.
    assert key(reader, "tokenizer.ggml.eot_token_id") == 0
    assert key(reader, "tokenizer.ggml.eom_token_id") == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "do not cover"),
        ({"normalizer": {"type": "NFC"}}, "without a normalizer"),
        ({"model": {"type": "Unigram", "vocab": []}}, "only byte-level BPE"),
    ],
)
def test_tokenizer_that_llama_cpp_has_no_name_for_is_an_obstacle(tmp_path: Path, changes: Any, reason: str):
    assert tokenizer_obstacle(save_tokenizer(tmp_path / "known")) is None
    found = tokenizer_obstacle(save_tokenizer(tmp_path / "other", **changes))
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"blocks": make_blocks((gqa(2), LINEAR_FFN))}, "layer 0 has a linear FFN"),
        ({"blocks": make_blocks((NO_ATTENTION, swiglu(256)))}, "re-pack the model first"),
        ({"attention_bias": True}, "has biases"),
    ],
)
def test_what_the_format_cannot_say_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str):
    with pytest.raises(CheckpointError, match=reason):
        written(tmp_path, make_architecture(**changes))


def test_values_beyond_fp16_are_refused(tmp_path: Path):
    architecture = make_architecture()
    state = make_model(architecture).state_dict()
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight has values beyond the range of fp16"):
        write_gguf(
            tmp_path / "model.gguf",
            architecture=architecture,
            read=state.__getitem__,
            precision="fp16",
            tokenizer_dir=None,
        )


def test_checkpoint_is_repacked_on_the_way(tmp_path: Path):
    blocks = make_blocks((NO_ATTENTION, swiglu(48)), (gqa(2), NO_FFN), (NO_ATTENTION, swiglu(300)))
    architecture = make_architecture(blocks=blocks)
    save_checkpoint(
        tmp_path / "checkpoint",
        architecture=architecture,
        tensors=make_model(architecture).state_dict(),
        tokenizer_dir=make_tokenizer_dir(tmp_path / "tokenizer"),
    )
    export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", precision="fp32")
    reader = GGUFReader(tmp_path / "model.gguf")
    assert key(reader, "deci.attention.head_count_kv") == [1, 2]
    assert key(reader, "deci.feed_forward_length") == [256, 512]
    up = values_of(reader)["blk.1.ffn_up.weight"]
    original = make_model(architecture).state_dict()["model.layers.2.mlp.up_proj.weight"].numpy()
    assert np.array_equal(up[:300], original)
    assert not up[300:].any()
