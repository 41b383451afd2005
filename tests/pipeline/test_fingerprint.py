"""Canonical JSON: one text per value, and a refusal for whatever has none."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.architecture import Frozen
from pipeline.fingerprint import FINGERPRINT_LENGTH, canonical_json, fingerprint


class Point(Frozen):
    """A model with two fields."""

    x: int
    y: float


def test_canonical_json_sorts_keys_and_drops_spaces():
    assert canonical_json({"b": [1, 2.5], "a": None}) == '{"a":null,"b":[1,2.5]}'


def test_canonical_json_of_model_equals_that_of_its_fields():
    assert canonical_json(Point(x=1, y=0.5)) == canonical_json({"y": 0.5, "x": 1})


def test_canonical_json_round_trips_awkward_numbers_and_text():
    value = {"tiny": 5e-324, "third": 1 / 3, "large": 2**70, "text": 'é\n"'}

    assert json.loads(canonical_json(value)) == value


def test_fingerprint_depends_on_order_of_lists_and_not_of_keys():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_fingerprint_tells_a_number_from_its_text():
    assert len({fingerprint(1), fingerprint("1"), fingerprint(1.0), fingerprint(True), fingerprint(None)}) == 5


def test_fingerprint_is_the_same_in_another_process():
    value = {"z": [1, {"y": 0.1}], "a": "text"}
    code = f"from pipeline.fingerprint import fingerprint; print(fingerprint({value!r}))"

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == fingerprint(value)
    assert len(fingerprint(value)) == FINGERPRINT_LENGTH


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_canonical_json_refuses_numbers_that_are_not_finite(value: float):
    with pytest.raises(TypeError, match=r"\$\.loss\[1\] is .*only finite numbers"):
        canonical_json({"loss": [1.0, value]})


def test_canonical_json_refuses_a_model_that_holds_nan():
    with pytest.raises(TypeError, match="only finite numbers"):
        canonical_json(Point(x=1, y=math.nan))


@pytest.mark.parametrize("value", [{1, 2}, Path("x"), object(), b"bytes", len], ids=repr)
def test_canonical_json_refuses_values_without_a_stable_text(value: object):
    with pytest.raises(TypeError, match="no stable text"):
        canonical_json({"field": value})


def test_canonical_json_refuses_keys_that_are_not_strings():
    with pytest.raises(TypeError, match="key that is not a string"):
        canonical_json({1: "one"})
