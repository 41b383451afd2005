"""A small random parent with its tokenizer, a model that differs from it, and one torch thread."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.artifacts import ArtifactStore
from pipeline.data.benchmarks import MultipleChoiceItem
from pipeline.data.documents import Document
from pipeline.data.evaluation_sets import (
    save_held_out,
    save_held_out_items,
    save_instruction_items,
    save_multiple_choice,
    save_reasoning_items,
)
from pipeline.data.reasoning_items import generate_items
from pipeline.model.checkpoint import load_model, load_tokenizer, save_checkpoint
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, build_model
from pipeline.model.random_parent import make_random_parent
from pipeline.recipe import RandomParent
from tests.pipeline.evaluation.stages import INSTRUCTED, OTHER_TASK, TASK, publish


@pytest.fixture(scope="session")
def parent_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("parent")
    config = RandomParent(
        kind="random",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        seed=1,
    )
    make_random_parent(config, out_dir=directory)
    return directory


@pytest.fixture(scope="session")
def parent(parent_dir: Path) -> HeterogeneousLlamaForCausalLM:
    return load_model(parent_dir, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer(parent_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(parent_dir)


@pytest.fixture(scope="session")
def other(parent: HeterogeneousLlamaForCausalLM) -> HeterogeneousLlamaForCausalLM:
    return build_model(parent.architecture, dtype=torch.float32, seed=7, initializer_range=0.2)


@pytest.fixture
def artifacts(tmp_path: Path, parent_dir: Path, other: HeterogeneousLlamaForCausalLM) -> dict[str, Path]:
    store = ArtifactStore(tmp_path)
    shutil.copytree(parent_dir, store.directory("parent_checkpoint", "f00"))
    sets_dir = store.directory("evaluation_sets", "f00")
    save_held_out(
        sets_dir, "prose", [Document(document_id=str(n), text=f"Sentence {n} of a text. " * 4) for n in range(4)]
    )
    save_multiple_choice(sets_dir, "quiz", [MultipleChoiceItem(prompt="1 + 1 =", choices=("2", "three"), gold=0)])
    save_reasoning_items(sets_dir, generate_items(TASK, num_items=3, seed=5, exclude_questions=frozenset()))
    save_held_out_items(sets_dir, generate_items(OTHER_TASK, num_items=2, seed=5, exclude_questions=frozenset()))
    save_instruction_items(sets_dir, INSTRUCTED)
    for name in ("child", "fused", "kd", "cpt", "sft", "rl"):
        directory = store.directory(f"{name}_checkpoint", "f00")
        save_checkpoint(
            directory, architecture=other.architecture, tensors=other.state_dict(), tokenizer_dir=parent_dir
        )
        (directory / "notes.json").write_text(f'"{name}"')  # artifacts differ, checkpoints do not
    names = ("parent", "child", "fused", "kd", "cpt", "sft", "rl")
    found = {f"{name}_checkpoint": publish(store, f"{name}_checkpoint") for name in names}
    found["evaluation_sets"] = publish(store, "evaluation_sets")
    return found
