"""The store: what is published is found, what was tampered with is refused, one process makes an artifact at a time."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.artifacts import MANIFEST, Artifact, ArtifactStore, read_json, write_atomically
from pipeline.errors import ArtifactError, MissingInputError
from pipeline.stage import StageResult

KEY = "0123456789abcdef0123"


def _publish(store: ArtifactStore, *, key: str = KEY, files: dict[str, bytes] | None = None) -> Artifact:
    directory = store.directory("corpora", key)
    for name, data in (files or {"a.txt": b"alpha", "deep/b.bin": b"beta", "view/figure.svg": b"<svg/>"}).items():
        write_atomically(directory / name, data)
    return store.publish("corpora", key, result=StageResult(metrics={"n": 2}), wall_s=1.0, provenance={"by": "test"})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def test_artifact_published_is_found_with_its_result(store: ArtifactStore):
    published = _publish(store)

    found = store.find("corpora", KEY)

    assert found == published
    assert found is not None
    assert found.record.result.metrics == {"n": 2}
    found.verify_hashes()


def test_artifact_whose_metrics_are_not_finite_can_be_opened(store: ArtifactStore):
    store.directory("corpora", KEY).mkdir(parents=True)
    result = StageResult(metrics={"loss": math.nan, "perplexity": math.inf, "num_steps": 3})
    store.publish("corpora", KEY, result=result, wall_s=1.0, provenance={})

    metrics = store.open("corpora", KEY).record.result.metrics

    assert math.isnan(metrics["loss"])
    assert metrics["perplexity"] == math.inf
    assert metrics["num_steps"] == 3
    assert isinstance(metrics["num_steps"], int)


def test_artifact_without_manifest_is_not_found(store: ArtifactStore):
    write_atomically(store.directory("corpora", KEY) / "a.txt", b"half written")

    assert store.find("corpora", KEY) is None


def test_artifact_never_made_is_a_clear_error(store: ArtifactStore):
    with pytest.raises(MissingInputError, match="materialize corpora"):
        store.open("corpora", KEY)


def test_content_hash_ignores_clock_view_and_fingerprint(store: ArtifactStore):
    first = _publish(store)
    time.sleep(0.01)
    second = _publish(store, key="f" * 20, files={"deep/b.bin": b"beta", "a.txt": b"alpha", "view/other.svg": b"<g/>"})

    assert first.content_hash == second.content_hash


@pytest.mark.parametrize(
    "files",
    [{"a.txt": b"alphA", "deep/b.bin": b"beta"}, {"a2.txt": b"alpha", "deep/b.bin": b"beta"}, {"a.txt": b"alpha"}],
)
def test_content_hash_sees_every_byte_name_and_file(store: ArtifactStore, files: dict[str, bytes]):
    assert _publish(store).content_hash != _publish(store, key="f" * 20, files=files).content_hash


def test_publish_removes_work_and_leaves_hidden_files_out(store: ArtifactStore):
    artifact = _publish(store, files={"a.txt": b"a", "_work/checkpoint.bin": b"x" * 10, ".cache": b"y"})

    assert set(artifact.manifest.files) == {"a.txt"}
    assert not (artifact.path / "_work").exists()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(("change", "message"), [(Path.unlink, "is missing"), (_cut, "is 3 bytes, .* says 4 bytes")])
def test_artifact_with_a_file_gone_or_cut_is_refused_when_opened(
    store: ArtifactStore, change: Callable[[Path], None], message: str
):
    change(_publish(store).path / "deep" / "b.bin")

    with pytest.raises(ArtifactError, match=message):
        store.find("corpora", KEY)


def test_artifact_with_changed_bytes_is_refused_when_verified(store: ArtifactStore):
    artifact = _publish(store)
    (artifact.path / "a.txt").write_bytes(b"ALPHA")

    found = store.find("corpora", KEY)

    assert found is not None
    with pytest.raises(ArtifactError, match=r"a\.txt has sha256 .* was changed after it was published"):
        found.verify_hashes()


def test_manifest_with_an_unknown_key_is_refused(store: ArtifactStore):
    path = _publish(store).path / MANIFEST
    path.write_text(path.read_text().replace('"asset"', '"extra": 1,\n "asset"', 1))

    with pytest.raises(ArtifactError, match=r"manifest.json cannot be read \(extra: "):
        store.find("corpora", KEY)


def test_lock_held_by_another_process_is_waited_for_until_that_ends(store: ArtifactStore):
    code = (
        "import sys, time; from pathlib import Path; from pipeline.artifacts import ArtifactStore\n"
        f"with ArtifactStore(Path(sys.argv[1])).locked('corpora', '{KEY}'):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"

        heard: list[str] = []

        def kill_holder(message: str) -> None:
            heard.append(message)
            holder.send_signal(signal.SIGKILL)

        with store.locked("corpora", KEY, on_wait=kill_holder) as directory:  # a killed process holds no lock
            assert directory.is_dir()
        assert heard == [f"waiting for process {holder.pid}, which is making corpora"]
    finally:
        holder.kill()
        holder.communicate()


def test_write_atomically_replaces_the_whole_file_and_leaves_no_temporary(tmp_path: Path):
    path = tmp_path / "a" / "file.json"

    write_atomically(path, b"old and longer")
    write_atomically(path, b"new")

    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file.json"]  # noqa: PTH208


def test_free_space_too_small_is_refused_with_both_figures(store: ArtifactStore):
    with pytest.raises(ArtifactError, match=r"MiB free, this stage wants at least"):
        store.require_free_space(2**62)


def test_read_json_refuses_what_is_not_an_object(tmp_path: Path):
    (tmp_path / "list.json").write_text("[1]")

    with pytest.raises(ArtifactError, match="holds a list"):
        read_json(tmp_path / "list.json")
