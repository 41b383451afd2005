"""What an architecture accepts, refuses and writes down."""

import pytest
from pydantic import ValidationError

from pipeline.architecture import (
    LINEAR_FFN,
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    AttentionSpec,
    BlockSpec,
    FFNSpec,
    gqa,
    swiglu,
)
from pipeline.errors import CheckpointError
from tests.pipeline.model.builders import LLAMA3_ROPE, make_architecture, make_blocks


def test_block_key_names_both_subblocks():
    assert make_blocks((gqa(3), swiglu(1536)))[0].key == "kv3+ffn1536"
    assert make_blocks((NO_ATTENTION, LINEAR_FFN))[0].key == "no_op+linear"


@pytest.mark.parametrize("fields", [{"kind": "gqa"}, {"kind": "no_op", "num_key_value_heads": 2}])
def test_attention_spec_with_heads_that_do_not_belong_is_refused(fields: dict):
    with pytest.raises(ValidationError, match="num_key_value_heads"):
        AttentionSpec(**fields)


@pytest.mark.parametrize("fields", [{"kind": "swiglu"}, {"kind": "linear", "intermediate_size": 8}])
def test_ffn_spec_with_width_that_does_not_belong_is_refused(fields: dict):
    with pytest.raises(ValidationError, match="intermediate_size"):
        FFNSpec(**fields)


def test_architecture_with_heads_that_do_not_divide_is_refused():
    with pytest.raises(ValidationError, match="layer 1 has 3 key/value heads"):
        make_architecture(blocks=make_blocks((gqa(2), NO_FFN), (gqa(3), NO_FFN)))


def test_architecture_json_round_trip_is_equal():
    architecture = make_architecture(
        rope_scaling=LLAMA3_ROPE,
        blocks=(
            BlockSpec(attention=NO_ATTENTION, ffn=swiglu(96), parent_layers=(0, 1)),
            *make_blocks((gqa(4), NO_FFN)),
        ),
    )
    assert Architecture.model_validate(architecture.to_json()) == architecture


def test_homogeneous_block_of_a_child_is_refused():
    child = make_architecture(blocks=make_blocks((gqa(2), swiglu(48)), (NO_ATTENTION, swiglu(48))))
    with pytest.raises(CheckpointError, match=r"layer 1 is no_op\+ffn48"):
        child.homogeneous_block()


def test_with_blocks_changes_only_the_blocks():
    architecture = make_architecture()
    other = architecture.with_blocks(make_blocks((gqa(4), NO_FFN)))
    assert other.num_hidden_layers == 1
    assert other.model_dump(exclude={"blocks"}) == architecture.model_dump(exclude={"blocks"})
