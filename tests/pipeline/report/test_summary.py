"""The summary has exactly the promised keys, and its table shows them."""

from pathlib import Path

import pytest

from pipeline.errors import ArtifactError
from pipeline.report.summary import Summary, build_summary, render_summary


@pytest.fixture(scope="module")
def summary(artifacts: dict[str, Path]) -> Summary:
    root = artifacts["report"].parents[2]
    return build_summary(artifacts, recipe_name="tiny", target="fast", total_wall_s=12.34, repository_root=root)


def test_summary_keys_are_exact(summary: Summary, artifacts: dict[str, Path]) -> None:
    plain = summary.model_dump(mode="json")
    assert list(plain) == [
        "recipe",
        "target",
        "wall_s",
        "total_wall_s",
        "parameters",
        "speedup",
        "predicted_speedup",
        "perplexity",
        "kl",
        "toggle_compliance",
        "target_limits",
        "exported_model",
        "report",
    ]
    assert plain["wall_s"].keys() == artifacts.keys()
    assert list(plain["parameters"]) == ["parent", "child"]
    assert plain["speedup"] == {"decode": 1.3, "prefill": 0.96}
    assert plain["predicted_speedup"] == {"decode": 1.4, "prefill": 1.2}
    assert plain["perplexity"] == {"parent": 29.0, "child": 61.0, "kd": 36.0, "cpt": 34.0, "sft": 35.0, "rl": 35.5}
    assert list(plain["kl"]) == ["child", "kd", "cpt", "sft", "rl"]
    assert plain["toggle_compliance"] == {"on": 0.95, "off": 1.0}
    assert plain["target_limits"] == {
        "num_limits": 3,
        "num_missed": 1,
        "num_within_tolerance": 1,
        "speed_tolerance": 0.05,
    }
    assert plain["exported_model"] == "store/exported_model/f00"
    assert plain["report"] == "store/report/f00/report.html"


def test_render_summary_shows_figures_in_plain_text(summary: Summary) -> None:
    text = render_summary(summary)
    for words in (
        "1.30x measured, 1.40x predicted",
        "95% obey on, 100% obey off",
        "2 of 3 met",
        "1 of them only within the tolerance of 5%",
        "29.00",
        "0.3550",
        "12s",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()


def test_summary_of_an_unfinished_run_names_the_artifact(artifacts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="report is not finished"):
        build_summary(
            {**artifacts, "report": tmp_path}, recipe_name="t", target="f", total_wall_s=1.0, repository_root=tmp_path
        )
