"""A parent made on the spot, for tests and first tries: random weights and a byte-level tokenizer."""

from pathlib import Path

import torch

from pipeline.architecture import Architecture, BlockSpec, gqa, swiglu
from pipeline.errors import RecipeError
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.heterogeneous import build_model
from pipeline.model.tokenizer_files import (
    CHATML_TEMPLATE,
    SpecialTokens,
    byte_alphabet,
    save_byte_level_bpe,
    whole_text_bytes,
)
from pipeline.recipe import RandomParent

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_VOCAB_MULTIPLE = 64


def make_random_parent(config: RandomParent, *, out_dir: Path) -> Architecture:
    """Write a randomly initialised fp32 checkpoint and return what it is.

    Token ids: 0 `<|endoftext|>`, 1 `<|im_start|>` (also BOS), 2 `<|im_end|>` (also EOS and padding), then one token per
    byte, then reserved tokens up to a multiple of 64, so that every id the model can emit can be decoded.

    Raises:
        RecipeError: when the head counts do not divide.
    """
    if config.hidden_size % (2 * config.num_attention_heads) or config.num_attention_heads % config.num_key_value_heads:
        raise RecipeError(
            f"parent: hidden_size {config.hidden_size}, num_attention_heads {config.num_attention_heads} and "
            f"num_key_value_heads {config.num_key_value_heads} do not fit: hidden_size must be a multiple of twice the "
            "attention heads, and those a multiple of the key/value heads"
        )
    tokens = [END_OF_TEXT, TURN_START, TURN_END, *byte_alphabet()]
    num_reserved = -len(tokens) % _VOCAB_MULTIPLE
    reserved = [f"<|reserved_{index}|>" for index in range(num_reserved)]
    tokens += reserved
    block = {"attention": gqa(config.num_key_value_heads), "ffn": swiglu(config.intermediate_size)}
    architecture = Architecture(
        vocab_size=len(tokens),
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=2,
        blocks=tuple(BlockSpec(**block, parent_layers=(layer,)) for layer in range(config.num_hidden_layers)),
    )
    model = build_model(architecture, dtype=torch.float32, seed=config.seed, initializer_range=config.initializer_range)
    save_checkpoint(out_dir, architecture=architecture, tensors=model.state_dict(), tokenizer_dir=None)
    save_byte_level_bpe(
        out_dir,
        tokens=tokens,
        merges=[],
        pre_tokenizer=whole_text_bytes(),
        special=SpecialTokens(
            bos=TURN_START,
            eos=TURN_END,
            pad=TURN_END,
            unk=None,
            control=(END_OF_TEXT, TURN_START, TURN_END, *reserved),
        ),
        chat_template=CHATML_TEMPLATE,
        max_tokens=config.max_position_embeddings,
    )
    return architecture
