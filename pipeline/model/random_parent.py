"""A parent made on the spot, for tests and first tries: random weights and a byte-level tokenizer."""

from pathlib import Path

import torch

from pipeline.architecture import Architecture
from pipeline.model.architecture_files import random_architecture
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


def make_random_parent(config: RandomParent, *, out_dir: Path) -> Architecture:
    """Write a randomly initialised fp32 checkpoint and return what it is.

    Token ids: 0 `<|endoftext|>`, 1 `<|im_start|>` (also BOS), 2 `<|im_end|>` (also EOS and padding), then one token per
    byte, then reserved tokens up to a multiple of 64, so that every id the model can emit can be decoded.

    Raises:
        RecipeError: when the head counts do not divide.
    """
    architecture = random_architecture(config)
    tokens = [END_OF_TEXT, TURN_START, TURN_END, *byte_alphabet()]
    num_reserved = architecture.vocab_size - len(tokens)
    reserved = [f"<|reserved_{index}|>" for index in range(num_reserved)]
    tokens += reserved
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
