"""Packed sets on disk: batches are what they ever were, and no more of a set is held than was asked for."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.data.packed import IGNORED_LABEL, Int32Windows, PackedTokens, blend_split, load_packed, save_packed
from pipeline.recipe import SFTConfig, SFTStage
from pipeline.stage import ExecutionSettings, StageInputs
from pipeline.stages import sft_checkpoint
from pipeline.training.batches import with_replay
from pipeline.training.objectives import take_batch
from tests.pipeline.training.builders import OPTIMIZER, sample_windows, text_windows

CPU = torch.device("cpu")
FIELDS = ("tokens_NT", "labels_NT", "position_ids_NT")


def held_whole(path: Path) -> PackedTokens:
    """Read a set as it was read when all of it was held as int64."""
    tensors = {name: tensor.long() for name, tensor in load_file(path).items()}
    return PackedTokens(
        tokens_NT=tensors["tokens"], labels_NT=tensors["labels"], position_ids_NT=tensors["position_ids"]
    )


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.dtype, wanted.dtype) == (torch.int64, torch.int64)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("packed", [text_windows(23), sample_windows(23)], ids=["text", "samples"])
def test_batches_of_a_mapped_set_are_those_of_one_held_as_int64(tmp_path: Path, packed: PackedTokens):
    path = save_packed(tmp_path, "train", packed)
    mapped, whole = load_packed(tmp_path, "train"), held_whole(path)
    for rows in ([0], [5, 3, 22, 3], range(4, 9)):
        found, wanted = (take_batch(one, rows, device=CPU) for one in (mapped, whole))
        assert_same(found.tokens_BT, wanted.tokens_BT)
        assert_same(found.labels_BT, wanted.labels_BT)
        assert type(found.tokens_BT) is type(found.labels_BT) is torch.Tensor
        assert (found.position_ids_BT is None) == (wanted.position_ids_BT is None)
        if found.position_ids_BT is not None and wanted.position_ids_BT is not None:
            assert_same(found.position_ids_BT, wanted.position_ids_BT)
    for name in FIELDS:
        found_NT, wanted_NT = getattr(mapped.take(7 * 16), name), getattr(whole.take(7 * 16), name)
        assert_same(found_NT, wanted_NT)
        assert_same(found_NT[2:5].to(CPU), wanted_NT[2:5])
    assert mapped.num_trained_tokens == whole.num_trained_tokens
    assert (len(mapped), mapped.num_tokens, mapped.sequence_length) == (23, 23 * 16, 16)


def test_windows_held_as_int32_compute_as_int64():
    wide_NT = sample_windows(6).labels_NT
    held_NT = Int32Windows.of(wide_NT.to(torch.int32))
    weight_VD = torch.randn(64, 3)
    mask_NT = wide_NT != IGNORED_LABEL
    operations: list[Any] = [
        lambda one: one,
        lambda one: one[3],
        lambda one: one[:, 1:][2],
        lambda one: one[[4, 0]],
        lambda one: one[torch.tensor([4, 0]), 1:],
        lambda one: one[mask_NT],
        lambda one: one[:, None],
        lambda one: one[1:].flatten() * 2**40,
        lambda one: torch.cat([one, wide_NT, one[:2]]),
        lambda one: torch.stack(list(one)),
        lambda one: torch.nn.functional.pad(one[0, 1:], (0, 1), value=IGNORED_LABEL),
        lambda one: torch.nn.functional.embedding(one.clamp(min=0), weight_VD),
        lambda one: torch.where(one < 0, one, 1 - one),
        lambda one: torch.arange(1000)[one.clamp(min=0)[0], None],
    ]
    for operation in operations:
        found, wanted = operation(held_NT), operation(wide_NT)
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert torch.equal(found, wanted)
    assert held_NT.tolist() == wide_NT.tolist()
    assert (len(held_NT), held_NT.ndim, held_NT.numel(), held_NT.device) == (6, 2, 96, CPU)


@pytest.mark.parametrize("num_windows", [0, 1, 7])
def test_packed_files_are_those_of_the_safetensors_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_windows: int
):
    monkeypatch.setattr("pipeline.data.packed._PART_TOKENS", 3 * 16)  # so that the last part is a rest
    packed = sample_windows(num_windows) if num_windows else text_windows(0)
    tensors = {"tokens": packed.tokens_NT, "labels": packed.labels_NT, "position_ids": packed.position_ids_NT}
    save_file({name: tensor.to(torch.int32).contiguous() for name, tensor in tensors.items()}, tmp_path / "wanted")
    path = save_packed(tmp_path, "train", packed)
    assert path.read_bytes() == (tmp_path / "wanted").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train.safetensors", "wanted"]
    loaded = load_packed(tmp_path, "train")
    assert all(torch.equal(getattr(loaded, name), getattr(packed, name)) for name in FIELDS)
    assert loaded.num_trained_tokens == packed.num_trained_tokens


def test_a_set_in_use_stays_what_it_was_when_another_takes_its_place(tmp_path: Path):
    before, after = text_windows(4), text_windows(2, seed=5)
    save_packed(tmp_path, "train", before)
    mapped = load_packed(tmp_path, "train")
    save_packed(tmp_path, "train", after)
    assert torch.equal(mapped.tokens_NT, before.tokens_NT)
    assert torch.equal(load_packed(tmp_path, "train").tokens_NT, after.tokens_NT)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of a process as Linux tells it")
def test_a_batch_of_a_large_set_holds_a_fraction_of_its_bytes(tmp_path: Path):
    """20 million tokens: 240 MB on disk, 480 MB as int64."""
    windows_NT = torch.zeros(1, 4096, dtype=torch.int32).expand(5000, 4096)
    tracemalloc.start()
    path = save_packed(
        tmp_path, "train", PackedTokens(tokens_NT=windows_NT, labels_NT=windows_NT, position_ids_NT=windows_NT)
    )
    before = resident_bytes()
    packed = load_packed(tmp_path, "train").take(19 * 10**6)
    take_batch(packed, [4000, 3, 2500, 17], device=CPU)
    grown, (_, most_traced) = resident_bytes() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 240e6
    assert grown < 48e6
    assert most_traced < 48e6  # by saving, too


def test_a_set_larger_than_the_memory_is_mapped(tmp_path: Path):
    """Linux refuses to map such a file for writing, as safe_open() does."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    num_windows = memory_bytes // (4 * 4096)
    size = num_windows * 4096 * 4
    header = json.dumps(
        {
            name: {"dtype": "I32", "shape": [num_windows, 4096], "data_offsets": [place * size, (place + 1) * size]}
            for place, name in enumerate(("labels", "position_ids", "tokens"))
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with (tmp_path / "train.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + 3 * size)  # a hole: it takes no room on the disk
    packed = load_packed(tmp_path, "train")
    assert packed.num_tokens * 4 == size
    assert not take_batch(packed, [num_windows - 1], device=CPU).tokens_BT.any()


class StoppedError(Exception):
    """Raised where training would begin."""


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_fine_tuning_reads_the_pretraining_text_where_it_replays_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
):
    toggle, mixture = tmp_path / "toggle", tmp_path / "mixture"
    save_packed(toggle, blend_split("all"), sample_windows(30))
    save_packed(toggle, "validation", sample_windows(4))
    if share:
        save_packed(mixture, "train", text_windows(50))
    stage = SFTStage(
        blend="all", shuffle=True, replay_share=share, tokens=1280, global_batch_size=4, optimizer=OPTIMIZER
    )
    given: list[PackedTokens] = []

    def fit_checkpoint(*, phases: Any, **_: Any) -> None:
        given.extend(phase.plan.data for phase in phases)
        raise StoppedError

    monkeypatch.setattr(sft_checkpoint, "fit_checkpoint", fit_checkpoint)
    artifacts = {"reasoning_toggle_dataset": toggle, "pretraining_mix": mixture, "cpt_checkpoint": tmp_path}
    with pytest.raises(StoppedError):
        sft_checkpoint.run(
            SFTConfig(stages=(stage,), precision="fp32", seed=0),
            StageInputs(artifacts=artifacts, store_root=tmp_path, downloads=tmp_path, execution=ExecutionSettings()),
            tmp_path / "out",
        )
    wanted = with_replay(sample_windows(30), text_windows(50), share=share, what="all")
    assert len(wanted) == (60 if share else 30)
    (data,) = given
    assert all(torch.equal(getattr(data, name), getattr(wanted, name)) for name in FIELDS)
