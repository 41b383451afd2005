"""Windows: nothing is lost, nothing is trained twice, and a packed sample is worth what it is worth alone."""

import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from pipeline.architecture import Architecture, AttentionSpec, BlockSpec, FFNSpec
from pipeline.data.chat import ChatSample
from pipeline.data.packed import IGNORED_LABEL, load_packed, save_packed
from pipeline.data.packing import pack_documents, pack_samples
from pipeline.errors import DataError
from pipeline.model.heterogeneous import build_model

VOCAB = 50
FEW = settings(max_examples=60, deadline=None)


def make_samples(seed: int, *, num_samples: int, max_length: int) -> list[ChatSample]:
    rng = random.Random(seed)
    samples = []
    for _ in range(num_samples):
        length = rng.randint(2, max_length)
        first = rng.randint(0, length - 1)
        samples.append(
            ChatSample(
                ids=tuple(rng.randrange(VOCAB) for _ in range(length)),
                trained_mask=tuple(place >= first for place in range(length)),
            )
        )
    return samples


def test_documents_packed_are_the_stream_cut_into_windows():
    packed = pack_documents([[1, 2, 3], [4], [5, 6, 7, 8]], rows=range(2), sequence_length=4, separator_id=0)
    assert packed.tokens_NT.tolist() == [[1, 2, 3, 0], [4, 0, 5, 6]]
    assert torch.equal(packed.labels_NT, packed.tokens_NT)
    assert packed.position_ids_NT.tolist() == [[0, 1, 2, 3]] * 2
    assert (packed.num_tokens, packed.num_trained_tokens) == (8, 6)


@FEW
@given(
    documents=st.lists(st.lists(st.integers(1, 2**31 - 1), max_size=30), max_size=12),
    sequence_length=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_documents_packed_stand_in_the_rows_asked_for(documents: list[list[int]], sequence_length: int, seed: int):
    stream = [token for document in documents for token in (*document, 0)]
    num_windows = len(stream) // sequence_length
    rows = random.Random(seed).sample(range(num_windows), k=num_windows)
    arrays = (np.array(document, dtype=np.int32) for document in documents)
    packed = pack_documents(arrays, rows=rows, sequence_length=sequence_length, separator_id=0)
    windows = [stream[sequence_length * number :][:sequence_length] for number in range(num_windows)]
    assert [packed.tokens_NT[row].tolist() for row in rows] == windows
    with pytest.raises(DataError, match=f"{num_windows + 1} windows .* asked of {len(stream)} tokens"):
        pack_documents(documents, rows=range(num_windows + 1), sequence_length=sequence_length, separator_id=0)


@pytest.mark.parametrize("seed", range(20))
def test_samples_packed_lose_nothing_and_train_each_token_once(seed: int):
    samples = make_samples(seed, num_samples=30, max_length=24)
    packing = pack_samples(samples, sequence_length=20, pad_id=0)
    packed = packing.packed
    assert [index for index, sample in enumerate(samples) if len(sample.ids) > 20] == list(packing.dropped)

    found = []
    num_padding = 0
    for tokens, labels, positions in zip(
        packed.tokens_NT.tolist(), packed.labels_NT.tolist(), packed.position_ids_NT.tolist(), strict=True
    ):
        starts = [*(place for place, position in enumerate(positions) if position == 0), len(tokens)]
        for start, end in itertools.pairwise(starts):
            assert positions[start:end] == list(range(end - start))
            if (
                all(label == IGNORED_LABEL for label in labels[start:end])
                and end == len(tokens)
                and not any(tokens[start:end])
            ):
                num_padding += end - start
                continue
            found.append((tuple(tokens[start:end]), tuple(labels[start:end])))
    wanted = [
        (
            sample.ids,
            tuple(
                token if on and place > 0 else IGNORED_LABEL
                for place, (token, on) in enumerate(zip(sample.ids, sample.trained_mask, strict=True))
            ),
        )
        for sample in samples
        if len(sample.ids) <= 20
    ]
    assert sorted(found) == sorted(wanted)
    assert num_padding == packing.num_padding_tokens
    assert packed.num_trained_tokens == sum(sum(sample.trained_mask[1:]) for sample in samples if len(sample.ids) <= 20)


def sample_of(length: int) -> ChatSample:
    return ChatSample(ids=(1,) * length, trained_mask=(True,) * length)


@FEW
@given(lengths=st.lists(st.integers(1, 20), max_size=80))
def test_samples_packed_follow_first_fit(lengths: list[int]):
    """The oracle scans every window for every sample."""
    windows: list[list[int]] = []
    for length in lengths:
        if length > 16:
            continue
        fits = [window for window in windows if sum(window) + length <= 16]
        if not fits:
            windows.append([])
            fits = windows[-1:]
        fits[0].append(length)
    packing = pack_samples([sample_of(length) for length in lengths], sequence_length=16, pad_id=0)
    positions = [[place for length in (*window, 16 - sum(window)) for place in range(length)] for window in windows]
    assert packing.packed.position_ids_NT.tolist() == positions
    assert packing.packed.tokens_NT.tolist() == [[1] * sum(window) + [0] * (16 - sum(window)) for window in windows]
    assert packing.num_padding_tokens == sum(16 - sum(window) for window in windows)
    assert packing.dropped == tuple(index for index, length in enumerate(lengths) if length > 16)


def test_samples_packed_beside_one_that_fits_anywhere_are_no_slower():
    """Windows that only the short one fits in stay open to the end: to scan them for every sample took minutes."""
    samples = [*(sample_of(60) for _ in range(100_000)), sample_of(30)]
    started_s = time.process_time()
    packing = pack_samples(samples, sequence_length=100, pad_id=0)
    assert time.process_time() - started_s < 20
    assert len(packing.packed) == 100_000
    assert packing.packed.labels_NT[0].tolist() == [-100, *[1] * 59, -100, *[1] * 29, *[-100] * 10]


def test_samples_packed_have_the_loss_of_samples_alone():
    architecture = Architecture(
        vocab_size=VOCAB,
        hidden_size=32,
        num_attention_heads=4,
        head_dim=8,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_ids=(0,),
        pad_token_id=None,
        blocks=tuple(
            BlockSpec(
                attention=AttentionSpec(kind="gqa", num_key_value_heads=2),
                ffn=FFNSpec(kind="swiglu", intermediate_size=48),
                parent_layers=(layer,),
            )
            for layer in range(2)
        ),
    )
    model = build_model(architecture, dtype=torch.float64, seed=1, initializer_range=0.5)
    samples = make_samples(3, num_samples=12, max_length=20)

    def summed_loss(tokens_NT: torch.Tensor, labels_NT: torch.Tensor, position_ids_NT: torch.Tensor) -> float:
        logits_NTV = model(input_ids=tokens_NT, position_ids=position_ids_NT, use_cache=False).logits
        return cross_entropy(
            logits_NTV[:, :-1].flatten(0, 1), labels_NT[:, 1:].flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        ).item()

    packed = pack_samples(samples, sequence_length=24, pad_id=0).packed
    assert len(packed) < len(samples)
    alone = 0.0
    for sample in samples:
        ids = torch.tensor([sample.ids])
        labels = torch.where(torch.tensor([sample.trained_mask]), ids, IGNORED_LABEL)
        alone += summed_loss(ids, labels, torch.arange(ids.shape[1])[None])
    together = summed_loss(packed.tokens_NT, packed.labels_NT, packed.position_ids_NT)
    assert together == pytest.approx(alone, rel=1e-12)


def test_packed_tokens_come_back_from_disk_as_they_were(tmp_path: Path):
    packed = pack_samples(make_samples(1, num_samples=9, max_length=8), sequence_length=8, pad_id=3).packed
    first = save_packed(tmp_path, "train", packed).read_bytes()
    loaded = load_packed(tmp_path, "train")
    assert torch.equal(loaded.tokens_NT, packed.tokens_NT)
    assert torch.equal(loaded.labels_NT, packed.labels_NT)
    assert torch.equal(loaded.position_ids_NT, packed.position_ids_NT)
    assert loaded.tokens_NT.dtype == torch.int64
    assert save_packed(tmp_path / "again", "train", loaded).read_bytes() == first
    with pytest.raises(DataError, match="no packed validation tokens"):
        load_packed(tmp_path, "validation")


def test_packed_tokens_taken_are_whole_windows_or_an_error():
    packed = pack_documents([range(1, 100)], rows=range(12), sequence_length=8, separator_id=0)
    assert packed.take(17).tokens_NT.shape == (3, 8)
    assert packed.take(16).tokens_NT.shape == (2, 8)
    with pytest.raises(DataError, match="97 tokens asked of a set of 96"):
        packed.take(97)
    assert packed.take(0).tokens_NT.shape == (0, 8)
    assert torch.equal(packed.rows(slice(-2, None)).tokens_NT, packed.tokens_NT[10:])
