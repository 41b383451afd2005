"""Which runtimes take which architectures: as they are, or as the export re-packs them."""

from typing import Any

import pytest

from pipeline.architecture import LINEAR_ATTENTION, LINEAR_FFN, NO_ATTENTION, NO_FFN, BlockSpec, gqa, swiglu
from pipeline.model.portability import runtime_support
from pipeline.model.repacking import portable
from tests.pipeline.model.builders import make_architecture, make_blocks

P, A, F, I = (gqa(2), swiglu(256)), (gqa(2), NO_FFN), (NO_ATTENTION, swiglu(256)), (NO_ATTENTION, NO_FFN)  # noqa: E741
L = (LINEAR_ATTENTION, swiglu(256))

ALL = {"transformers", "vLLM", "llama.cpp", "mlx-lm"}


def takers(verdict: str, blocks: tuple[BlockSpec, ...], **changes: Any) -> set[str]:
    support = runtime_support(make_architecture(blocks=blocks, **changes))
    return {item.runtime for item in support if item.runs == verdict}


@pytest.mark.parametrize(
    ("blocks", "as_is", "after_repacking"),
    [
        (make_blocks(P, F, I, P), ALL, set()),
        (make_blocks(F, P, P), {"transformers", "mlx-lm"}, {"vLLM", "llama.cpp"}),
        (make_blocks(P, A, P), ALL - {"llama.cpp"}, {"llama.cpp"}),
        (make_blocks(P, P, A), ALL - {"llama.cpp"}, {"llama.cpp"}),
        (make_blocks(P, P, I), ALL - {"llama.cpp"}, {"llama.cpp"}),
        (make_blocks(P, (gqa(2), swiglu(300))), set(), ALL),
        (make_blocks(P, L, P), {"transformers", "llama.cpp"}, set()),
        (make_blocks(P, (gqa(2), LINEAR_FFN), P), {"transformers"}, set()),
    ],
)
def test_runtimes_that_take_an_architecture(blocks: Any, as_is: set[str], after_repacking: set[str]):
    assert takers("as is", blocks) == as_is
    assert takers("after re-packing", blocks) == after_repacking
    assert takers("cannot", blocks) == ALL - as_is - after_repacking


@pytest.mark.parametrize("layers", [(F, P, A, A, I), (I, I), (A,), (F,), (P, I, F, A)])
def test_what_a_runtime_takes_after_repacking_it_takes_as_it_is_once_repacked(layers: Any):
    repacked = portable(make_architecture(blocks=make_blocks(*layers))).architecture
    assert ALL - takers("as is", repacked.blocks) <= {"llama.cpp"}  # whose zero FFNs are in the GGUF file alone
    assert takers("cannot", repacked.blocks) == set()


def test_shapes_and_tokenizers_that_readers_do_not_have_are_named():
    blocks = make_blocks(P, P)
    assert takers("cannot", blocks, head_dim=12) == {"mlx-lm"}
    assert takers("cannot", blocks, attention_bias=True) == {"llama.cpp"}
    support = runtime_support(make_architecture(blocks=blocks), tokenizer_obstacle="unknown splitting")
    assert [(item.runtime, item.reason) for item in support if item.runs == "cannot"] == [
        ("llama.cpp", "unknown splitting")
    ]


def test_reasons_name_the_layers():
    support = {item.runtime: item for item in runtime_support(make_architecture(blocks=make_blocks(P, A, A, P)))}
    assert "attention without FFN in layers 1, 2: silently computes something else" in support["llama.cpp"].reason
