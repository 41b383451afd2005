"""The pictures of docs/ui.md: all there, none left over, none too large. Needs no browser."""

import re

from tests.dagster.commands import REPOSITORY

MAX_PICTURE_BYTES = 400_000


def test_pictures_are_those_that_the_page_shows():
    shown = set(re.findall(r"\(images/(ui-[\w-]+\.png)\)", (REPOSITORY / "docs" / "ui.md").read_text(encoding="utf-8")))

    assert {path.name for path in (REPOSITORY / "docs" / "images").glob("ui-*.png")} == shown


def test_pictures_are_small():
    for path in (REPOSITORY / "docs" / "images").glob("ui-*.png"):
        assert path.stat().st_size < MAX_PICTURE_BYTES, path.name
