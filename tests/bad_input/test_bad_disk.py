"""A disk that is full or not writable, a store that is none, and artifacts that something has happened to."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.bad_input.command import refused

LIMITED = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from pipeline.cli import main
main(sys.argv[2:])
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="this system limits no file sizes")
@pytest.mark.parametrize(("stage_name", "limit_bytes"), [("parent_checkpoint", 100_000), ("block_profile", 2500)])
def test_file_that_cannot_be_written_is_one_error(stage_name: str, limit_bytes: int, tmp_path: Path):
    """A file size limit makes the system refuse a write, as a full disk does; in this process or a stage's own."""
    environment = {**os.environ, "REFIT_HOME": str(tmp_path), "RECIPE": "tiny", "OMP_NUM_THREADS": "1"}
    if stage_name != "parent_checkpoint":
        command = [sys.executable, "-m", "pipeline", "materialize", "parent_checkpoint"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    command = [sys.executable, "-c", LIMITED, str(limit_bytes), "materialize", stage_name]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.stderr
    assert "cannot be written: File too large" in errors[0]
    assert "MiB free" in errors[0]
    assert "REFIT_HOME" in errors[0]
    assert "Traceback" not in ended.stderr
    assert not list((tmp_path / "store" / stage_name).glob("*/manifest.json"))


def test_disk_with_too_little_room_is_refused_before_the_stage_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    small = tmp_path / "home"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs more rights")
    try:
        message = refused(
            ["materialize", "--recipe", "tiny", "parent_checkpoint"],
            tmp_path=tmp_path,
            monkeypatch=monkeypatch,
            capsys=capsys,
            stage_name="parent_checkpoint",
        )
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert "4 MiB free, this stage wants at least 512 MiB" in message


def test_store_that_is_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "store").write_text("not a directory", encoding="utf-8")
    arguments = ["materialize", "--recipe", "tiny", "parent_checkpoint"]
    message = refused(arguments, tmp_path=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert "store" in message


def made(home: Path, monkeypatch: pytest.MonkeyPatch, *stages: str) -> dict[str, Path]:
    monkeypatch.setenv("REFIT_HOME", str(home))
    for stage_name in stages:
        main(["materialize", "--recipe", "tiny", stage_name])
    return {name: next((home / "store" / name).glob("*/manifest.json")).parent for name in stages}


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        ("truncated manifest", ["manifest.json cannot be read", "materialize corpora again"]),
        ("missing file", ["is missing, its manifest says", "materialize corpora again"]),
        ("changed bytes", ["has sha256", "was changed after it was published"]),
        ("result that is none", ["result.json cannot be read"]),
    ],
)
def test_artifact_that_something_happened_to_is_not_read(
    spoil: str, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    corpora = made(tmp_path / "home", monkeypatch, "corpora")["corpora"]
    data = next(corpora.glob("*.parquet"))
    if spoil == "truncated manifest":
        (corpora / "manifest.json").write_bytes((corpora / "manifest.json").read_bytes()[:50])
    elif spoil == "missing file":
        data.unlink()
    elif spoil == "changed bytes":
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    else:
        (corpora / "result.json").write_text("[]", encoding="utf-8")
    message = refused(
        ["materialize", "--recipe", "tiny", "evaluation_sets"],
        tmp_path=tmp_path,
        monkeypatch=monkeypatch,
        capsys=capsys,
        stage_name="evaluation_sets",
    )
    assert all(text in message for text in wanted), message
