"""Task files read as data: what they define, what their results hang on, and what is refused."""

import sys
from pathlib import Path

import pytest

from pipeline.errors import DataError, UserError
from pipeline.evaluation.lm_eval_runner import require_lm_eval
from pipeline.evaluation.task_files import files_read_by, names_of, read_task_files

TASK = "task: mine\ndataset_path: json\ndoc_to_text: !function helper.text\n"


def test_files_are_those_below_and_those_that_are_named(tmp_path: Path) -> None:
    tasks, elsewhere = tmp_path / "tasks", tmp_path / "elsewhere"
    (tasks / "more").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("one.jsonl", "two.jsonl", "unrelated.txt"):
        (elsewhere / name).write_text("{}\n")
    (elsewhere / "common").write_text("output_type: multiple_choice\n")
    (tasks / "helper.py").write_text("def text(doc): ...\n")
    (tasks / "mine.yaml").write_text(
        f"include: ../elsewhere/common\n{TASK}dataset_kwargs: {{data_files: {{test: {elsewhere}/one.jsonl}}}}\n"
    )
    (tasks / "more" / "all.yaml").write_text(
        f"group: all\ntask: [mine]\ndataset_kwargs: {{data_files: ['{elsewhere}/tw*.jsonl']}}\n"
    )

    assert names_of(read_task_files(str(tasks))) == ["all", "mine"]
    assert {path.relative_to(tmp_path).as_posix() for path in files_read_by(str(tasks))} == {
        "elsewhere/common",
        "elsewhere/one.jsonl",
        "elsewhere/two.jsonl",
        "tasks/helper.py",
        "tasks/mine.yaml",
        "tasks/more/all.yaml",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "cannot be read as YAML"),
        ("- task", "holds a list, wanted a mapping"),
        ("task: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("metric_list: [{metric: f1, hf_evaluate: true}]", "sets hf_evaluate: its metric is a script"),
        ("unsafe_code: true", "sets unsafe_code: it runs programs"),
        ("include: missing.yaml", r"missing\.yaml cannot be read"),
    ],
)
def test_task_file_that_is_broken_or_runs_foreign_code_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_task_files(str(tmp_path))


def test_include_path_without_a_task_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no directory"):
        read_task_files(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"holds no \*\.yaml"):
        read_task_files(str(tmp_path))


def test_lm_eval_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UserError, match="make install-lm-eval"):
        require_lm_eval()
