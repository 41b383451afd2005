"""Runs against hand-drawn ones, and against the best of all divisions of a stretch."""

import random
from collections.abc import Iterator, Mapping

import pytest

from pipeline.architecture import LINEAR_FFN, NO_ATTENTION, NO_FFN, Architecture, gqa, swiglu
from pipeline.costs import ffn_parameters
from pipeline.model.fusion_runs import FusionRun, RunRules, find_runs, runs_between
from tests.pipeline.model.builders import make_architecture, make_blocks

A, F = gqa(2), swiglu(48)
KINDS = {
    "P": (A, F),
    "F": (NO_ATTENTION, F),
    "N": (NO_ATTENTION, swiglu(16)),
    "I": (NO_ATTENTION, NO_FFN),
    "L": (NO_ATTENTION, LINEAR_FFN),
    "A": (A, NO_FFN),
}


def drawn(letters: str) -> Architecture:
    """Layers by letter: P parent, F FFN, N narrow FFN, I identity, L linear FFN, A attention alone."""
    return make_architecture(blocks=make_blocks(*(KINDS[letter] for letter in letters)))


def rules(
    *,
    min_run_layers: int = 2,
    max_run_layers: int = 99,
    max_dependency: float = 2.0,
    max_parameters: float = 1e9,
    keep_last_ffn: bool = False,
) -> RunRules:
    return RunRules(
        min_run_layers=min_run_layers,
        max_run_layers=max_run_layers,
        max_dependency=max_dependency,
        max_parameters=max_parameters,
        keep_last_ffn=keep_last_ffn,
    )


def flat(architecture: Architecture, default: float = 0.5, **entries: float) -> Mapping[tuple[int, int], float]:
    """A matrix that is `default` but for entries written as m_0_1=..."""
    layers = range(architecture.num_hidden_layers)
    matrix = {(i, j): default for i in layers for j in layers if i < j}
    for name, value in entries.items():
        _, first, later = name.split("_")
        matrix[int(first), int(later)] = value
    return matrix


@pytest.mark.parametrize(
    ("letters", "min_run_layers", "keep_last_ffn", "expected"),
    [
        ("PFFFP", 2, False, [(1, 2, 3)]),
        ("PFFFP", 2, True, [(1, 2)]),
        ("PFFFP", 3, True, []),
        ("FFPFF", 2, False, [(0, 1), (3, 4)]),
        ("FFAFF", 2, True, []),
        ("FFLFF", 2, False, [(0, 1), (3, 4)]),
        ("PIFIFFI", 2, False, [(2, 3, 4, 5)]),
        ("PIFIFFI", 2, True, [(2, 3, 4)]),
        ("PPP", 2, False, []),
        ("III", 2, False, []),
    ],
)
def test_runs_are_the_hand_drawn_ones(
    letters: str, min_run_layers: int, keep_last_ffn: bool, expected: list[tuple[int, ...]]
):
    architecture = drawn(letters)
    wanted = rules(min_run_layers=min_run_layers, keep_last_ffn=keep_last_ffn)
    found = find_runs(architecture, dependencies=flat(architecture), rules=wanted)
    assert [run.layers for run in found] == expected


def test_a_run_ends_where_a_block_depends_on_one_before_it():
    architecture = drawn("PFFFFFP")
    found = find_runs(architecture, dependencies=flat(architecture, m_2_4=0.9), rules=rules(max_dependency=0.6))
    # 1-3 with 4-5, or 1-2 with 3-5: both leave two layers of five.
    assert [len(run.ffn_layers) for run in found] in ([3, 2], [2, 3])
    preferred = flat(architecture, m_2_4=0.9, m_1_2=0.1)
    found = find_runs(architecture, dependencies=preferred, rules=rules(max_dependency=0.6))
    assert [run.ffn_layers for run in found] == [(1, 2), (3, 4, 5)]


def test_device_memory_splits_a_run_and_counts_unequal_widths():
    architecture = drawn("PFNNFFP")
    wide, narrow = (ffn_parameters(architecture, swiglu(width)) for width in (48, 16))
    found = find_runs(architecture, dependencies=flat(architecture), rules=rules(max_parameters=wide + 2 * narrow))
    assert [run.ffn_layers for run in found] == [(1, 2, 3)]
    found = find_runs(architecture, dependencies=flat(architecture), rules=rules(max_parameters=2 * wide))
    assert [run.ffn_layers for run in found] == [(1, 2, 3), (4, 5)]


def divisions(stretch: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every way to cut a stretch into successive parts."""
    if not stretch:
        yield ()
    for size in range(1, len(stretch) + 1):
        for rest in divisions(stretch[size:]):
            yield (stretch[:size], *rest)


@pytest.mark.parametrize("seed", range(12))
def test_runs_are_the_best_of_all_divisions(seed: int):
    rng = random.Random(seed)
    architecture = drawn("P" + "".join(rng.choice("FNI") for _ in range(9)) + "P")
    stretch = tuple(layer for layer in range(1, 10) if architecture.blocks[layer].ffn.kind == "swiglu")
    matrix = {(i, j): rng.random() for i in range(11) for j in range(i + 1, 11)}
    wanted = rules(
        min_run_layers=2,
        max_run_layers=rng.choice((2, 3, 5)),
        max_dependency=rng.uniform(0.4, 1.0),
        max_parameters=rng.choice((2.5, 4.5)) * ffn_parameters(architecture, F),
    )

    def largest(part: tuple[int, ...]) -> float:
        return max(matrix[i, j] for i in part for j in part if i < j)

    def is_allowed(part: tuple[int, ...]) -> bool:
        size = sum(ffn_parameters(architecture, architecture.blocks[layer].ffn) for layer in part)
        return len(part) == 1 or (
            len(part) <= wanted.max_run_layers
            and largest(part) <= wanted.max_dependency
            and size <= wanted.max_parameters
        )

    allowed = [[part for part in parts if len(part) > 1] for parts in divisions(stretch) if all(map(is_allowed, parts))]
    best = min(allowed, key=lambda parts: (sum(1 - len(part) for part in parts), sum(map(largest, parts))))
    found = find_runs(architecture, dependencies=matrix, rules=wanted)
    assert [run.ffn_layers for run in found] == best


def test_runs_are_read_off_the_parent_layers_that_fused_blocks_name():
    before = drawn("PFIFFP")
    joined = make_blocks((NO_ATTENTION, swiglu(96)))[0].model_copy(update={"parent_layers": (1, 2, 3)})
    after = before.with_blocks((before.blocks[0], joined, *before.blocks[4:]))
    assert runs_between(before, after) == [FusionRun(layers=(1, 2, 3), ffn_layers=(1, 3))]
    assert runs_between(before, before) == []
