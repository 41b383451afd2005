"""Super-49B and Ultra-253B layer by layer, as their config.json lists them; and their patterns as models that run."""

from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.architecture import NO_ATTENTION, NO_FFN, BlockSpec, gqa, swiglu
from pipeline.costs import kv_bytes_per_token, num_parameters
from pipeline.model.architecture_files import load_architecture
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.decilm import register
from pipeline.model.decilm_config import decilm_architecture
from pipeline.model.export_decilm import export_decilm
from pipeline.model.repacking import padded
from tests.pipeline.model.builders import make_architecture, make_model, make_tokenizer_dir, num_elements, random_ids

SUPER, ULTRA = "llama-3.3-nemotron-super-49b", "llama-3.1-nemotron-ultra-253b"
# (number of layers, with attention, ffn_mult), in order.
SUPER_LAYERS = [
    *[(1, True, 2.625), (5, True, 5.25), (2, False, 2.625), (3, True, 5.25), (1, False, 3.28125), (30, True, 5.25)],
    *[(1, False, 1.3125), (2, False, 2.625), (1, False, 1.3125), (1, False, 5.25), (1, False, 1.3125)],
    *[(1, False, 2.625), (3, False, 1.3125), (1, True, 5.25), (1, False, 1.3125), (2, False, 1.0)],
    *[(1, False, 1.3125), (3, False, 1.0), (2, False, 1.3125), (2, False, 0.5), (2, False, 1.0), (2, False, 0.5)],
    *[(1, False, 1.0), (2, False, 0.5), (9, True, 5.25)],
]
ULTRA_LAYERS = [
    *[(1, True, 0.4875), (1, True, 0.975), (6, True, 1.4625), (4, True, 1.95), (8, True, 4.875), (1, True, 2.4375)],
    *[(3, True, 1.95), (1, False, 1.95), (1, True, 4.875), (1, False, 4.875), (17, True, 4.875), (3, True, 3.4125)],
    *[(1, True, 2.925), (3, True, 2.4375), (2, False, 2.4375), (1, True, 2.4375), (7, False, 2.4375)],
    *[(1, True, 2.4375), (1, True, 2.925), (1, True, 4.875), (1, False, 4.875), (1, True, 4.875)],
    *[(1, False, 36.5625), (1, False, 39.0), (1, False, 31.40625), (1, False, 27.5625), (1, False, 1.95)],
    *[(1, True, 1.95), (3, True, 2.4375), (1, True, 3.4125), (4, True, 4.875), (1, True, 2.4375)],
]


def published_config(
    layers: list[tuple[bool, float | None]], *, hidden_size: int, num_heads: int, factor: float
) -> Any:
    """A config.json with the keys of the published ones, two of which transformers alone reads."""
    return {
        "_name_or_path": "llama_nemotron",
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "block_configs": [
            {
                "attention": {
                    "n_heads_in_group": num_heads // 8 if has_attention else None,
                    "no_op": not has_attention,
                    "num_sink_tokens": None,
                    "replace_with_linear": False,
                    "sparsify": None,
                    "unshifted_sink": False,
                    "use_prefill_window_in_sink_attention": False,
                    "window_length": None,
                },
                "ffn": {
                    "ffn_mult": multiplier,
                    "no_op": multiplier is None,
                    "replace_with_linear": False,
                    "sparsify": None,
                },
            }
            for has_attention, multiplier in layers
        ],
        "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_008, 128_009],
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": 131_072,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": num_heads,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": factor,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.48.3",
        "use_cache": True,
        "vocab_size": 128_256,
    }


def expanded(runs: list[tuple[int, bool, float]]) -> list[tuple[bool, float | None]]:
    return list(chain.from_iterable(repeat((attention, multiplier), count) for count, attention, multiplier in runs))


SUPER_CONFIG = published_config(expanded(SUPER_LAYERS), hidden_size=8192, num_heads=64, factor=8.0)
ULTRA_SIZES = {"hidden_size": 16_384, "num_heads": 128, "factor": 16.0}


@pytest.mark.parametrize(
    ("name", "config"),
    [(SUPER, SUPER_CONFIG), (ULTRA, published_config(expanded(ULTRA_LAYERS), **ULTRA_SIZES))],
    ids=["super", "ultra"],
)
def test_shipped_file_says_what_the_published_one_does(name: str, config: dict[str, Any]):
    assert decilm_architecture(config, token_ids={}, path=Path("config.json")) == load_architecture(name)


def test_published_ultra_with_its_81_placeholders_costs_the_same():
    layers = [layer for real in expanded(ULTRA_LAYERS) for layer in (real, (False, None))]
    published = decilm_architecture(published_config(layers, **ULTRA_SIZES), token_ids={}, path=Path("config.json"))
    shipped = load_architecture(ULTRA)
    assert (published.num_hidden_layers, shipped.num_hidden_layers) == (162, 81)
    assert sum((block.attention, block.ffn) == (NO_ATTENTION, NO_FFN) for block in published.blocks) == 81
    assert num_parameters(published) == num_parameters(shipped) == 253_401_268_224
    cached = [kv_bytes_per_token(model, bytes_per_value=1.0) for model in (published, shipped)]
    assert cached == [131_072, 131_072]


@pytest.mark.parametrize("name", [SUPER, ULTRA])
@torch.no_grad()
def test_pattern_of_the_published_model_runs_exported_at_a_256th_of_its_width(name: str, tmp_path: Path):
    blocks = [
        BlockSpec(
            attention=NO_ATTENTION if block.attention == NO_ATTENTION else gqa(1),
            ffn=swiglu((block.ffn.intermediate_size or 0) // 256),
            parent_layers=block.parent_layers,
        )
        for block in load_architecture(name).blocks
    ]
    architecture = make_architecture(blocks=blocks, num_attention_heads=8, head_dim=4, tie_word_embeddings=False)
    reference = make_model(architecture)
    save_checkpoint(
        tmp_path / "checkpoint",
        architecture=architecture,
        tensors=reference.state_dict(),
        tokenizer_dir=make_tokenizer_dir(tmp_path / "tokenizer"),
    )
    export_decilm(tmp_path / "checkpoint", out_dir=tmp_path / "export")

    read = load_architecture(str(tmp_path / "export"))
    assert read == padded(architecture)
    register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    assert num_parameters(read) == num_elements(list(model.parameters()))
    ids_BT = random_ids(20)
    torch.testing.assert_close(model(ids_BT).logits, reference(ids_BT).logits, rtol=1e-4, atol=1e-4)
