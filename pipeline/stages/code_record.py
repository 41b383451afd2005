"""What code each version stands for, and the record that keeps it honest: `python -m pipeline.stages.code_record`.

A fingerprint holds a hand-kept version, not a source, so that a renamed variable re-trains nothing. The price is that
somebody must raise the version when something else is computed. `code_record.json` records, per stage, the version and
a hash of the stage's module and of every module of this package that it imports, however far down, with the files that
these read or run by their path; and the same for the constants that version what stages share in the store. A test
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

RECORD = Path(__file__).parent / "code_record.json"
PACKAGE_ROOT = Path(__file__).resolve().parents[2]

# Versions beside those of stages, and the module from which all that they guard is reached. A stage that runs again
# still finds its trained blocks, its scores or its evaluations in the store; only these make it do them anew.
CONSTANTS = {
    "pipeline.puzzle.library.BLD_VERSION": "pipeline.stages.block_library",
    "pipeline.puzzle.known_scores.SCORES_VERSION": "pipeline.stages.block_scores",
    "pipeline.evaluation.suite.HARNESS_VERSION": "pipeline.evaluation.shared",
    "pipeline.evaluation.lm_eval_store.LM_EVAL_VERSION": "pipeline.evaluation.lm_eval_store",
}

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


# What no import names: programs that a module starts, templates and task files that it reads. Paths of this repository.
# Not the architectures: they only say which parent is refused.
BY_PATH = {
    "pipeline.reasoning.grading": "pipeline/reasoning/grader.py",
    "pipeline.report.html": "pipeline/report/templates/*.j2",
    "pipeline.evaluation.lm_eval_store": "pipeline/evaluation/lm_eval_tasks/*.yaml",
}


def current_code() -> dict[str, dict[str, int | str]]:
    """Return version and source hash of every stage, by name, and of every constant, by its dotted name."""
    stages = {stage.name: {"version": stage.version, "source": source_hash(stage.module)} for stage in STAGES}
    constants = {
        name: {"version": _constant(name), "source": source_hash(module)} for name, module in CONSTANTS.items()
    }
    return {**stages, **constants}


def recorded_code() -> dict[str, dict[str, int | str]]:
    """Return what was recorded last."""
    found: dict[str, dict[str, int | str]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def version_to_raise(name: str) -> str:
    """Return where the version of an entry stands, as a person looks for it."""
    if name not in CONSTANTS:
        return f"version of {name} in pipeline/stages/registry.py"
    module, _, constant = name.rpartition(".")
    return f"{constant} in {module.replace('.', '/')}.py"


def source_hash(module: str) -> str:
    """Return a hash of a module and all it imports inside this package; comments and docstrings do not count.

    Files that are no Python count to the last byte.
    """
    modules = sorted(reachable_modules(module))
    texts = {name: _code(name) for name in modules}
    for file in (file for name in modules for file in files_by_path(name) if file.suffix != ".py"):
        texts[file.relative_to(PACKAGE_ROOT).as_posix()] = file.read_text(encoding="utf-8")
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:20]


def reachable_modules(module: str) -> set[str]:
    """Return a module and every recorded module that it imports, at its top or in a function, or starts by its path."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or name in NOT_RECORDED:
            continue
        found.add(name)
        waiting += _imports(name)
        waiting += [_module_of(file) for file in files_by_path(name) if file.suffix == ".py"]
    return found


def files_by_path(module: str) -> list[Path]:
    """Return the files that BY_PATH names for a module.

    Raises:
        FileNotFoundError: when there are none any more.
    """
    if module not in BY_PATH:
        return []
    found = sorted(PACKAGE_ROOT.glob(BY_PATH[module]))
    if not found:
        raise FileNotFoundError(f"{module} reads {BY_PATH[module]}, where there is nothing: correct BY_PATH")
    return found


def _module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE_ROOT).with_suffix("").parts)


def _constant(name: str) -> int:
    """Return a constant's value from its module's text: importing the module would import torch."""
    module, _, constant = name.rpartition(".")
    for node in ast.parse(_read(module)).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == constant:
            return int(ast.literal_eval(node.value))
    raise LookupError(f"{module} assigns no {constant} at its top: name the constant that versions it now in CONSTANTS")


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
    """Record the code as it is."""
    before = recorded_code() if RECORD.is_file() else {}
    now = current_code()
    write_atomically(RECORD, (json.dumps(now, indent=1, sort_keys=True) + "\n").encode())
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    sys.stdout.write(f"{RECORD.name}: {', '.join(changed) or 'nothing'} changed\n")


if __name__ == "__main__":
    main()
