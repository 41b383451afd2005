"""Runs `python -m pipeline` on bad input and checks what must hold whatever was bad."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.artifacts import sha256_file
from pipeline.cli import main
from pipeline.recipe_file import find_recipe

TINY = yaml.safe_load(find_recipe("tiny").read_text(encoding="utf-8"))
CANARY = "canary-was-run"


def recipe_with(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tiny recipe under another name, with values changed at dotted paths; ... deletes one."""
    plain = copy.deepcopy(TINY) | {"name": "changed"}
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = plain
        for key in parents:
            place = place[int(key) if isinstance(place, list) else key]
        if value is ...:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value
    return plain


def write_recipe(tmp_path: Path, changes: Mapping[str, Any]) -> Path:
    """Write that recipe; numbers that JSON cannot say (NaN) stay as YAML spells them."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_with(changes)), encoding="utf-8")
    return path


def refused(
    arguments: list[str],
    *,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage_name: str | None = None,
) -> str:
    """Run a command that must fail; return its one error, after checking that nothing else happened."""
    home = tmp_path / "home"
    monkeypatch.setenv("REFIT_HOME", str(home))
    before = hashes(tmp_path, without=home)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    message = str(ended.value.code)
    assert message.startswith("error: ")
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err + message
    assert hashes(tmp_path, without=home) == before
    assert not list(tmp_path.rglob(CANARY))
    if stage_name is not None:
        assert not list((home / "store" / stage_name).glob("*/manifest.json"))
    return message


def hashes(root: Path, *, without: Path) -> dict[str, str]:
    """Return the sha256 of every file below a directory, one subtree left out."""
    return {
        str(path): sha256_file(path)
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_relative_to(without)
    }


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ... deletes one."""
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}), encoding="utf-8")
