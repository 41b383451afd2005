"""Scores of blocks and of whole models against whole forward passes of models put together tensor by tensor."""

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.architecture import BlockSpec
from pipeline.data.benchmarks import MultipleChoiceItem
from pipeline.data.choice_texts import scored_text
from pipeline.data.packed import PackedTokens
from pipeline.evaluation.multiple_choice import choice_log_likelihoods, multiple_choice_quality
from pipeline.model.checkpoint import TensorReader, load_tokenizer
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, build_model
from pipeline.progress import Reporter, SilentReporter
from pipeline.puzzle import activations, composition, divergence
from pipeline.puzzle.activations import ActivationStore
from pipeline.puzzle.block_keys import trainable_keys
from pipeline.puzzle.composition import LayerVariants
from pipeline.puzzle.divergence import Divergence, DivergenceSums, ParentSlices, add_divergences
from pipeline.puzzle.importance import load_importance
from pipeline.puzzle.initial import build_variant
from pipeline.puzzle.score_functions import DivergenceScore, TaskScore
from pipeline.puzzle.scoring import Scores, score_blocks
from pipeline.puzzle.search_space import SearchSpace, resolve
from pipeline.puzzle.whole_models import score_models
from pipeline.recipe import SearchSpaceConfig
from tests.pipeline.puzzle.workplace import Workplace

BF16 = torch.bfloat16


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


def whole_child(workplace: Workplace, space: SearchSpace, blocks: Sequence[BlockSpec]) -> HeterogeneousLlamaForCausalLM:
    """A whole model with these blocks, put together tensor by tensor."""
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
    return child


def predictions(model: HeterogeneousLlamaForCausalLM, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and the states that the head reads, of a whole forward pass, in float64."""
    with torch.no_grad():
        found = model(input_ids=tokens_BT, output_hidden_states=True)
    return found.logits.double().log_softmax(dim=-1), found.hidden_states[-1].double()


def assert_measures(
    found: Divergence, workplace: Workplace, space: SearchSpace, blocks: Sequence[BlockSpec], packed: PackedTokens
) -> None:
    """Compare with distributions and hidden states of whole forward passes."""
    parent, parent_BTD = predictions(workplace.model(), packed.tokens_NT)
    child, child_BTD = predictions(whole_child(workplace, space, blocks), packed.tokens_NT)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=parent), torch.distributions.Categorical(logits=child)
    ).mean()
    loss = torch.nn.functional.nll_loss(child[:, :-1].flatten(0, 1), packed.tokens_NT[:, 1:].flatten())
    cosine_BT = (parent_BTD * child_BTD).sum(dim=-1) / (parent_BTD.norm(dim=-1) * child_BTD.norm(dim=-1))
    assert found.kl == pytest.approx(kl.item(), rel=1e-5, abs=1e-9)
    assert found.lm_loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.hidden_cosine == pytest.approx(1 - cosine_BT.mean().item(), rel=1e-4, abs=2e-7)
    assert found.top1_error == (parent.argmax(dim=-1) != child.argmax(dim=-1)).double().mean().item()
    assert found.num_tokens == packed.num_tokens


def score(
    workplace: Workplace,
    space: SearchSpace,
    packed: PackedTokens,
    work_dir: Path,
    *,
    max_activation_bytes: int = 10**9,
    reporter: Reporter | None = None,
) -> Scores:
    return score_blocks(
        workplace.model(),
        space,
        lambda layer: initial_variants(workplace, space, layer),
        [DivergenceScore(packed=packed)],
        work_dir=work_dir,
        max_activation_bytes=max_activation_bytes,
        reporter=reporter or SilentReporter(),
    )


# Three windows of 16 tokens, 32 float32 values each: 6 KiB for every set of states; with 9 KB one and a half stay.
# Slices of 7 tokens and pieces of 3 leave rests; 20,000 bytes keep some slices and not others.
@pytest.mark.parametrize(
    ("batch_tokens", "max_activation_bytes", "max_kept_bytes"),
    [(16, 0, 0), (16, 9000, 10**9), (100, 10**9, 20_000), (10_000, 0, 10**9)],
)
def test_score_blocks_equals_whole_forward_passes(
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_tokens: int,
    max_activation_bytes: int,
    max_kept_bytes: int,
):
    monkeypatch.setattr(composition, "MAX_BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(divergence, "SLICE_TOKENS", 7)
    monkeypatch.setattr(divergence, "PIECE_TOKENS", 3)
    monkeypatch.setattr(divergence, "MAX_KEPT_BYTES", max_kept_bytes)
    space, packed = make_space(workplace), workplace.packed("validation").take(48)
    scores = score(workplace, space, packed, tmp_path, max_activation_bytes=max_activation_bytes)
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
        [DivergenceScore(packed=packed)],
        work_dir=tmp_path,
        max_activation_bytes=10**9,
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


@pytest.mark.parametrize("max_activation_bytes", [0, 10**9])
def test_score_models_equals_whole_forward_passes_and_shares_equal_prefixes(
    workplace: Workplace, tmp_path: Path, max_activation_bytes: int
):
    space, packed = make_space(workplace), workplace.packed("validation").take(48)
    choices = {"a": (0, 3, 7), "b": (0, 3, 8), "c": (6, 3, 7), "parent": (0, 0, 0), "a again": (0, 3, 7)}
    children = {
        name: tuple(options.blocks[index] for options, index in zip(space.layers, places, strict=True))
        for name, places in choices.items()
    }
    runs: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        runs.append(len(arguments[1]))
        return composition.run_group(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "run_group", counted)
        found = score_models(
            workplace.model(),
            children,
            lambda layer: initial_variants(workplace, space, layer),
            [DivergenceScore(packed=packed)],
            work_dir=tmp_path,
            max_activation_bytes=max_activation_bytes,
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
    assert not list(tmp_path.rglob("*.safetensors"))


def test_activation_store_keeps_what_fits_and_gives_every_tensor_back_unchanged(tmp_path: Path):
    store = ActivationStore(tmp_path / "spilled", max_bytes=100)
    tensors = [torch.randn(size).to(dtype) for size, dtype in ((20, torch.float32), (20, torch.float32), (9, BF16))]
    held = [store.put(tensor) for tensor in tensors]
    assert [isinstance(one, torch.Tensor) for one in held] == [True, False, True]
    assert all(torch.equal(store.get(one), tensor) for one, tensor in zip(held, tensors, strict=True))
    store.drop(held[0])
    assert isinstance(store.put(tensors[1]), torch.Tensor)
    store.drop(held[1])
    assert not list((tmp_path / "spilled").iterdir())


def test_score_of_the_parents_own_block_is_zero(workplace: Workplace, tmp_path: Path):
    packed = workplace.packed("validation")
    model = workplace.model()
    config = SearchSpaceConfig(attention=("parent", 1), ffn=("parent",), overrides=(), portable=False)
    space = resolve(config, workplace.architecture)

    def parent_itself(layer: int) -> LayerVariants:
        return {("attention", "kv1"): model.model.layers[layer]}  # pyright: ignore[reportReturnType]

    scores = score_blocks(
        model,
        space,
        parent_itself,
        [DivergenceScore(packed=packed)],
        work_dir=tmp_path,
        max_activation_bytes=10**9,
        reporter=SilentReporter(),
    )
    assert [one.divergence.kl for one in scores.candidates] == [0.0, 0.0, 0.0]
    assert all(one.divergence == scores.base for one in scores.candidates)


class Recorder(SilentReporter):
    """Keeps every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def step(self, step: int, total: int, /, *, what: str, **metrics: float) -> None:
        """Keep one."""
        self.steps.append((step, total))


def test_score_blocks_killed_continues_with_the_next_layer_and_counts_no_rate_from_before(
    workplace: Workplace, tmp_path: Path
):
    space, packed = make_space(workplace), workplace.packed("validation")
    whole, first, second = Recorder(), Recorder(), Recorder()
    undisturbed = score(workplace, space, packed, tmp_path / "b", reporter=whole)
    with pytest.MonkeyPatch.context() as patch:

        def fail(_: float) -> float:
            if (tmp_path / "a/layer-000.json").exists():
                raise KeyboardInterrupt
            return 0.0

        patch.setattr(first, "step", lambda *_, **__: fail(0))
        with pytest.raises(KeyboardInterrupt):
            score(workplace, space, packed, tmp_path / "a", reporter=first)
    assert score(workplace, space, packed, tmp_path / "a", reporter=second) == undisturbed
    done = [step for step, _ in whole.steps]
    total = whole.steps[0][1]
    assert done[0] == 0
    assert done[-1] == total
    # The layers behind the first candidates are the most.
    shares = [after - before for before, after in itertools.pairwise(done)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    assert [step for step, _ in second.steps] == done[1:]


def test_task_error_equals_that_of_the_evaluation_on_whole_children(workplace: Workplace, tmp_path: Path):
    tokenizer = load_tokenizer(workplace.parent_dir)
    rng = random.Random(0)
    words = ["red", "green", "a", "bluish", "of it"]
    items = [
        MultipleChoiceItem(
            prompt=" ".join(rng.choices(words, k=rng.randint(1, 4))),
            choices=tuple(rng.sample(words, k=rng.randint(2, 4))),
            gold=rng.randint(0, 1),
        )
        for _ in range(12)
    ]
    space, packed = make_space(workplace), workplace.packed("validation").take(32)
    task = TaskScore.of(items, tokenizer=tokenizer, max_tokens=24)
    scores = score_blocks(
        workplace.model(),
        space,
        lambda layer: initial_variants(workplace, space, layer),
        [DivergenceScore(packed=packed), task],
        work_dir=tmp_path,
        max_activation_bytes=1000,
        reporter=SilentReporter(),
    )
    texts = [
        scored_text(item.prompt, choice=choice, tokenizer=tokenizer, max_tokens=24)
        for item in items
        for choice in item.choices
    ]
    errors = set()
    for one in [*scores.candidates[::5], None]:
        blocks = list(workplace.architecture.blocks)
        if one is not None:
            blocks[one.layer] = one.block
        child = whole_child(workplace, space, blocks)
        found = scores.base if one is None else one.divergence
        expected = multiple_choice_quality(child, items=items, tokenizer=tokenizer, max_tokens=24, batch_size=5)
        assert found.task_error == pytest.approx(1 - expected.accuracy.value)
        errors.add(found.task_error)
        if one is not None:
            (saved,) = json.loads((tmp_path / f"layer-{one.layer:03d}.json").read_text())[one.block.key][1].values()
            assert saved == pytest.approx(choice_log_likelihoods(child, texts=texts, batch_size=4), rel=1e-5)
    assert len(errors) > 1


def add_one(
    sums: DivergenceSums,
    model: HeterogeneousLlamaForCausalLM,
    child_BTD: torch.Tensor,
    parent_BTD: torch.Tensor,
    packed: PackedTokens,
) -> None:
    add_divergences(
        [sums], model, [child_BTD], parent_BTD, packed.labels_NT[:1], parent_slices=ParentSlices(), first_token=0
    )


def test_hidden_cosine_is_one_less_the_cosine_of_the_states_behind_the_final_norm(workplace: Workplace):
    model, packed = workplace.model(), workplace.packed("validation").take(16)
    first, second = torch.eye(model.config.hidden_size)[:2]
    plus, minus = first + second, first - second
    # The same, another length, the opposite, at a right angle with nothing in common, and at one before the norm alone:
    # its weights turn (1, 1) and (1, -1) into (2, 1) and (2, -1), whose cosine is 3 / 5.
    pairs = [(plus, plus), (plus, 5 * plus), (plus, -plus), (first, second), (plus, minus)]
    wanted = [0.0, 0.0, 2.0, 1.0, 0.4]
    parent_BTD, child_BTD = (torch.stack([*states, *[plus] * 11])[None] for states in zip(*pairs, strict=True))
    sums = DivergenceSums()
    with torch.no_grad():
        model.model.norm.weight[0] = 2.0
        add_one(sums, model, child_BTD, parent_BTD, packed)
    assert sums.measures["hidden_cosine"] == pytest.approx(sum(wanted) / 16, abs=1e-6)


def test_divergence_of_logits_that_moved_beyond_the_exponents_range_is_exact(workplace: Workplace):
    model, packed = workplace.model(), workplace.packed("validation").take(16)
    generator = torch.Generator().manual_seed(0)
    parent_BTD, child_BTD = (torch.randn(1, 16, model.config.hidden_size, generator=generator) for _ in range(2))
    for scale in (1.0, 300.0):
        sums = DivergenceSums()
        with torch.no_grad():
            model.lm_head.weight.copy_(scale * workplace.model().lm_head.weight)
            add_one(sums, model, child_BTD, parent_BTD, packed)
            parent, child = (
                model.lm_head(model.model.norm(states)).double().log_softmax(dim=-1)
                for states in (parent_BTD, child_BTD)
            )
        moved = (model.lm_head(model.model.norm(child_BTD)) - model.lm_head(model.model.norm(parent_BTD))).max()
        assert (moved > math.log(torch.finfo(torch.float32).max)) == (scale > 1)
        kl = torch.nn.functional.kl_div(child, parent, log_target=True, reduction="sum") / 16
        loss = torch.nn.functional.nll_loss(child[0, :-1], packed.labels_NT[0, 1:])
        assert sums.measures["kl"] == pytest.approx(kl.item(), rel=1e-5)
        assert sums.measures["lm_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_divergence_is_exact_where_all_logits_moved_together(workplace: Workplace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(divergence, "SLICE_TOKENS", 1)  # or the tokens that moved up would take the others' sum
    model, packed = workplace.model(), workplace.packed("validation").take(16)
    generator = torch.Generator().manual_seed(0)
    parent_BTD, child_BTD = (torch.randn(1, 16, model.config.hidden_size, generator=generator) for _ in range(2))
    sums = DivergenceSums()
    with torch.no_grad():
        # Adding one vector to every row moves all logits of a token alike, here by tens of nats, and no distribution.
        model.lm_head.weight += 10 * torch.randn(model.config.hidden_size, generator=generator)
        add_one(sums, model, child_BTD, parent_BTD, packed)
        parent_TV, child_TV = (
            model.lm_head(model.model.norm(states)).double()[0] for states in (parent_BTD, child_BTD)
        )
    moved_T = (child_TV - parent_TV).mean(dim=-1)
    assert moved_T.min() < -50
    assert moved_T.max() > 50
    parent_TV, child_TV = parent_TV.log_softmax(dim=-1), child_TV.log_softmax(dim=-1)
    kl = torch.nn.functional.kl_div(child_TV, parent_TV, log_target=True, reduction="sum") / 16
    loss = torch.nn.functional.nll_loss(child_TV[:-1], packed.labels_NT[0, 1:])
    assert sums.measures["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert sums.measures["lm_loss"] == pytest.approx(loss.item(), rel=1e-5)
