"""A tiny parent checkpoint and packed tokens, published once per session as the artifacts stages read."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipeline.architecture import Architecture
from pipeline.artifacts import ArtifactStore
from pipeline.data.packed import PackedTokens, Split, load_packed, save_packed
from pipeline.model.checkpoint import load_model
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.model.random_parent import make_random_parent
from pipeline.recipe import ImportanceConfig, RandomParent
from pipeline.stage import StageInputs, StageResult
from pipeline.stages import channel_importance
from pipeline.stages.configs import ImportanceStage

SEQUENCE_LENGTH = 16
IMPORTANCE = ImportanceConfig(tokens=64, batch_size=2, channel_rounds=1, kv_heads="mean", precision="fp32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Workplace:
    """Published upstream artifacts of a 3-layer parent and the store they are in."""

    store_root: Path
    parent_dir: Path
    mixture_dir: Path
    importance_dir: Path
    architecture: Architecture

    def inputs(self, **artifacts: Path) -> StageInputs:
        """What a stage is given, with further upstream artifacts."""
        upstream = {
            "parent_checkpoint": self.parent_dir,
            "distillation_mix": self.mixture_dir,
            "channel_importance": self.importance_dir,
        }
        return StageInputs(
            artifacts=upstream | artifacts, store_root=self.store_root, downloads=self.store_root / "downloads"
        )

    def model(self, dtype: torch.dtype = torch.float32) -> HeterogeneousLlamaForCausalLM:
        """The parent, read anew."""
        return load_model(self.parent_dir, dtype=dtype)

    def packed(self, split: Split = "train") -> PackedTokens:
        """The mixture's windows."""
        return load_packed(self.mixture_dir, split)


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
    windows: dict[Split, int] = {"train": 12, "validation": 4}
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


def publish(store: ArtifactStore, asset: str, name: str, result: StageResult) -> None:
    store.publish(asset, name, result=result, wall_s=0.0, provenance={})
