"""The command line: one stage by name, told on stderr and answered on stdout."""

from pathlib import Path

import pytest

from pipeline.cli import main


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPE", "tiny")
    monkeypatch.setenv("REFIT_HOME", str(tmp_path))


def test_materialize_prints_how_and_where_and_reports_progress_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(["materialize", "parent_checkpoint"])
    first = capsys.readouterr()
    main(["materialize", "parent_checkpoint", "--target", "light"])
    second = capsys.readouterr()

    how, path = first.out.split()
    assert how == "ran"
    assert Path(path).parent == tmp_path / "store" / "parent_checkpoint"
    assert (Path(path) / "manifest.json").is_file()
    assert "[parent_checkpoint] " in first.err
    assert second.out.split() == ["reused", path]


def test_materialize_without_inputs_is_one_line_that_names_the_first_one_to_make():
    with pytest.raises(SystemExit, match=r"error: distillation_mix reads .*not materialized"):
        main(["materialize", "distillation_mix"])


def test_materialize_of_an_unknown_stage_names_the_known():
    with pytest.raises(SystemExit, match=r"error: no stage 'nope'; the stages are parent_checkpoint"):
        main(["materialize", "nope"])
