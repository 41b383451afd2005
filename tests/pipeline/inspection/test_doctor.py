"""What the doctor finds in a store that something has happened to, and what it removes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.artifacts import IDENTITY
from pipeline.cli import main
from pipeline.execution import Workspace, find_artifact, materialize
from pipeline.inspection.findings import Finding
from pipeline.inspection.garbage import find_garbage, remove_garbage
from pipeline.inspection.store_health import examine_store
from pipeline.recipe_file import load_recipe, parse_recipe
from tests.dagster.stores import open_tiny, publish_all
from tests.pipeline.inspection.conftest import MADE, TARGET

HOLD_LOCK = """
import fcntl, os, sys, time
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.truncate(0); lock.write(str(os.getpid())); lock.flush()
print("held", flush=True)
time.sleep(60)
"""


def examined(workspace: Workspace, *, verify: bool = False) -> list[Finding]:
    return list(examine_store(workspace, recipes=[workspace.recipe], verify=verify))


def path_of(workspace: Workspace, stage_name: str) -> Path:
    artifact = find_artifact(workspace, stage_name, TARGET)
    assert artifact is not None
    return artifact.path


def other_seed(workspace: Workspace) -> Workspace:
    plain = workspace.recipe.model_dump(mode="json")
    plain["pretraining_mix"] |= {"seed": 1234}
    return replace(workspace, recipe=parse_recipe(plain, origin="test"))


def test_a_sound_store_has_no_problem(workspace: Workspace):
    findings = examined(workspace, verify=True)
    assert {finding.severity for finding in findings} == {"ok"}
    assert any(f"{len(MADE)} are complete: every byte" in finding.detail for finding in findings)


def test_a_missing_file_is_a_problem(workspace: Workspace):
    next(path_of(workspace, "corpora").glob("*.parquet")).unlink()
    (problem,) = [finding for finding in examined(workspace) if finding.severity == "problem"]
    assert "is missing, its manifest says" in problem.detail


def test_a_flipped_byte_is_found_by_reading_every_byte_alone(workspace: Workspace):
    file = path_of(workspace, "distillation_mix") / "train.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert not [finding for finding in examined(workspace) if finding.severity == "problem"]
    (problem,) = [finding for finding in examined(workspace, verify=True) if finding.severity == "problem"]
    assert "train.safetensors has sha256" in problem.detail


def test_a_truncated_manifest_is_a_problem(workspace: Workspace):
    manifest = path_of(workspace, "evaluation_sets") / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:40])
    (problem,) = [finding for finding in examined(workspace) if finding.severity == "problem"]
    assert "manifest.json cannot be read" in problem.detail
    assert problem.detail.endswith("and materialize evaluation_sets again")


def test_an_unfinished_artifact_and_a_held_lock_are_told(workspace: Workspace):
    directory = workspace.store.root / "kd_checkpoint" / "0123456789abcdef0123"
    (directory / "_work").mkdir(parents=True)
    (directory / "_work" / "state").write_bytes(b"x" * 100)
    (unfinished,) = [finding for finding in examined(workspace) if finding.subject == "unfinished"]
    assert "with work to continue from" in unfinished.detail

    lock = directory.with_name(directory.name + ".lock")
    lock.touch()
    with subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            findings = examined(workspace)
            (held,) = [finding for finding in findings if finding.subject == "lock"]
            assert f"being made by process {holder.pid}" in held.detail
            assert not [finding for finding in findings if finding.subject == "unfinished"]
            removed = remove_garbage(workspace, recipes=[workspace.recipe])
            assert any("was left alone" in finding.detail for finding in removed)
            assert directory.is_dir()
        finally:
            holder.kill()
    assert not [finding for finding in examined(workspace) if finding.subject == "lock"]
    remove_garbage(workspace, recipes=[workspace.recipe])
    assert not directory.exists()


def test_garbage_is_what_no_recipe_refers_to_and_nothing_else_goes(workspace: Workspace):
    other = other_seed(workspace)
    materialize(other, "pretraining_mix", TARGET)
    kept, dropped = path_of(workspace, "pretraining_mix"), path_of(other, "pretraining_mix")

    assert find_garbage(workspace, recipes=[workspace.recipe, other.recipe]) == ()
    assert find_garbage(workspace, recipes=[workspace.recipe]) == (dropped,)
    remove_garbage(workspace, recipes=[workspace.recipe])
    assert kept.is_dir()
    assert not dropped.exists()
    assert all(find_artifact(workspace, name, TARGET) for name in MADE)


def test_what_a_recipe_of_another_name_made_is_kept(workspace: Workspace):
    plain = workspace.recipe.model_dump(mode="json")
    plain["name"] = "my-own"
    plain["pretraining_mix"] |= {"seed": 1234}
    mine = replace(workspace, recipe=parse_recipe(plain, origin="test"))
    materialize(mine, "pretraining_mix", TARGET)
    assert find_garbage(workspace, recipes=[workspace.recipe]) == ()
    plain["pretraining_mix"] |= {"seed": 5678}
    edited = parse_recipe(plain, origin="test")
    assert find_garbage(workspace, recipes=[workspace.recipe, edited]) == (path_of(mine, "pretraining_mix"),)


def test_what_follows_a_removed_artifact_is_kept(workspace: Workspace):
    mixture = path_of(workspace, "distillation_mix")
    corpora = path_of(workspace, "corpora")
    (corpora / "manifest.json").unlink()
    assert mixture not in find_garbage(workspace, recipes=[workspace.recipe])


def test_what_was_measured_in_a_runtime_that_is_gone_is_kept_and_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REFIT_RUNTIMES", str(tmp_path / "runtimes"))
    python = tmp_path / "runtimes" / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    recipe = load_recipe("tiny")
    profile = recipe.block_profile.model_copy(update={"backend": "vllm"})
    workspace = open_tiny(tmp_path, recipe=recipe.model_copy(update={"block_profile": profile}))
    for target in recipe.targets:
        for artifact in publish_all(workspace, target=target).values():
            (artifact.path / IDENTITY).write_text('{"recipe": "tiny"}')
    of_one_target = find_garbage(workspace, recipes=[workspace.recipe])
    assert [path.parent.name for path in of_one_target] == ["pareto"]
    python.unlink()
    assert find_garbage(workspace, recipes=[workspace.recipe]) == ()


def test_blocks_are_garbage_once_no_library_names_them(workspace: Workspace):
    block = workspace.store.root / "bld_block" / "feedfeedfeedfeedfeed"
    block.mkdir(parents=True)
    library = workspace.store.root / "block_library" / "0123456789abcdef0123"
    library.mkdir(parents=True)
    (library / "identity.json").write_text('{"recipe": "tiny", "target": "fused", "identity": {}}', encoding="utf-8")
    assert block not in find_garbage(workspace, recipes=[workspace.recipe])  # the library is not finished
    (library / "manifest.json").write_text("{}", encoding="utf-8")
    (library / "index.json").write_text(
        '{"0": {"ffn": {"ffn16": {"kind": "trained", "fingerprint": "feedfeedfeedfeedfeed"}}}}', encoding="utf-8"
    )
    assert block not in find_garbage(workspace, recipes=[workspace.recipe])
    (library / "index.json").write_text("{}", encoding="utf-8")
    assert block in find_garbage(workspace, recipes=[workspace.recipe])


def test_the_command_exits_with_1_when_something_is_wrong(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("REFIT_HOME", str(workspace.store.root.parent))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    main(["doctor", "--recipe", "tiny"])
    assert capsys.readouterr().out.endswith("no problems\n")
    next(path_of(workspace, "corpora").glob("*.parquet")).unlink()
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--recipe", "tiny"])
    assert ended.value.code == 1
    assert "!! artifact: " in capsys.readouterr().out
