"""What holds for any input: search space, costs, fingerprints, and the programme against enumeration."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline import costs
from pipeline.architecture import LINEAR_ATTENTION, LINEAR_FFN, NO_ATTENTION, NO_FFN, Architecture, gqa, swiglu
from pipeline.errors import RecipeError
from pipeline.fingerprint import canonical_json, fingerprint
from pipeline.model.shards import checkpoint_shapes
from pipeline.puzzle.programme import Programme, Row, least_overrun, solve_diverse, solve_programme
from pipeline.puzzle.search_space import attention_from_key, ffn_from_key, resolve
from pipeline.recipe import SearchSpaceConfig
from tests.pipeline.model.builders import make_architecture, make_blocks

FEW = settings(max_examples=60, deadline=None)
ATTENTION = st.sampled_from([gqa(1), gqa(2), gqa(4), LINEAR_ATTENTION, NO_ATTENTION])
FFN = st.one_of(st.integers(1, 200).map(swiglu), st.sampled_from([LINEAR_FFN, NO_FFN]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    return make_architecture(
        vocab_size=draw(st.integers(1, 400)),
        hidden_size=draw(st.integers(1, 64)),
        head_dim=draw(st.sampled_from([2, 8, 14])),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        blocks=make_blocks(*draw(st.lists(st.tuples(ATTENTION, FFN), min_size=1, max_size=8))),
    )


@st.composite
def programmes(draw: st.DrawFn) -> Programme:
    """Small integers, so that ties and dominated candidates are common and sums exact; two or three limits."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))

    def values(largest: int) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(float(draw(st.integers(0, largest))) for _ in range(size)) for size in sizes)

    rows = tuple(
        Row(
            name=f"row {number}",
            fixed=float(draw(st.integers(0, 3))),
            upper=upper,
            cost=values(6),
            peak=values(8) if draw(st.booleans()) else None,
        )
        for number, upper in enumerate(draw(st.lists(st.integers(1, 20).map(float), min_size=2, max_size=3)))
    )
    families = None
    if draw(st.booleans()):
        families = tuple(("a", *(draw(st.sampled_from("abc")) for _ in range(size - 1))) for size in sizes)
    return Programme(scores=values(9), rows=rows, families=families)


def choices(programme: Programme) -> list[tuple[int, ...]]:
    """Every choice of one candidate per layer, all of one family where the programme has families."""
    every = itertools.product(*(range(len(scores)) for scores in programme.scores))
    if programme.families is None:
        return list(every)
    return [
        choice
        for choice in every
        if len({labels[index] for labels, index in zip(programme.families, choice, strict=True)}) == 1
    ]


def needed(row: Row, choice: tuple[int, ...]) -> float:
    """The fixed part, the costs, and the largest peak."""
    peaks = [0.0] if row.peak is None else [values[index] for values, index in zip(row.peak, choice, strict=True)]
    return row.fixed + sum(values[index] for values, index in zip(row.cost, choice, strict=True)) + max(peaks)


@FEW
@given(programmes())
def test_the_least_that_a_row_can_need_is_that_of_some_choice(programme: Programme):
    for row in programme.rows:
        totals = [needed(row, choice) for choice in choices(programme)]
        assert programme.least(row) == min(totals)
        assert [row.total(choice) for choice in choices(programme)] == totals


@FEW
@given(programmes())
def test_programme_is_solved_as_enumeration_does_or_nothing_meets_its_limits(programme: Programme):
    feasible = [choice for choice in choices(programme) if not programme.broken_rows(choice)]
    answer = solve_programme(programme, time_limit_s=10, relative_gap=0.0)
    if answer is None:
        assert feasible == []
        # The nearest choice overruns its limits by the least, each as a share of its bound.
        overruns = {
            choice: sum(max(0.0, row.total(choice) / row.upper - 1) for row in programme.rows)
            for choice in choices(programme)
        }
        nearest = least_overrun(programme, time_limit_s=10)
        assert overruns[nearest] == pytest.approx(min(overruns.values()), abs=1e-6)
        return
    assert answer.chosen in feasible
    assert programme.objective(answer.chosen) == min(map(programme.objective, feasible))


@FEW
@given(programmes(), st.integers(1, 3))
def test_diverse_answers_are_the_best_that_are_left(programme: Programme, min_different: int):
    answers = solve_diverse(programme, num_solutions=3, min_different=min_different, time_limit_s=10, relative_gap=0.0)
    earlier: list[tuple[int, ...]] = []
    for number in range(3):
        left = [
            choice
            for choice in choices(programme)
            if not programme.broken_rows(choice)
            and all(sum(a != b for a, b in zip(choice, other, strict=True)) >= min_different for other in earlier)
        ]
        assert (number < len(answers)) == bool(left)
        if not left:
            break
        assert answers[number].chosen in left
        assert programme.objective(answers[number].chosen) == min(map(programme.objective, left))
        earlier.append(answers[number].chosen)


@FEW
@given(architectures())
def test_parameters_are_the_elements_of_the_checkpoints_tensors(architecture: Architecture):
    sizes = {name: _num_elements(shape) for name, shape in checkpoint_shapes(architecture).items()}
    assert costs.num_parameters(architecture) == sum(sizes.values())
    for layer, block in enumerate(architecture.blocks):
        prefix = f"model.layers.{layer}."
        assert costs.block_parameters(architecture, block) == sum(
            size for name, size in sizes.items() if name.startswith(prefix)
        )


@FEW
@given(architectures(), st.data())
def test_costs_add_up_over_layers_whatever_their_order(architecture: Architecture, data: st.DataObject):
    shuffled = architecture.with_blocks(data.draw(st.permutations(architecture.blocks)))
    for cost in (
        costs.num_parameters,
        lambda model: costs.kv_bytes_per_token(model, bytes_per_value=2.0),
        lambda model: costs.forward_flops_per_token(model, context_tokens=7),
    ):
        assert cost(shuffled) == cost(architecture)
        rest = architecture.with_blocks(architecture.blocks[:1])
        assert cost(rest) <= cost(architecture)


# What the options of a search space stand for with a parent of 4 key/value heads and an FFN of 768, in a space's order.
ATTENTION_KEYS = {"parent": "kv4", 4: "kv4", 2: "kv2", 0.5: "kv2", 1: "kv1", "linear": "linear", "no_op": "no_op"}
FFN_KEYS = {
    "parent": "ffn768",
    512: "ffn512",
    300: "ffn300",
    256: "ffn256",
    0.5: "ffn256",
    8: "ffn8",
    "linear": "linear",
    "no_op": "no_op",
}
NOT_PORTABLE = {"linear", "ffn300", "ffn8"}


@st.composite
def spaces(draw: st.DrawFn, num_layers: int) -> dict[str, Any]:
    portable = draw(st.booleans())
    # Else hardly any space that must be portable would be.
    left_out = NOT_PORTABLE if portable and draw(st.integers(0, 3)) else set()

    def options(keys: dict[Any, str]) -> st.SearchStrategy[list[Any]]:
        return st.lists(
            st.sampled_from([one for one, key in keys.items() if key not in left_out]), min_size=1, max_size=4
        )

    override = st.fixed_dictionaries(
        {
            "layers": st.lists(st.integers(0, num_layers - 1), min_size=1, max_size=2),
            "attention": st.none() | options(ATTENTION_KEYS),
            "ffn": st.none() | options(FFN_KEYS),
        }
    )
    return {
        "attention": ["parent", *draw(options(ATTENTION_KEYS))],
        "ffn": ["parent", *draw(options(FFN_KEYS))],
        "overrides": draw(st.lists(override, max_size=3)),
        "portable": portable,
    }


def block_keys(space: dict[str, Any], layer: int, *, is_last: bool) -> list[str] | None:
    """What a layer may become, or None where the space must be refused: by hand."""
    attention, ffn = (
        (
            [one[half] for one in space["overrides"] if layer in one["layers"] and one[half] is not None]
            or [space[half]]
        )[-1]
        for half in ("attention", "ffn")
    )
    found_attention, found_ffn = {ATTENTION_KEYS[one] for one in attention}, {FFN_KEYS[one] for one in ffn}
    if space["portable"] and (found_attention | found_ffn) & NOT_PORTABLE:
        return None
    pairs = [
        (one, other)
        for one in dict.fromkeys(ATTENTION_KEYS.values())
        for other in dict.fromkeys(FFN_KEYS.values())
        if one in found_attention and other in found_ffn
    ]
    if space["portable"]:
        if layer == 0:
            pairs = [pair for pair in pairs if pair[0] != "no_op"]
        if is_last:
            pairs = [pair for pair in pairs if pair[1] != "no_op"]
        pairs = [pair for pair in pairs if pair[0] == "no_op" or pair[1] != "no_op"]
    return [f"{one}+{other}" for one, other in pairs] or None


@FEW
@given(st.data())
def test_space_holds_every_allowed_pair_of_each_layers_own_options_once_whatever_their_order(data: st.DataObject):
    num_layers = data.draw(st.integers(1, 4))
    parent = make_architecture(blocks=make_blocks(*[(gqa(4), swiglu(768))] * num_layers))
    options = data.draw(spaces(num_layers))
    config = SearchSpaceConfig.model_validate(options)
    wanted = [block_keys(options, layer, is_last=layer == num_layers - 1) for layer in range(num_layers)]
    if None in wanted:
        with pytest.raises(RecipeError, match="portable"):
            resolve(config, parent)
        return
    space = resolve(config, parent)
    assert [[block.key for block in found.blocks] for found in space.layers] == wanted
    assert space.num_candidates == sum(key != parent.blocks[0].key for keys in wanted for key in keys or ())
    for layer, found in enumerate(space.layers):
        assert {block.parent_layers for block in found.blocks} == {(layer,)}
        assert {spec.key for spec in found.attention} == {block.attention.key for block in found.blocks}
        assert {spec.key for spec in found.ffn} == {block.ffn.key for block in found.blocks}
        for block in found.blocks:
            assert attention_from_key(block.attention.key) == block.attention
            assert ffn_from_key(block.ffn.key) == block.ffn
    mixed = {half: data.draw(st.permutations(options[half])) for half in ("attention", "ffn")}
    assert resolve(SearchSpaceConfig.model_validate(options | mixed), parent) == space


@FEW
@given(JSON)
def test_canonical_json_says_the_same_of_what_it_was_read_back_from(value: Any):
    text = canonical_json(value)
    assert canonical_json(json.loads(text)) == text
    assert fingerprint(json.loads(text)) == fingerprint(value)


@FEW
@given(st.dictionaries(st.text(), JSON, max_size=5), st.randoms())
def test_fingerprint_does_not_depend_on_the_order_of_keys(value: dict[str, Any], random: Any):
    keys = list(value)
    random.shuffle(keys)
    assert fingerprint({key: value[key] for key in keys}) == fingerprint(value)


@FEW
@given(JSON, JSON)
def test_fingerprints_differ_where_the_text_does(one: Any, other: Any):
    assume(canonical_json(one) != canonical_json(other))
    assert fingerprint(one) != fingerprint(other)


def _num_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
