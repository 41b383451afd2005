"""Which runtimes take which architectures."""

from typing import Any

import pytest

from pipeline.architecture import LINEAR_ATTENTION, LINEAR_FFN, NO_ATTENTION, NO_FFN, BlockSpec, gqa, swiglu
from pipeline.model.portability import runtime_support
from tests.pipeline.model.builders import make_architecture, make_blocks

P, A, F, I = (gqa(2), swiglu(256)), (gqa(2), NO_FFN), (NO_ATTENTION, swiglu(256)), (NO_ATTENTION, NO_FFN)  # noqa: E741


def takers(blocks: tuple[BlockSpec, ...], **changes: Any) -> set[str]:
    architecture = make_architecture(**({"vocab_size": 128_256} | changes), blocks=blocks)
    return {support.runtime for support in runtime_support(architecture) if support.runs_as_is}


ALL = {"transformers", "vLLM", "llama.cpp", "mlx-lm"}


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (make_blocks(P, F, I, P), ALL),
        (make_blocks(F, P, P), {"transformers", "mlx-lm"}),
        (make_blocks(P, A, P), ALL - {"llama.cpp"}),
        (make_blocks(P, P, A), ALL - {"llama.cpp"}),
        (make_blocks(P, P, I), ALL - {"llama.cpp"}),
        (make_blocks(P, (LINEAR_ATTENTION, swiglu(256)), P), {"transformers", "llama.cpp"}),
        (make_blocks(P, (gqa(2), LINEAR_FFN), P), {"transformers"}),
    ],
)
def test_runtimes_that_take_an_architecture(blocks: tuple[BlockSpec, ...], expected: set[str]):
    assert takers(blocks) == expected


def test_vocabulary_and_shapes_that_readers_assume_are_checked():
    blocks = make_blocks(P, P)
    assert takers(blocks, vocab_size=49152) == ALL - {"llama.cpp"}
    assert takers(blocks, head_dim=12) == {"transformers"}
    assert takers(blocks, attention_bias=True) == {"transformers"}


def test_reasons_name_the_layers():
    support = {item.runtime: item for item in runtime_support(make_architecture(blocks=make_blocks(P, A, A, P)))}
    assert "attention without FFN in layers 1, 2: silently computes something else" in support["llama.cpp"].reason
