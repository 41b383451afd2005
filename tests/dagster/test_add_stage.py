"""docs/add-a-stage.md, applied as it stands to a copy of the project: the stage is there, runs, and goes again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "add-a-stage.md"
REGISTRY = "pipeline/stages/registry.py"

LIST_ASSETS = (
    "from pipeline.definitions import defs; "
    "print(*sorted(key.to_user_string() for key in defs.resolve_all_asset_keys()))"
)


def blocks() -> dict[str, str]:
    """Return the page's files by their path, and the registry entry under the registry's."""
    text = PAGE.read_text(encoding="utf-8")
    files = dict(re.findall(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    (entry,) = re.findall(r"^```python\n(    Stage\(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return {**files, REGISTRY: entry}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for folder in ("pipeline", "assets", "resources", "tests"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(REPOSITORY / "pyproject.toml", root / "pyproject.toml")
    return root


def run(root: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "RECIPE": "tiny",
        "REFIT_HOME": str(root / "home"),
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return ended.stdout


def test_the_page_adds_a_stage_and_deleting_it_leaves_nothing(copied: Path):
    written = blocks()
    assert sorted(written) == [
        "assets/corpus_statistics.py",
        "pipeline/stages/corpus_statistics.py",
        REGISTRY,
        "tests/pipeline/stages/test_corpus_statistics.py",
    ]
    before = run(copied, "-c", LIST_ASSETS).split()
    registry = copied / REGISTRY
    original = registry.read_text(encoding="utf-8")
    for path, text in written.items():
        if path != REGISTRY:
            (copied / path).write_text(text, encoding="utf-8")
    start, end = original.split('    Stage(\n        name="evaluation_sets"', maxsplit=1)
    registry.write_text(
        start + written[REGISTRY] + '    Stage(\n        name="evaluation_sets"' + end, encoding="utf-8"
    )

    assert sorted(run(copied, "-c", LIST_ASSETS).split()) == sorted([*before, "corpus_statistics"])
    run(copied, "-m", "pytest", "-q", "tests/pipeline/stages/test_corpus_statistics.py")
    assert "corpus_statistics has no estimate" in run(copied, "-m", "pipeline", "plan")
    assert "corpus_statistics" in run(copied, "-m", "pipeline", "explain")

    registry.write_text(original, encoding="utf-8")
    for path in written:
        if path != REGISTRY:
            (copied / path).unlink()
    assert run(copied, "-c", LIST_ASSETS).split() == before
