"""The DeciLM export: schema, padding, and the model that transformers loads from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.architecture import LINEAR_ATTENTION, LINEAR_FFN, NO_ATTENTION, NO_FFN, gqa, swiglu
from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.decilm import register
from pipeline.model.decilm_config import ffn_multiplier
from pipeline.model.export_decilm import export_decilm
from pipeline.model.exported_code.configuration_decilm import DeciLMConfig, ffn_width
from tests.pipeline.model.builders import (
    LLAMA3_ROPE,
    make_architecture,
    make_blocks,
    make_model,
    make_tokenizer_dir,
    random_ids,
)

EVERY_KIND = make_blocks(
    (NO_ATTENTION, swiglu(300)),
    (gqa(2), NO_FFN),
    (LINEAR_ATTENTION, LINEAR_FFN),
    (gqa(4), swiglu(512)),
    (NO_ATTENTION, NO_FFN),
)
ATTENTION_KEYS = [
    "n_heads_in_group",
    "no_op",
    "num_sink_tokens",
    "replace_with_linear",
    "sparsify",
    "unshifted_sink",
    "use_prefill_window_in_sink_attention",
    "window_length",
]


def exported(tmp_path: Path, **changes: Any) -> Path:
    architecture = make_architecture(blocks=EVERY_KIND, **changes)
    tokenizer_dir = make_tokenizer_dir(tmp_path / "tokenizer")
    save_checkpoint(
        tmp_path / "checkpoint",
        architecture=architecture,
        tensors=make_model(architecture).state_dict(),
        tokenizer_dir=tokenizer_dir,
    )
    export_decilm(tmp_path / "checkpoint", out_dir=tmp_path / "export")
    return tmp_path / "export"


def test_config_has_exactly_the_published_keys(tmp_path: Path):
    config = json.loads((exported(tmp_path) / "config.json").read_text())
    assert config["model_type"] == "nemotron-nas"
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["intermediate_size"] is None
    assert config["num_key_value_heads"] is None
    assert "head_dim" not in config
    assert len(config["block_configs"]) == config["num_hidden_layers"] == 4
    for block in config["block_configs"]:
        assert sorted(block["attention"]) == ATTENTION_KEYS
        assert sorted(block["ffn"]) == ["ffn_mult", "no_op", "replace_with_linear", "sparsify"]
    groups = [block["attention"]["n_heads_in_group"] for block in config["block_configs"]]
    assert groups == [4, 2, None, 1]
    multipliers = [block["ffn"]["ffn_mult"] for block in config["block_configs"]]
    assert [None if value is None else ffn_width(value, hidden_size=32) for value in multipliers] == [
        512,
        None,
        None,
        512,
    ]


def test_search_facts_keep_the_true_widths(tmp_path: Path):
    facts = json.loads((exported(tmp_path) / "refit.json").read_text())
    assert [block["intermediate_size"] for block in facts["blocks"]] == [300, None, None, 512]
    assert [block["num_key_value_heads"] for block in facts["blocks"]] == [None, 2, None, 4]
    assert [block["parent_layers"] for block in facts["blocks"]] == [[0], [1], [2], [3, 4]]
    assert facts["num_layers_before_repacking"] == 5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500_000.0},
        {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    ],
    ids=["plain", "untied_llama3", "biases_head_dim"],
)
@torch.no_grad()
def test_registered_class_computes_what_the_checkpoint_does(tmp_path: Path, changes: dict[str, Any]):
    directory = exported(tmp_path, **changes)
    register()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    reference = make_model(make_architecture(blocks=EVERY_KIND, **changes))
    ids_BT = random_ids(20)
    torch.testing.assert_close(model(ids_BT).logits, reference(ids_BT).logits, rtol=1e-5, atol=1e-5)
    kwargs = {"attention_mask": torch.ones_like(ids_BT), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids_BT, **kwargs), reference.generate(ids_BT, **kwargs))


def test_registered_config_reads_rope_and_blocks(tmp_path: Path):
    directory = exported(tmp_path, rope_scaling=LLAMA3_ROPE, rope_theta=500_000.0)
    register()
    config = AutoConfig.from_pretrained(directory)
    assert isinstance(config, DeciLMConfig)
    assert config.rope_theta == 500_000.0
    assert config.rope_scaling["rope_type"] == "llama3"
    assert config.block_configs is not None
    assert config.block_configs[1].attention.n_heads_in_group == 2
    written = json.loads((directory / "config.json").read_text())
    assert written["rope_theta"] == 500_000.0
    assert written["rope_scaling"] == LLAMA3_ROPE.model_dump()


def test_code_in_the_export_imports_nothing_of_this_project(tmp_path: Path):
    directory = exported(tmp_path)
    for name in ("configuration_decilm.py", "modeling_decilm.py"):
        assert "pipeline" not in (directory / name).read_text()


def test_tokenizer_loads_through_auto_tokenizer(tmp_path: Path):
    directory = exported(tmp_path)
    register()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("héllo 12").input_ids) == "héllo 12"
    assert tokenizer.chat_template


@pytest.mark.parametrize("hidden_size", [32, 576, 2048, 4096, 8192, 16384])
def test_multiplier_gives_every_width_back(hidden_size: int):
    for width in range(256, 8 * hidden_size + 256, 256):
        assert ffn_width(ffn_multiplier(width, hidden_size=hidden_size), hidden_size=hidden_size) == width


def test_multipliers_of_the_published_model_give_its_widths():
    published = {36.5625: 399360, 39.0: 425984, 31.40625: 343040, 27.5625: 301056, 4.875: 53248}
    for multiplier, width in published.items():
        assert ffn_width(multiplier, hidden_size=16384) == width


def test_width_that_is_no_multiple_of_256_is_refused():
    with pytest.raises(CheckpointError, match="comes back as 512"):
        ffn_multiplier(300, hidden_size=576)
