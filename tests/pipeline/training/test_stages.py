"""The three stages end to end on tiny checkpoints: outputs, metrics, resume, ranks."""

import dataclasses
import weakref
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytest
import torch
from torch.nn import functional as F

from pipeline.data.packed import blend_split, load_packed, long_context_split, save_packed
from pipeline.model.checkpoint import TensorReader, load_model, read_architecture
from pipeline.progress import SilentReporter
from pipeline.recipe import LongContextPhase, PretrainingConfig, SFTConfig, SFTStage
from pipeline.stage import WORK_DIR, ExecutionSettings, StageInputs, StageResult
from pipeline.stages import cpt_checkpoint, kd_checkpoint, sft_checkpoint
from pipeline.training.fitting import fit_checkpoint, plan_phases
from pipeline.training.objectives import NextTokenObjective
from pipeline.training.schedules import learning_rate_factor
from pipeline.training.validation import mean_cross_entropy
from tests.pipeline.training.builders import (
    KD,
    OPTIMIZER,
    VOCAB_SIZE,
    Interrupted,
    InterruptingReporter,
    child_architecture,
    counted_layer_runs,
    parent_architecture,
    sample_windows,
    text_windows,
    write_checkpoint,
)

CPT = PretrainingConfig(tokens=20 * 4 * 16, global_batch_size=4, long_context=(), optimizer=OPTIMIZER, precision="bf16")
SFT = SFTConfig(
    stages=(
        SFTStage(
            blend="all", shuffle=True, replay_share=0.0, tokens=20 * 4 * 16, global_batch_size=4, optimizer=OPTIMIZER
        ),
    ),
    precision="bf16",
    seed=0,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> StageInputs:
    root = tmp_path_factory.mktemp("store")
    child = write_checkpoint(root / "child", child_architecture(), seed=1, dtype=torch.bfloat16)
    mixture, toggle = root / "mixture", root / "toggle"
    save_packed(mixture, "train", text_windows(80))
    save_packed(mixture, "validation", text_windows(6, seed=9))
    save_packed(toggle, blend_split("all"), sample_windows(30))
    save_packed(toggle, "validation", sample_windows(4, seed=9))
    return StageInputs(
        artifacts={
            "parent_checkpoint": write_checkpoint(root / "parent", parent_architecture(), seed=0),
            "fused_checkpoint": child,
            "kd_checkpoint": child,
            "cpt_checkpoint": child,
            "distillation_mix": mixture,
            "pretraining_mix": mixture,
            "reasoning_toggle_dataset": toggle,
        },
        store_root=root,
        downloads=root,
        execution=ExecutionSettings(micro_batch_size=2, checkpoint_interval_steps=8),
    )


def _require_trained_checkpoint(out_dir: Path, result: StageResult, *, start_dir: Path) -> None:
    assert read_architecture(out_dir) == read_architecture(start_dir)
    start, end = TensorReader(start_dir), TensorReader(out_dir)
    assert end.names == start.names  # tied: no head
    assert all(end.dtype(name) == start.dtype(name) for name in end.names)
    assert not torch.equal(end.read("model.norm.weight"), start.read("model.norm.weight"))
    load_model(out_dir, dtype=torch.float32)
    assert (out_dir / "tokenizer.json").is_file()
    curve = pl.read_parquet(out_dir / "curve.parquet")
    assert curve["step"].to_list() == list(range(1, 21))
    assert result.metrics["num_steps"] == 20
    assert result.metrics["num_tokens"] == 1280
    assert result.metrics["final_loss"] == curve["loss"][-1]
    assert result.facts["world_size"] == "1"
    assert result.facts["micro_batch_size"] == "2"


def test_kd_brings_the_child_nearer_to_its_parent(inputs: StageInputs, tmp_path: Path):
    result = kd_checkpoint.run(KD, inputs, tmp_path)
    _require_trained_checkpoint(tmp_path, result, start_dir=inputs["fused_checkpoint"])
    assert result.metrics["validation_kl_ratio"] < 0.9
    assert pl.read_parquet(tmp_path / "curve.parquet").columns[-2:] == ["kl", "cosine"]


def test_kd_of_the_parent_itself_has_nothing_to_lower(inputs: StageInputs, tmp_path: Path):
    same = {**inputs.artifacts, "fused_checkpoint": inputs["parent_checkpoint"]}
    slow = KD.model_copy(update={"optimizer": OPTIMIZER.model_copy(update={"learning_rate": 1e-8})})
    result = kd_checkpoint.run(slow, dataclasses.replace(inputs, artifacts=same), tmp_path)
    assert result.metrics["validation_kl_before"] == pytest.approx(0, abs=1e-6)
    assert result.metrics["validation_kl_ratio"] < 0.01


def test_cpt_lowers_perplexity(inputs: StageInputs, tmp_path: Path):
    result = cpt_checkpoint.run(CPT, inputs, tmp_path)
    _require_trained_checkpoint(tmp_path, result, start_dir=inputs["kd_checkpoint"])
    assert result.metrics["validation_perplexity_ratio"] < 0.9


def test_sft_lowers_loss_over_several_epochs(inputs: StageInputs, tmp_path: Path):
    result = sft_checkpoint.run(SFT, inputs, tmp_path)
    _require_trained_checkpoint(tmp_path, result, start_dir=inputs["cpt_checkpoint"])
    assert result.metrics["validation_loss_ratio"] < 0.98
    assert result.metrics["num_epochs"] == pytest.approx(80 / 30)
    assert 0 < result.metrics["trained_token_share"] < 1


def test_sft_stages_train_one_after_the_other_on_their_blends(inputs: StageInputs, tmp_path: Path):
    toggle = tmp_path / "toggle"
    save_packed(toggle, blend_split("first"), sample_windows(12))
    save_packed(toggle, blend_split("second"), sample_windows(16, seed=3))
    save_packed(toggle, "validation", sample_windows(4, seed=9))
    optimizer = OPTIMIZER.model_copy(update={"learning_rate": 1e-4})
    config = SFT.model_copy(
        update={
            "stages": (
                SFTStage(
                    blend="first",
                    shuffle=True,
                    replay_share=0.0,
                    tokens=6 * 4 * 16,
                    global_batch_size=4,
                    optimizer=OPTIMIZER,
                ),
                SFTStage(
                    blend="second",
                    shuffle=False,
                    replay_share=0.0,
                    tokens=8 * 2 * 16,
                    global_batch_size=2,
                    optimizer=optimizer,
                ),
            )
        }
    )
    given = dataclasses.replace(inputs, artifacts={**inputs.artifacts, "reasoning_toggle_dataset": toggle})
    result = sft_checkpoint.run(config, given, tmp_path / "out")
    curve = pl.read_parquet(tmp_path / "out" / "curve.parquet")
    assert curve["step"].to_list() == list(range(1, 15))
    assert curve["tokens"][-1] == 6 * 4 * 16 + 8 * 2 * 16
    # Each stage has a schedule of its own.
    assert curve["learning_rate"][6:].max() <= 1e-4 < curve["learning_rate"][:6].max()
    assert result.metrics["validation_loss_ratio"] < 1


def test_replayed_text_is_forgotten_less(inputs: StageInputs, tmp_path: Path):
    pretrained = tmp_path / "pretrained"
    fast = OPTIMIZER.model_copy(update={"learning_rate": 2e-2})
    cpt_checkpoint.run(CPT.model_copy(update={"optimizer": fast}), inputs, pretrained)
    # Samples that go down the vocabulary, where text goes up.
    samples = sample_windows(30)
    mirrored = dataclasses.replace(
        samples,
        tokens_NT=VOCAB_SIZE - 1 - samples.tokens_NT,
        labels_NT=torch.where(samples.labels_NT < 0, samples.labels_NT, VOCAB_SIZE - 1 - samples.labels_NT),
    )
    toggle = tmp_path / "toggle"
    save_packed(toggle, blend_split("all"), mirrored)
    save_packed(toggle, "validation", mirrored)
    artifacts = {**inputs.artifacts, "cpt_checkpoint": pretrained, "reasoning_toggle_dataset": toggle}
    given = dataclasses.replace(inputs, artifacts=artifacts)
    text = load_packed(inputs["pretraining_mix"], "validation")

    def loss_on_text(directory: Path) -> float:
        model = load_model(directory, dtype=torch.float32)
        return mean_cross_entropy(model, text, batch_size=2, device=torch.device("cpu"))

    losses = {}
    for share in (0.0, 0.5):
        stage = SFT.stages[0].model_copy(update={"replay_share": share, "optimizer": fast})
        sft_checkpoint.run(SFT.model_copy(update={"stages": (stage,)}), given, tmp_path / str(share))
        losses[share] = loss_on_text(tmp_path / str(share))
    before = loss_on_text(pretrained)
    assert losses[0.0] > before + 0.1
    assert losses[0.5] < losses[0.0] - 0.5 * (losses[0.0] - before)


def test_interrupted_kd_publishes_the_same_bytes(inputs: StageInputs, tmp_path: Path):
    kd_checkpoint.run(KD, inputs, tmp_path / "straight")
    with pytest.raises(Interrupted):
        kd_checkpoint.run(
            KD, dataclasses.replace(inputs, reporter=InterruptingReporter(at_step=11)), tmp_path / "resumed"
        )
    result = kd_checkpoint.run(KD, inputs, tmp_path / "resumed")
    assert result.metrics["num_resumes"] == 1
    for name in ("model.safetensors", "curve.parquet", "architecture.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_kd_that_makes_activations_again_publishes_the_same_bytes(inputs: StageInputs, tmp_path: Path):
    config = KD.model_copy(update={"precision": "bf16"})
    num_runs: list[int] = []
    for recomputes in (False, True):
        execution = inputs.execution.model_copy(update={"recompute_activations": recomputes})
        with counted_layer_runs() as counted:
            kd_checkpoint.run(config, dataclasses.replace(inputs, execution=execution), tmp_path / str(recomputes))
        num_runs.append(counted())
    for name in ("model.safetensors", "curve.parquet"):
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes(), name
    # 20 steps of two micro-batches, and the student's two layers.
    assert num_runs[1] - num_runs[0] == 20 * 2 * 2


LONG = LongContextPhase(sequence_length=32, tokens=6 * 2 * 32, global_batch_size=2, learning_rate=5e-4)
LONG_CPT = CPT.model_copy(update={"long_context": (LONG,)})


def _with_long_windows(inputs: StageInputs, root: Path) -> StageInputs:
    mixture = root / "long-mixture"
    save_packed(mixture, "train", text_windows(80))
    save_packed(mixture, "validation", text_windows(6, seed=9))
    save_packed(mixture, long_context_split(32), text_windows(12, num_tokens=32, seed=3))
    start = write_checkpoint(root / "start", child_architecture(), seed=1)  # fp32, as between two phases
    return dataclasses.replace(
        inputs,
        artifacts={**inputs.artifacts, "pretraining_mix": mixture, "kd_checkpoint": start},
        execution=inputs.execution.model_copy(update={"checkpoint_interval_steps": 2}),
    )


@pytest.fixture(scope="module")
def straight(inputs: StageInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training on both lengths that nothing interrupted."""
    root = tmp_path_factory.mktemp("straight")
    cpt_checkpoint.run(LONG_CPT, _with_long_windows(inputs, root), root / "out")
    return root / "out"


def test_long_windows_are_a_training_of_their_own_behind_the_first(inputs: StageInputs, tmp_path: Path):
    placed = _with_long_windows(inputs, tmp_path)
    result = cpt_checkpoint.run(LONG_CPT, placed, tmp_path / "both")

    cpt_checkpoint.run(CPT, placed, tmp_path / "first")
    only_long = tmp_path / "only-long"
    save_packed(only_long, "train", text_windows(12, num_tokens=32, seed=3))
    save_packed(only_long, "validation", text_windows(6, seed=9))
    second = CPT.model_copy(
        update={
            "tokens": LONG.tokens,
            "global_batch_size": LONG.global_batch_size,
            "optimizer": OPTIMIZER.model_copy(update={"learning_rate": LONG.learning_rate}),
        }
    )
    # A micro-batch of the long windows holds as many tokens as one of the short ones.
    alone = dataclasses.replace(
        placed,
        artifacts={**placed.artifacts, "pretraining_mix": only_long, "kd_checkpoint": tmp_path / "first"},
        execution=placed.execution.model_copy(update={"micro_batch_size": 1}),
    )
    cpt_checkpoint.run(second, alone, tmp_path / "second")

    weights, expected = TensorReader(tmp_path / "both"), TensorReader(tmp_path / "second")
    assert all(torch.equal(weights.read(name), expected.read(name)) for name in expected.names)
    curve = pl.read_parquet(tmp_path / "both" / "curve.parquet")
    assert curve["step"].to_list() == list(range(1, 27))
    assert curve["tokens"][-1] == CPT.tokens + LONG.tokens == result.metrics["num_tokens"]
    assert curve["loss"][20:].to_list() == pl.read_parquet(tmp_path / "second" / "curve.parquet")["loss"].to_list()


def test_two_phases_equal_a_plain_loop_over_the_same_windows(inputs: StageInputs, tmp_path: Path):
    """Plain torch in fp32: one AdamW for the short windows, another for the long ones behind them."""
    placed = _with_long_windows(inputs, tmp_path)
    config = CPT.model_copy(update={"long_context": (LONG,), "precision": "fp32"})
    cpt_checkpoint.run(config, placed, tmp_path / "out")

    model = load_model(placed["kd_checkpoint"], dtype=torch.float32).train()
    long_tokens_NT = text_windows(12, num_tokens=32, seed=3).tokens_NT
    losses, norms, rates = [], [], []
    for tokens_NT, batch_size, peak in (
        (text_windows(80).tokens_NT, 4, OPTIMIZER.learning_rate),
        (long_tokens_NT, LONG.global_batch_size, LONG.learning_rate),
    ):
        batches = tokens_NT.split(batch_size)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            betas=OPTIMIZER.betas,
        )
        for step, tokens_BT in enumerate(batches):
            rate = peak * learning_rate_factor(step, total_steps=len(batches), optimizer=OPTIMIZER)
            for group in optimizer.param_groups:
                group["lr"] = rate
            logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)))
            optimizer.step()
            losses.append(loss.item())
            rates.append(rate)

    curve = pl.read_parquet(tmp_path / "out" / "curve.parquet")
    assert curve["loss"].to_list() == pytest.approx(losses, rel=1e-6)
    assert curve["grad_norm"].to_list() == pytest.approx(norms, abs=1e-5)
    assert curve["learning_rate"].to_list() == pytest.approx(rates, rel=1e-12)
    trained = TensorReader(tmp_path / "out")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained.read(name), parameter.detach(), atol=5e-6, rtol=0)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_the_engine_of_a_phase_is_gone_before_the_next_one_begins(
    inputs: StageInputs, tmp_path: Path, zero_stage: Literal[1, 3]
):
    """Two engines at once would need twice the device memory that `plan` counts."""
    placed = _with_long_windows(inputs, tmp_path)
    execution = placed.execution.model_copy(update={"zero_stage": zero_stage})
    models: list[weakref.ref[torch.nn.Module]] = []

    def validate(model: Any) -> float:
        assert [seen for seen in models if seen() not in (None, model)] == []
        models.append(weakref.ref(model))
        return 0.0

    fit_checkpoint(
        start_dir=placed["kd_checkpoint"],
        out_dir=tmp_path / "out",
        phases=plan_phases(
            placed["pretraining_mix"],
            tokens=CPT.tokens,
            global_batch_size=CPT.global_batch_size,
            optimizer=OPTIMIZER,
            long_context=(LONG, LONG.model_copy(update={"learning_rate": 1e-4})),
            what="cpt",
        ),
        precision="bf16",
        make_objective=lambda _model: NextTokenObjective(),
        validate=validate,
        what="CPT steps",
        inputs=dataclasses.replace(placed, execution=execution),
    )
    assert len(models) == 6
    # What the second phase began from has served its purpose; what the third began from is removed with the work.
    kept = sorted(path.name for path in (tmp_path / "out" / WORK_DIR).glob("weights-*/*.safetensors"))
    assert len(kept) == 1


class _InterruptingPhase(SilentReporter):
    """Ends the stage right after it reported a step of one phase."""

    def __init__(self, *, window: int, at_step: int) -> None:
        self._window, self._at_step = window, at_step

    def step(self, step: int, total: int, /, *, what: str, **metrics: float) -> None:
        if step == self._at_step and f"{self._window} tokens a window" in what:
            raise Interrupted


# The base has 20 steps, the long windows 6, a checkpoint lies behind every second but the last: the second and third
# cases end it at the border, with nothing of the new phase saved.
@pytest.mark.parametrize(
    ("window", "at_step", "num_resumes"), [(16, 5, 1), (16, 20, 1), (32, 1, 0), (32, 5, 1)], ids=str
)
def test_a_training_interrupted_in_either_phase_publishes_the_same_bytes(
    inputs: StageInputs, tmp_path: Path, straight: Path, window: int, at_step: int, num_resumes: int
):
    placed = _with_long_windows(inputs, tmp_path)
    reporter = _InterruptingPhase(window=window, at_step=at_step)
    with pytest.raises(Interrupted):
        cpt_checkpoint.run(LONG_CPT, dataclasses.replace(placed, reporter=reporter), tmp_path / "resumed")
    result = cpt_checkpoint.run(LONG_CPT, placed, tmp_path / "resumed")
    assert result.metrics["num_resumes"] == num_resumes
    for name in ("model.safetensors", "curve.parquet"):
        assert (tmp_path / "resumed" / name).read_bytes() == (straight / name).read_bytes(), name
