"""Canonical JSON and hashes of configurations and inputs; refuses whatever has no stable form."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

FINGERPRINT_LENGTH = 20  # hex digits: 80 bits, far beyond the number of artifacts a store will ever hold


def canonical_json(value: Any) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, no NaN.

    Raises:
        TypeError: for a value whose text could differ between runs (sets, paths, objects, non-finite floats).
    """
    return json.dumps(_stable(value, at="$"), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return a short hash of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:FINGERPRINT_LENGTH]


def _stable(value: Any, *, at: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{at} is {value}: only finite numbers can be fingerprinted")
        return value
    if isinstance(value, BaseModel):
        return _stable(value.model_dump(mode="json"), at=at)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{at} has a key that is not a string: {sorted(map(repr, value))}")
        return {key: _stable(item, at=f"{at}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stable(item, at=f"{at}[{index}]") for index, item in enumerate(value)]
    raise TypeError(
        f"{at} is a {type(value).__name__}, which has no stable text: pass a pydantic model, a mapping, a list, "
        "a string, a number or None"
    )
