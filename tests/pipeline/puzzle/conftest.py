"""A tiny parent checkpoint and packed tokens, published once per session as the artifacts stages read."""

import pytest
import torch

from pipeline.artifacts import ArtifactStore
from pipeline.data.packed import PackedTokens, Split, save_packed
from pipeline.model.random_parent import make_random_parent
from pipeline.recipe import RandomParent
from pipeline.stage import StageResult
from pipeline.stages import channel_importance
from pipeline.stages.configs import ImportanceStage
from tests.pipeline.puzzle.line import Line, make_line
from tests.pipeline.puzzle.workplace import IMPORTANCE, SEQUENCE_LENGTH, Workplace, publish


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("store")
    store = ArtifactStore(root)
    parent = RandomParent(
        kind="random",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        # Large enough that attention and FFN visibly change the residual stream.
        initializer_range=0.2,
        tie_word_embeddings=True,
        seed=3,
    )
    parent_dir, mixture_dir = store.directory("parent_checkpoint", "p"), store.directory("distillation_mix", "m")
    parent_dir.mkdir(parents=True)
    architecture = make_random_parent(parent, out_dir=parent_dir)
    generator = torch.Generator().manual_seed(5)
    windows: dict[Split, int] = {"train": 12, "validation": 8}
    for split, num_windows in windows.items():
        tokens_NT = torch.randint(0, architecture.vocab_size, (num_windows, SEQUENCE_LENGTH), generator=generator)
        positions_NT = torch.arange(SEQUENCE_LENGTH).expand_as(tokens_NT)
        packed = PackedTokens(tokens_NT=tokens_NT, labels_NT=tokens_NT, position_ids_NT=positions_NT)
        save_packed(mixture_dir, split, packed)
    importance_dir = store.directory("channel_importance", "i")
    place = Workplace(
        store_root=root,
        parent_dir=parent_dir,
        mixture_dir=mixture_dir,
        importance_dir=importance_dir,
        architecture=architecture,
    )
    publish(store, "parent_checkpoint", "p", StageResult())
    publish(store, "distillation_mix", "m", StageResult())
    config = ImportanceStage(importance=IMPORTANCE, with_output_curvature=True)
    result = channel_importance.run(config, place.inputs(), importance_dir)
    assert result.metrics == {"num_non_finite_values": 0, "num_tokens": 64}
    publish(store, "channel_importance", "i", result)
    return place


@pytest.fixture(scope="session")
def line(workplace: Workplace) -> Line:
    return make_line(workplace)
