"""The command line: one stage by name, told on stderr and answered on stdout."""

from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.recipe_file import RECIPES_DIR


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


def test_a_recipe_of_ones_own_is_named_by_its_path_in_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mine = tmp_path / "my recipes" / "fit.yaml"
    mine.parent.mkdir()
    mine.write_text((RECIPES_DIR / "tiny.yaml").read_text().replace("name: tiny", "name: my-tiny"))
    monkeypatch.setenv("RECIPE", str(mine))
    with pytest.raises(SystemExit, match=r"error: recipe my-tiny, .* run `make demo RECIPE='.*/my recipes/fit.yaml'"):
        main(["summary"])


def test_doctor_looks_into_the_dagster_home_that_make_gives_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    mine = tmp_path / "fit.yaml"
    mine.write_text((RECIPES_DIR / "tiny.yaml").read_text().replace("name: tiny", "name: my-tiny"))
    main(["doctor", "--recipe", str(mine)])
    assert f"{tmp_path / 'dagster' / 'fit'} is no Dagster home yet" in capsys.readouterr().out


def test_doctor_keeps_what_a_recipe_of_another_file_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    mine, theirs = tmp_path / "mine.yaml", tmp_path / "theirs.yaml"
    text = (RECIPES_DIR / "tiny.yaml").read_text().replace("max_documents: 128", "max_documents: 9")
    for path in (mine, theirs):
        path.write_text(text.replace("name: tiny", f"name: {path.stem}"))
    main(["materialize", "corpora", "--recipe", str(mine)])
    path = Path(capsys.readouterr().out.split()[1])
    mine.write_text((RECIPES_DIR / "tiny.yaml").read_text().replace("name: tiny", "name: mine"))

    main(["doctor", "--remove-garbage", "--recipe", str(mine), "--keep", str(theirs)])
    assert path.is_dir()
    main(["doctor", "--remove-garbage", "--recipe", str(mine)])
    assert not path.exists()
