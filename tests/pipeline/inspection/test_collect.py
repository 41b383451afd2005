"""Blocks that no solution uses: found through the library that each solution was chosen from, and removed if asked."""

import json
from pathlib import Path

import pytest

from pipeline.architecture import Architecture, BlockSpec, gqa, swiglu
from pipeline.artifacts import ArtifactStore
from pipeline.cli import main
from pipeline.inspection.collect import collect_blocks, find_unused_blocks
from pipeline.stage import StageResult
from tests.pipeline.puzzle.builders import make_architecture

PARENT = make_architecture(num_layers=2)
NARROW, ONE_HEAD = swiglu(16), gqa(1)


def publish(store: ArtifactStore, asset: str, name: str, files: dict[str, object], **inputs: str) -> str:
    """Publish an artifact made of JSON files; return its content hash."""
    directory = store.directory(asset, name)
    directory.mkdir(parents=True)
    for file, value in files.items():
        (directory / file).write_text(json.dumps(value), encoding="utf-8")
    identity = {"recipe": "r", "target": "t", "identity": {"inputs": inputs}}
    (directory / "identity.json").write_text(json.dumps(identity), encoding="utf-8")
    return store.publish(asset, name, result=StageResult(), wall_s=0.0, provenance={}).content_hash


def entry(fingerprint: str | None) -> dict[str, object]:
    kind = "trained" if fingerprint else "parent"
    return {"kind": kind, "fingerprint": fingerprint, "content_hash": None, "initial_loss": None, "final_loss": None}


def library_of(layers: dict[str, dict[str, dict[str, str | None]]]) -> dict[str, object]:
    return {
        layer: {
            subblock: {variant: entry(fingerprint) for variant, fingerprint in variants.items()}
            for subblock, variants in subblocks.items()
        }
        for layer, subblocks in layers.items()
    }


def child(*blocks: BlockSpec) -> dict[str, object]:
    architecture: Architecture = PARENT.with_blocks(blocks)
    return {"architecture": architecture.to_json()}


def block(layer: int, **changes: object) -> BlockSpec:
    return PARENT.blocks[layer].model_copy(update=changes)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """A store with one library, from which a pool and a refined solution were chosen."""
    store = ArtifactStore(tmp_path / "store")
    halves = {"attention": {"kv2": None, "kv1": "a{}"}, "ffn": {"ffn64": None, "ffn16": "f{}"}}
    layers = {
        layer: {
            subblock: {variant: name and name.format(layer) for variant, name in variants.items()}
            for subblock, variants in halves.items()
        }
        for layer in ("0", "1")
    }
    layers["1"]["pair"] = {"kv1+ffn16": "p1"}
    for name in ("a0", "f0", "a1", "f1", "p1", "stray"):
        publish(store, "bld_block", name, {"block.json": name})
    library = publish(store, "block_library", "library", {"index.json": library_of(layers)})
    scores = publish(store, "block_scores", "scores", {"scores.json": 1}, block_library=library)
    narrow_first = child(block(0, ffn=NARROW), block(1))
    publish(store, "mip_solution", "mip", {"pool.json": {"solutions": [narrow_first]}}, block_scores=scores)
    pair_last = child(block(0), block(1, attention=ONE_HEAD, ffn=NARROW))
    publish(store, "refined_solution", "refined", {"solution.json": pair_last}, block_library=library)
    return store


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def test_blocks_of_every_answer_stay_and_a_pair_stands_for_its_halves(store: ArtifactStore):
    found = find_unused_blocks(store)
    assert names(found.unused) == ["a0", "a1", "f1", "stray"]
    assert found.num_kept == 2


def test_library_without_a_solution_keeps_its_blocks(store: ArtifactStore):
    index = library_of({"0": {"ffn": {"ffn32": "stray"}, "attention": {"kv1": "a0"}}})
    publish(store, "block_library", "other", {"index.json": index})
    assert names(find_unused_blocks(store).unused) == ["a1", "f1"]


def test_nothing_is_unused_while_a_library_is_unfinished(store: ArtifactStore):
    store.directory("block_library", "running").mkdir()
    found = find_unused_blocks(store)
    assert found.unused == ()
    assert "running is unfinished" in found.obstacle


def test_collecting_is_dry_unless_asked(store: ArtifactStore):
    (dry,) = collect_blocks(store, remove=False)
    assert dry.detail.startswith("would remove 4 blocks")
    assert "collect --remove" in dry.next_step
    assert len(list((store.root / "bld_block").iterdir())) == 6
    (done,) = collect_blocks(store, remove=True)
    assert done.detail.startswith("removed 4 blocks")
    assert sorted(path.name for path in (store.root / "bld_block").iterdir()) == ["f0", "p1"]
    assert find_unused_blocks(store).unused == ()


def test_the_command_tells_what_it_would_remove(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("REFIT_HOME", str(store.root.parent))
    main(["collect", "--recipe", "tiny"])
    assert "would remove 4 blocks that no solution uses" in capsys.readouterr().out
