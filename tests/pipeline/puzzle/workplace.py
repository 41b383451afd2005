"""What the tests of Puzzle share: the upstream artifacts of a tiny parent, and publishing what a stage wrote."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.architecture import Architecture
from pipeline.artifacts import ArtifactStore
from pipeline.data.packed import PackedTokens, Split, load_packed
from pipeline.model.checkpoint import load_model
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.recipe import ImportanceConfig
from pipeline.stage import StageInputs, StageResult

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


def publish(store: ArtifactStore, asset: str, name: str, result: StageResult) -> None:
    store.publish(asset, name, result=result, wall_s=0.0, provenance={})
