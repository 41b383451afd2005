"""Replace-1-block scores against whole forward passes of models with one block swapped."""

from pathlib import Path

import pytest
import torch

from pipeline.architecture import BlockSpec
from pipeline.model.checkpoint import TensorReader
from pipeline.model.heterogeneous import build_model
from pipeline.progress import SilentReporter
from pipeline.puzzle import scoring
from pipeline.puzzle.importance import load_importance
from pipeline.puzzle.initial import build_variant
from pipeline.puzzle.library import trainable_keys
from pipeline.puzzle.scoring import LayerVariants, score_blocks
from pipeline.puzzle.search_space import SearchSpace, resolve
from pipeline.recipe import SearchSpaceConfig
from tests.pipeline.puzzle.conftest import Workplace


def make_space(workplace: Workplace) -> SearchSpace:
    config = SearchSpaceConfig(
        attention=("parent", 1, "linear", "no_op"), ffn=("parent", 16, "linear", "no_op"), overrides=(), portable=False
    )
    return resolve(config, workplace.architecture)


def initial_variants(workplace: Workplace, space: SearchSpace, layer: int) -> LayerVariants:
    reader, importance = TensorReader(workplace.parent_dir), load_importance(workplace.importance_dir)
    return {
        (key.subblock, key.variant): build_variant(key, workplace.architecture, reader, importance, dtype=torch.float32)
        for key in trainable_keys(space)
        if key.layer == layer
    }


def swapped_logits(
    workplace: Workplace, space: SearchSpace, layer: int, block: BlockSpec, tokens_BT: torch.Tensor
) -> torch.Tensor:
    """Logits of a whole model with one block replaced, assembled tensor by tensor."""
    blocks = list(workplace.architecture.blocks)
    blocks[layer] = block
    child = build_model(workplace.architecture.with_blocks(blocks), dtype=torch.float32, seed=0)
    tensors = dict(workplace.model().state_dict())
    tensors = {name: value for name, value in tensors.items() if not name.startswith(f"model.layers.{layer}.")}
    parent_layer = workplace.model().model.layers[layer].state_dict()
    variants = initial_variants(workplace, space, layer)
    for subblock, spec, parent_spec, starts in (
        ("attention", block.attention, space.parent.attention, ("self_attn.", "input_layernorm.")),
        ("ffn", block.ffn, space.parent.ffn, ("mlp.", "post_attention_layernorm.")),
    ):
        if spec.kind == "no_op":
            continue
        own = parent_layer if spec == parent_spec else variants[subblock, spec.key].state_dict()
        tensors |= {f"model.layers.{layer}.{name}": value for name, value in own.items() if name.startswith(starts)}
    child.load_state_dict(tensors, strict=True)
    return child(input_ids=tokens_BT).logits.detach()


@pytest.mark.parametrize("batch_tokens", [16, 100, 10_000])
def test_score_blocks_equals_whole_forward_passes(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
):
    monkeypatch.setattr(scoring, "MAX_BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(scoring, "SLICE_TOKENS", 7)
    space, packed = make_space(workplace), workplace.packed("validation").take(48)
    scores = score_blocks(
        workplace.model(),
        space,
        lambda layer: initial_variants(workplace, space, layer),
        packed,
        work_dir=tmp_path,
        reporter=SilentReporter(),
    )
    assert len(scores.candidates) == space.num_candidates == 3 * 15
    parent = workplace.model()(input_ids=packed.tokens_NT).logits.detach().log_softmax(dim=-1)
    labels = packed.tokens_NT[:, 1:]
    parent_loss = torch.nn.functional.nll_loss(parent[:, :-1].flatten(0, 1), labels.flatten())
    assert scores.parent_lm_loss == pytest.approx(parent_loss.item(), rel=1e-5)
    for one in scores.candidates[:: 1 if batch_tokens == 100 else 6]:
        child = swapped_logits(workplace, space, one.layer, one.block, packed.tokens_NT).log_softmax(dim=-1)
        kl = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=parent.double()),
            torch.distributions.Categorical(logits=child.double()),
        ).mean()
        loss = torch.nn.functional.nll_loss(child[:, :-1].flatten(0, 1), labels.flatten())
        assert one.kl == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)
        assert one.lm_loss == pytest.approx(loss.item(), rel=1e-5)
        assert one.num_tokens == 48


def test_score_of_the_parents_own_block_is_zero(workplace: Workplace, tmp_path: Path):
    packed = workplace.packed("validation")
    model = workplace.model()
    config = SearchSpaceConfig(attention=("parent", 1), ffn=("parent",), overrides=(), portable=False)
    space = resolve(config, workplace.architecture)

    def parent_itself(layer: int) -> LayerVariants:
        return {("attention", "kv1"): model.model.layers[layer]}  # pyright: ignore[reportReturnType]

    scores = score_blocks(model, space, parent_itself, packed, work_dir=tmp_path, reporter=SilentReporter())
    assert [one.kl for one in scores.candidates] == [0.0, 0.0, 0.0]
    assert all(one.lm_loss == scores.parent_lm_loss for one in scores.candidates)


def test_score_blocks_killed_continues_with_the_next_layer(workplace: Workplace, tmp_path: Path):
    space, packed = make_space(workplace), workplace.packed("validation")
    loaded: list[int] = []

    def load(layer: int) -> LayerVariants:
        loaded.append(layer)
        if loaded == [0, 1]:
            raise KeyboardInterrupt
        return initial_variants(workplace, space, layer)

    model = workplace.model()
    with pytest.raises(KeyboardInterrupt):
        score_blocks(model, space, load, packed, work_dir=tmp_path / "a", reporter=SilentReporter())
    resumed = score_blocks(model, space, load, packed, work_dir=tmp_path / "a", reporter=SilentReporter())
    assert loaded == [0, 1, 1, 2]
    assert resumed == score_blocks(model, space, load, packed, work_dir=tmp_path / "b", reporter=SilentReporter())
