"""A selection and a target, checked before Dagster starts: what is settled, and what is refused in one line."""

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe_file import load_recipe
from resources import home
from resources.selection import settle_target


@pytest.mark.parametrize(
    ("select", "target", "settled"),
    [
        ("*", "", "fused"),
        ("*", "light", "light"),
        ("corpora", "", ""),
        ("*block_scores, block_profile", "", ""),
        ("*kd_checkpoint", "light", "light"),
        ("corpora*", "light", "light"),  # what reads it is made for a target
        ("*,corpora", "light", "light"),
        ("kind:torch and not key:kd_checkpoint", "light", "light"),
    ],
)
def test_target_of_a_selection_is_settled(select: str, target: str, settled: str):
    assert settle_target(load_recipe("tiny"), select=select, target=target) == settled


@pytest.mark.parametrize(
    ("select", "target", "message"),
    [
        ("*", "typo", "recipe tiny has no target 'typo'; it has fused, light"),
        ("corpora", "typo", "recipe tiny has no target 'typo'; it has fused, light"),
        ("kd_checkpoint", "", "SELECT='kd_checkpoint' selects kd_checkpoint, .* add TARGET= and one of fused, light"),
        ("corpora*", "", r"SELECT='corpora\*' selects .* add TARGET= and one of fused, light"),
        ("corpora", "light", "SELECT='corpora' selects only what all targets share, so TARGET='light' .* leave it out"),
        ("*kd_chekpoint", "light", "no stage 'kd_chekpoint'; the stages are .*kd_checkpoint"),
        (
            "kd_checkpoint and",
            "light",
            "SELECT='kd_checkpoint and' is no selection of assets .*: give names with commas",
        ),
        ("corpora, kd_chekpoint", "light", "no stage 'kd_chekpoint'"),
        ("corpora,", "", "SELECT='corpora,' is no selection of assets .*: give names with commas between"),
    ],
)
def test_request_that_cannot_be_met_is_refused(select: str, target: str, message: str):
    with pytest.raises(RecipeError, match=message):
        settle_target(load_recipe("tiny"), select=select, target=target)


def test_unknown_recipe_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAGSTER_HOME", "/nonexistent")
    monkeypatch.setenv("RECIPE", "typo")

    with pytest.raises(SystemExit, match=r"^error: no recipe 'typo': give a path to a YAML file, or one of .*tiny"):
        home.main([])
