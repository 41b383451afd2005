"""A tiny random checkpoint with a byte-level tokenizer, made once."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.data.reasoning_items import ReasoningItem, generate_items
from pipeline.model.checkpoint import load_model, load_tokenizer
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.model.random_parent import make_random_parent
from pipeline.recipe import RandomParent, ReasoningTask


@pytest.fixture(scope="session")
def parent_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reasoning_parent")
    make_random_parent(
        RandomParent(
            kind="random",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.05,
            tie_word_embeddings=True,
            seed=0,
        ),
        out_dir=directory,
    )
    return directory


@pytest.fixture(scope="session")
def tokenizer(parent_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(parent_dir)


@pytest.fixture(scope="session")
def model(parent_dir: Path) -> HeterogeneousLlamaForCausalLM:
    return load_model(parent_dir, dtype=torch.float32)


@pytest.fixture(scope="session")
def items() -> list[ReasoningItem]:
    """Ten sums of two numbers."""
    task = ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    return generate_items(task, num_items=10, seed=4, exclude_questions=set())
