"""What code each stage is made of, and the record that keeps its version honest: `python -m pipeline.stages.sources`.

A fingerprint holds a stage's hand-kept version, not its source, so that a renamed variable re-trains nothing. The price
is that somebody must raise the version when a stage computes something else. `sources.json` records, per stage, the
version and a hash of the stage's module and of every module of this package that it imports, however far down. A test
fails when they differ from the code: raise the version, or find that nothing computed differently, and record again.
"""

import ast
import functools
import hashlib
import io
import json
import sys
import tokenize
from pathlib import Path

from pipeline.artifacts import write_atomically
from pipeline.stages.registry import STAGES

RECORD = Path(__file__).parent / "sources.json"
PACKAGE_ROOT = Path(__file__).resolve().parents[2]

# Recipes, configs and the registry reach a fingerprint by value; the rest cannot change what an artifact holds.
NOT_RECORDED = frozenset(
    {
        "pipeline.errors",
        "pipeline.hardware",
        "pipeline.processes",
        "pipeline.progress",
        "pipeline.recipe",
        "pipeline.stages.configs",
        "pipeline.stages.registry",
    }
)


def current_sources() -> dict[str, dict[str, int | str]]:
    """Return version and source hash of every stage, by name."""
    return {stage.name: {"version": stage.version, "source": source_hash(stage.module)} for stage in STAGES}


def recorded_sources() -> dict[str, dict[str, int | str]]:
    """Return what was recorded last."""
    found: dict[str, dict[str, int | str]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def source_hash(module: str) -> str:
    """Return a hash of a module and all it imports inside this package; comments and docstrings do not count."""
    texts = {name: _code(name) for name in sorted(reachable_modules(module))}
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:20]


def reachable_modules(module: str) -> set[str]:
    """Return a module and every recorded module of this package that it imports, at its top or inside a function."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or name in NOT_RECORDED:
            continue
        found.add(name)
        waiting += _imports(name)
    return found


@functools.cache
def _imports(module: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(_read(module))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from a.b import c` names a module a.b.c where there is one, and otherwise something in a.b.
            found += [
                f"{node.module}.{alias.name}" if _path(f"{node.module}.{alias.name}") else node.module
                for alias in node.names
            ]
    return [name for name in found if name.startswith("pipeline.") and _path(name)]


@functools.cache
def _code(module: str) -> str:
    """Return a module's text without comments, docstrings, blank lines and trailing spaces.

    Text, not a syntax tree: trees print differently from one Python version to the next.
    """
    text = _read(module)
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = _docstring(node)
            if docstring is not None:
                lines[docstring.lineno - 1 : docstring.end_lineno] = [""] * _num_lines(docstring)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> ast.Expr | None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first
    return None


def _num_lines(node: ast.Expr) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _read(module: str) -> str:
    path = _path(module)
    if path is None:
        raise FileNotFoundError(f"{module} has no file below {PACKAGE_ROOT}")
    return path.read_text(encoding="utf-8")


def _path(module: str) -> Path | None:
    base = PACKAGE_ROOT / Path(*module.split("."))
    candidates = (base.with_name(base.name + ".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def main() -> None:
    """Record the sources as they are."""
    before = recorded_sources() if RECORD.is_file() else {}
    now = current_sources()
    write_atomically(RECORD, (json.dumps(now, indent=1, sort_keys=True) + "\n").encode())
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    sys.stdout.write(f"{RECORD.name}: {', '.join(changed) or 'nothing'} changed\n")


if __name__ == "__main__":
    main()
