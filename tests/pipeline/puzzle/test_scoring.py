"""Scores of blocks and of whole models against whole forward passes of models put together tensor by tensor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.architecture import BlockSpec
from pipeline.data.packed import PackedTokens
from pipeline.model.checkpoint import TensorReader
from pipeline.model.heterogeneous import build_model
from pipeline.progress import SilentReporter
from pipeline.puzzle import composition, divergence, whole_models
from pipeline.puzzle.block_keys import trainable_keys
from pipeline.puzzle.composition import LayerVariants
from pipeline.puzzle.divergence import Divergence, DivergenceSums, add_divergences
from pipeline.puzzle.importance import load_importance
from pipeline.puzzle.initial import build_variant
from pipeline.puzzle.scoring import score_blocks
from pipeline.puzzle.search_space import SearchSpace, resolve
from pipeline.puzzle.whole_models import score_models
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


def child_logits(
    workplace: Workplace, space: SearchSpace, blocks: Sequence[BlockSpec], tokens_BT: torch.Tensor
) -> torch.Tensor:
    """Logits of a whole model with these blocks, put together tensor by tensor."""
    child = build_model(workplace.architecture.with_blocks(blocks), dtype=torch.float32, seed=0)
    parent = workplace.model()
    tensors = {name: value for name, value in parent.state_dict().items() if not name.startswith("model.layers.")}
    for layer, block in enumerate(blocks):
        parent_layer = parent.model.layers[layer].state_dict()
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


def assert_measures(
    found: Divergence, workplace: Workplace, space: SearchSpace, blocks: Sequence[BlockSpec], packed: PackedTokens
) -> None:
    """Compare with distributions of whole forward passes."""
    parent = workplace.model()(input_ids=packed.tokens_NT).logits.detach().log_softmax(dim=-1)
    child = child_logits(workplace, space, blocks, packed.tokens_NT).log_softmax(dim=-1)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=parent.double()),
        torch.distributions.Categorical(logits=child.double()),
    ).mean()
    loss = torch.nn.functional.nll_loss(child[:, :-1].flatten(0, 1), packed.tokens_NT[:, 1:].flatten())
    assert found.kl == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)
    assert found.lm_loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.top1_error == (parent.argmax(dim=-1) != child.argmax(dim=-1)).double().mean().item()
    assert found.num_tokens == packed.num_tokens


@pytest.mark.parametrize("batch_tokens", [16, 100, 10_000])
def test_score_blocks_equals_whole_forward_passes(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
):
    monkeypatch.setattr(composition, "MAX_BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(divergence, "SLICE_TOKENS", 7)
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
    assert_measures(scores.base, workplace, space, workplace.architecture.blocks, packed)
    assert (scores.base.kl, scores.base.top1_error) == (0.0, 0.0)
    for one in scores.candidates[:: 1 if batch_tokens == 100 else 6]:
        blocks = list(workplace.architecture.blocks)
        blocks[one.layer] = one.block
        assert_measures(one.divergence, workplace, space, blocks, packed)


def test_score_blocks_around_a_child_swaps_one_of_its_blocks_and_still_compares_with_the_parent(
    workplace: Workplace, tmp_path: Path
):
    space, packed = make_space(workplace), workplace.packed("validation").take(48)
    base = tuple(options.blocks[index] for options, index in zip(space.layers, (5, 0, 14), strict=True))
    scores = score_blocks(
        workplace.model(),
        space,
        lambda layer: initial_variants(workplace, space, layer),
        packed,
        work_dir=tmp_path,
        reporter=SilentReporter(),
        base=base,
    )
    assert_measures(scores.base, workplace, space, base, packed)
    assert scores.base.kl > 0
    assert all(one.block.key != base[one.layer].key for one in scores.candidates)
    assert len(scores.candidates) == 3 * 15
    for one in scores.candidates[::4]:
        blocks = list(base)
        blocks[one.layer] = one.block
        assert_measures(one.divergence, workplace, space, blocks, packed)


def test_score_models_equals_whole_forward_passes_and_shares_equal_prefixes(workplace: Workplace):
    space, packed = make_space(workplace), workplace.packed("validation").take(48)
    choices = {"a": (0, 3, 7), "b": (0, 3, 8), "c": (6, 3, 7), "parent": (0, 0, 0), "a again": (0, 3, 7)}
    children = {
        name: tuple(options.blocks[index] for options, index in zip(space.layers, places, strict=True))
        for name, places in choices.items()
    }
    runs: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        runs.append(len(arguments[1]))
        return composition.run_layers(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_models, "run_layers", counted)
        found = score_models(
            workplace.model(),
            children,
            lambda layer: initial_variants(workplace, space, layer),
            packed,
            reporter=SilentReporter(),
        )
    # Layer 0: two kinds of block; layer 1: three prefixes; layer 2: four children.
    assert runs == [1] * (2 + 3 + 4)
    assert list(found) == list(children)
    assert found["a"] == found["a again"]
    assert found["parent"].kl == found["parent"].top1_error == 0.0
    assert found["parent"].hidden_cosine == pytest.approx(0, abs=1e-7)
    for name, blocks in children.items():
        assert_measures(found[name], workplace, space, blocks, packed)


def test_score_of_the_parents_own_block_is_zero(workplace: Workplace, tmp_path: Path):
    packed = workplace.packed("validation")
    model = workplace.model()
    config = SearchSpaceConfig(attention=("parent", 1), ffn=("parent",), overrides=(), portable=False)
    space = resolve(config, workplace.architecture)

    def parent_itself(layer: int) -> LayerVariants:
        return {("attention", "kv1"): model.model.layers[layer]}  # pyright: ignore[reportReturnType]

    scores = score_blocks(model, space, parent_itself, packed, work_dir=tmp_path, reporter=SilentReporter())
    assert [one.divergence.kl for one in scores.candidates] == [0.0, 0.0, 0.0]
    assert all(one.divergence == scores.base for one in scores.candidates)


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


def test_divergence_of_logits_that_moved_beyond_the_exponents_range_is_exact(workplace: Workplace):
    model, packed = workplace.model(), workplace.packed("validation").take(16)
    generator = torch.Generator().manual_seed(0)
    parent_BTD, child_BTD = (torch.randn(1, 16, model.config.hidden_size, generator=generator) for _ in range(2))
    for scale in (1.0, 300.0):
        sums = DivergenceSums()
        with torch.no_grad():
            model.lm_head.weight.copy_(scale * workplace.model().lm_head.weight)
            add_divergences([sums], model, [child_BTD], parent_BTD, packed.labels_NT[:1])
            parent, child = (
                model.lm_head(model.model.norm(states)).double().log_softmax(dim=-1)
                for states in (parent_BTD, child_BTD)
            )
        moved = (model.lm_head(model.model.norm(child_BTD)) - model.lm_head(model.model.norm(parent_BTD))).max()
        assert (moved > divergence.LARGEST_CHANGE) == (scale > 1)
        kl = torch.nn.functional.kl_div(child, parent, log_target=True, reduction="sum") / 16
        loss = torch.nn.functional.nll_loss(child[0, :-1], packed.labels_NT[0, 1:])
        assert sums.means.kl == pytest.approx(kl.item(), rel=1e-5)
        assert sums.means.lm_loss == pytest.approx(loss.item(), rel=1e-5)
