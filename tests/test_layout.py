"""What holds for every file: its length, its docstring, its place, and nothing that would run a stranger's code."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from docs import make_recipe_reference
from pipeline.recipe import Recipe
from pipeline.stage import ExecutionSettings

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("pipeline", "assets", "resources", "tests", "bench", "docs")
MAX_LINES = 600
# A list, one entry per stage: cut in half it would be harder to read.
LONG_LISTS = {"pipeline/stages/registry.py": 700}
# Its models are one vocabulary, used together everywhere; the rooms say where each is filed.
NAMES_ITS_CONTENT = "pipeline/recipe/__init__.py"

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}

FILES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))
SOURCES = [path for path in FILES if path.relative_to(REPOSITORY).parts[0] in ("pipeline", "assets", "resources")]


def _name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_file_is_of_readable_length_and_says_what_it_is(path: Path):
    text = path.read_text(encoding="utf-8")

    assert len(text.splitlines()) <= LONG_LISTS.get(_name(path), MAX_LINES)
    assert ast.get_docstring(ast.parse(text)), "the first line of a module says what belongs in it"


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=_name)
def test_package_file_holds_its_docstring_alone(path: Path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    if _name(path) == NAMES_ITS_CONTENT:
        *imports, exported = body[1:]
        assert all(isinstance(statement, ast.ImportFrom) for statement in imports)
        assert isinstance(exported, ast.Assign)
    else:
        assert len(body) == 1


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_source_runs_no_code_that_comes_with_data(path: Path):
    found = list(_dangers(ast.parse(path.read_text(encoding="utf-8"))))

    assert not found, f"{_name(path)}: {', '.join(found)}"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "exec('1')",
        "f(trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "f(weights_only=False)",
        "import yaml\nyaml.unsafe_load('x')",
    ],
)
def test_danger_planted_is_found(code: str):
    assert list(_dangers(ast.parse(code)))


def test_every_source_package_is_installed():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]

    assert settings["packages"]["find"]["include"] == ["pipeline*", "assets*", "resources*"]
    for folder in {path.parent for path in SOURCES}:
        assert (folder / "__init__.py").is_file(), _name(folder)


@pytest.mark.parametrize("path", make_recipe_reference.PAGES, ids=_name)
def test_page_is_what_the_code_says(path: Path):
    assert path.read_text(encoding="utf-8") == make_recipe_reference.PAGES[path](), "run `make reference`"


@pytest.mark.parametrize("model", [Recipe, ExecutionSettings])
def test_every_key_has_a_meaning(model: type[BaseModel]):
    schema = model.model_json_schema()
    silent = [
        f"{part['title']}.{name}"
        for part in (schema, *schema.get("$defs", {}).values())
        for name, value in part["properties"].items()
        # A section says itself what it is, and `kind` which section is meant.
        if "description" not in value and "$ref" not in str(value) and name != "kind"
    ]

    assert not silent, f"no Field(description=...): {', '.join(silent)}"


def _dangers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        else:
            names = []
        yield from (f"line {node.lineno}: import {name}" for name in names if name in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS or called in ("torch.load", "yaml.load_all") or "unsafe_load" in called:
                yield f"line {node.lineno}: {called}"
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code" and not _is(keyword.value, value=False):
                    yield f"line {node.lineno}: trust_remote_code"
                if keyword.arg == "weights_only" and not _is(keyword.value, value=True):
                    yield f"line {node.lineno}: weights_only"
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield f"line {node.lineno}: 'trust_remote_code'"


def _is(node: ast.expr, *, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
