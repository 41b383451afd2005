"""The stages that read and write whole models, fusion among them, run as the pipeline runs them."""

import json
import zipfile
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.architecture import LINEAR_FFN, NO_ATTENTION, NO_FFN, Architecture, BlockSpec, FFNSpec, gqa, swiglu
from pipeline.artifacts import sha256_file
from pipeline.data.packed import PackedTokens, save_packed
from pipeline.errors import CheckpointError
from pipeline.fingerprint import canonical_json
from pipeline.model.checkpoint import load_model, read_architecture, save_checkpoint
from pipeline.model.export_llama import export_llama
from pipeline.recipe import (
    DependencyConfig,
    ExportConfig,
    FusionConfig,
    HubParent,
    LocalParent,
    MeasurementConfig,
    RandomParent,
    WheelParent,
)
from pipeline.stage import StageInputs, StageResult
from pipeline.stages import dependency_matrix, exported_model, fused_checkpoint, fusion_report, parent_checkpoint
from pipeline.stages.configs import ExportStage, FusedStage, FusionReportStage, ParentStage
from tests.pipeline.model.builders import make_architecture, make_blocks, make_llama, make_model, make_tokenizer_dir
from tests.pipeline.model.test_gguf_import import ARCHITECTURE, write_gguf
from tests.pipeline.model.test_hf_import import saved_llama

RANDOM = RandomParent(
    kind="random",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.02,
    tie_word_embeddings=True,
    seed=0,
)


def stage_inputs(tmp_path: Path, **artifacts: Path) -> StageInputs:
    return StageInputs(artifacts=artifacts, store_root=tmp_path / "store", downloads=tmp_path / "downloads")


def run_parent(tmp_path: Path, parent: RandomParent | WheelParent | LocalParent | HubParent) -> StageResult:
    return parent_checkpoint.run(ParentStage(parent=parent), stage_inputs(tmp_path), tmp_path / "parent")


def test_random_parent_reports_what_it_made(tmp_path: Path):
    result = run_parent(tmp_path, RANDOM)
    assert result.metrics == {
        "num_parameters": 320 * 32 + 32 + 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32),
        "num_hidden_layers": 2,
        "vocab_size": 320,
        "kv_bytes_per_token": 2 * 2 * 2 * 8 * 2,
        "num_non_finite_weights": 0,
    }
    assert result.facts["dtype"] == "float32"
    canonical_json(result)


def wheel_parent(tmp_path: Path, *, architecture: str) -> WheelParent:
    gguf = write_gguf(tmp_path / "model.gguf", make_llama(ARCHITECTURE))
    (tmp_path / "downloads").mkdir()
    with zipfile.ZipFile(tmp_path / "downloads" / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf, "tiny_model/model.gguf")
    return WheelParent(
        kind="wheel",
        architecture=architecture,
        requirement="tiny-model==1.0",
        member="tiny_model/model.gguf",
        sha256=sha256_file(gguf),
        licence="Apache-2.0",
    )


def test_wheel_parent_is_read_from_the_downloaded_wheel(tmp_path: Path):
    make_llama(ARCHITECTURE).save_pretrained(tmp_path / "hf")  # whose config.json the recipe may name
    parent = wheel_parent(tmp_path, architecture=str(tmp_path / "hf"))
    result = run_parent(tmp_path, parent)
    assert read_architecture(tmp_path / "parent") == ARCHITECTURE
    assert result.facts["licence"] == "Apache-2.0"


def test_parent_that_is_not_the_named_architecture_is_refused(tmp_path: Path):
    parent = wheel_parent(tmp_path, architecture="smollm2-135m-instruct")
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 2, .* 'smollm2-135m-instruct'.* is 30"):
        run_parent(tmp_path, parent)


def test_non_finite_weights_of_a_local_parent_are_counted(tmp_path: Path):
    source = saved_llama(tmp_path / "hf")
    result = run_parent(tmp_path, LocalParent(kind="local", path=str(source), licence="test"))
    assert result.metrics["num_non_finite_weights"] == 0
    architecture = make_architecture()
    model = make_llama(architecture)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, :3] = float("nan")
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(source)
    result = run_parent(tmp_path, LocalParent(kind="local", path=str(source), licence="test"))
    assert result.metrics["num_non_finite_weights"] == 4


def write_checkpoint(directory: Path, blocks: tuple[BlockSpec, ...]) -> Path:
    architecture = make_architecture(blocks=blocks)
    save_checkpoint(
        directory,
        architecture=architecture,
        tensors=make_model(architecture).state_dict(),
        tokenizer_dir=make_tokenizer_dir(directory.with_name("tokenizer")),
    )
    return directory


def write_mixture(directory: Path) -> Path:
    tokens_NT = torch.randint(3, 320, (4, 16), generator=torch.Generator().manual_seed(0))
    positions_NT = torch.arange(16).expand(4, 16)
    packed = PackedTokens(tokens_NT=tokens_NT, labels_NT=tokens_NT, position_ids_NT=positions_NT)
    save_packed(directory, "validation", packed)
    return directory


FUSION = FusedStage(
    fusion=FusionConfig(
        min_run_layers=2,
        max_run_layers=8,
        max_dependency=2.0,
        max_ffn_gb_per_device=1.0,
        max_run_kl=9.0,
        keep_last_ffn=True,
        norm_rule="fold_each",
        calibration_tokens=48,
        precision="fp32",
    ),
    served_precision="bf16",
    num_devices=2,
)
PARENT_LAYER, FFN_LAYER = (gqa(2), swiglu(48)), (NO_ATTENTION, swiglu(48))


def with_fusion(**changes: float) -> FusedStage:
    return FUSION.model_copy(update={"fusion": FUSION.fusion.model_copy(update=changes)})


def run_fusion(tmp_path: Path, blocks: tuple[BlockSpec, ...], *, config: FusedStage = FUSION) -> StageResult:
    inputs = stage_inputs(
        tmp_path,
        child_checkpoint=write_checkpoint(tmp_path / "child", blocks),
        distillation_mix=write_mixture(tmp_path / "mix"),
    )
    dependency_matrix.run(DependencyConfig(tokens=32, precision="fp32"), inputs, tmp_path / "dependency")
    both = {**inputs.artifacts, "dependency_matrix": tmp_path / "dependency"}
    return fused_checkpoint.run(config, stage_inputs(tmp_path, **both), tmp_path / "fused")


def test_child_without_a_run_is_passed_on_as_it_is(tmp_path: Path):
    result = run_fusion(tmp_path, make_blocks(PARENT_LAYER, FFN_LAYER, FFN_LAYER, PARENT_LAYER))
    for name in ("architecture.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "child" / name).read_bytes()
    assert result.metrics["num_runs"] == 0
    assert result.metrics["kl_to_unfused_nats"] == 0.0
    assert "no stretch of attention-free layers has 2 FFNs" in result.facts["outcome"]


@torch.no_grad()
def test_fused_child_is_measured_against_the_unfused(tmp_path: Path):
    blocks = make_blocks(PARENT_LAYER, FFN_LAYER, FFN_LAYER, FFN_LAYER, PARENT_LAYER)
    result = run_fusion(tmp_path, blocks)
    assert result.metrics["num_runs"] == 1
    assert result.metrics["num_fused_layers"] == 2
    assert (result.metrics["num_layers_before"], result.metrics["num_layers_after"]) == (5, 4)
    child, fused = (load_model(tmp_path / name, dtype=torch.float32) for name in ("child", "fused"))
    tokens_NT = torch.randint(3, 320, (4, 16), generator=torch.Generator().manual_seed(0))[:3]
    log_p, log_q = (model(tokens_NT).logits.log_softmax(-1) for model in (child, fused))
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    assert result.metrics["kl_to_unfused_nats"] == pytest.approx(float(kl), rel=1e-4)
    hidden, fused_hidden = (model.model(tokens_NT).last_hidden_state for model in (child, fused))
    error = (fused_hidden - hidden).norm() / hidden.norm()
    assert result.metrics["relative_output_error"] == pytest.approx(float(error), rel=1e-4)
    kl_alone, error_alone = round(result.metrics["kl_to_unfused_nats"], 4), round(float(error), 4)
    ((layers, widths, dependency, *alone),) = result.tables["runs"].rows
    assert (layers, widths, alone) == ("1-2", "48 + 48", [kl_alone, error_alone, True])
    matrix = pl.read_parquet(tmp_path / "dependency" / "dependencies.parquet")
    assert dependency == round(matrix.row(by_predicate=(pl.col("removed_layer") == 1) & (pl.col("layer") == 2))[2], 4)


def test_run_that_costs_more_than_allowed_stays_unfused(tmp_path: Path):
    blocks = make_blocks(PARENT_LAYER, FFN_LAYER, FFN_LAYER, FFN_LAYER, PARENT_LAYER)
    result = run_fusion(tmp_path, blocks, config=with_fusion(max_run_kl=1e-12))
    assert (result.metrics["num_runs"], result.metrics["num_runs_left_out"]) == (0, 1)
    assert result.tables["runs"].rows[0][-1] is False
    assert "each of 1 runs alone costs more than 1e-12 nats" in result.facts["outcome"]
    for name in ("architecture.json", "model.safetensors"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "child" / name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_dependency": 1e-9},
        # Two FFNs of 48 x 32 in bf16 on two devices: 3 x 48 x 32 + 32 parameters each, half a byte short.
        {"max_ffn_gb_per_device": (2 * (3 * 48 * 32 + 32) - 0.5) / 1e9},
    ],
)
def test_stretch_that_is_dependent_or_too_large_stays_unfused(tmp_path: Path, changes: dict[str, float]):
    blocks = make_blocks(PARENT_LAYER, FFN_LAYER, FFN_LAYER, FFN_LAYER, PARENT_LAYER)
    result = run_fusion(tmp_path, blocks, config=with_fusion(**changes))
    assert (result.metrics["num_runs"], result.metrics["num_runs_left_out"]) == (0, 0)
    assert "no stretch of attention-free layers has 2 FFNs to join" in result.facts["outcome"]


def test_dependency_matrix_is_a_table_a_heat_map_and_groups(tmp_path: Path):
    blocks = make_blocks(*[PARENT_LAYER] * 5, FFN_LAYER, (NO_ATTENTION, NO_FFN))
    inputs = stage_inputs(
        tmp_path,
        child_checkpoint=write_checkpoint(tmp_path / "child", blocks),
        distillation_mix=write_mixture(tmp_path / "mix"),
    )
    result = dependency_matrix.run(DependencyConfig(tokens=32, precision="fp32"), inputs, tmp_path / "dependency")
    table = pl.read_parquet(tmp_path / "dependency" / "dependencies.parquet")
    assert table.select("removed_layer", "layer").rows() == [(i, j) for i in range(6) for j in range(i + 1, 6)]
    assert result.metrics["num_pairs"] == 15
    assert result.metrics["num_invalid_pairs"] == 0
    assert result.metrics["max_dependency"] == table["cosine_distance"].max()
    assert [row[0] for row in result.tables["full_block_groups"].rows] in (["0-3"], ["1-4"])
    assert [row[0] for row in result.tables["layers"].rows] == [0, 1, 2, 3, 4, 5]
    svg = (tmp_path / "dependency" / "view" / result.figures["dependencies"]).read_text(encoding="utf-8")
    assert "Dependency of blocks" in svg


REPORT = FusionReportStage(fusion=FUSION.fusion, measurement=MeasurementConfig(rounds=2, warmups=1), num_threads=1)


def run_fusion_report(tmp_path: Path, blocks: tuple[BlockSpec, ...]) -> StageResult:
    """The report of a child that stands for its own parent, and whose distillation undid the fusion."""
    run_fusion(tmp_path, blocks)
    inputs = stage_inputs(
        tmp_path,
        parent_checkpoint=tmp_path / "child",
        child_checkpoint=tmp_path / "child",
        fused_checkpoint=tmp_path / "fused",
        kd_checkpoint=tmp_path / "child",
        distillation_mix=tmp_path / "mix",
    )
    return fusion_report.run(REPORT, inputs, tmp_path / "report")


@torch.no_grad()
def test_fusion_report_compares_both_norm_rules_reversal_and_deletion(tmp_path: Path):
    blocks = make_blocks(PARENT_LAYER, FFN_LAYER, FFN_LAYER, FFN_LAYER, FFN_LAYER, PARENT_LAYER)
    result = run_fusion_report(tmp_path, blocks)
    rows = {row["model"]: row for row in json.loads((tmp_path / "report" / "fusion.json").read_text())}
    assert list(rows)[:4] == ["child", "fused, fold_each", "fused, last", "runs in reverse order"]
    assert rows["child"]["kl_to_child_nats"] == rows["fused, after distillation"]["kl_to_child_nats"] == 0.0
    assert any(name.startswith("2 FFNs deleted: ") for name in rows)
    child, fused = (load_model(tmp_path / name, dtype=torch.float32) for name in ("child", "fused"))
    tokens_NT = torch.randint(3, 320, (4, 16), generator=torch.Generator().manual_seed(0))[:3]
    log_p, log_q = (model(tokens_NT).logits.log_softmax(-1) for model in (child, fused))
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert result.metrics["kl_fold_each_nats"] == pytest.approx(kl, rel=1e-4)
    assert result.metrics["kl_to_parent_fused_nats"] == pytest.approx(kl, rel=1e-4)
    assert result.metrics["kl_to_parent_after_kd_nats"] == pytest.approx(0.0, abs=1e-7)
    for name in ("kl_last_nats", "kl_reversed_nats", "kl_deleted_nats"):
        assert result.metrics[name] > 0
    assert 0 < result.metrics["max_identity_error"] <= 1e-5
    assert [row[0] for row in result.tables["latency"].rows] == ["child", "fused", "without"]


def test_fusion_report_of_a_child_without_a_run_says_so(tmp_path: Path):
    result = run_fusion_report(tmp_path, make_blocks(PARENT_LAYER, PARENT_LAYER))
    assert result.metrics == {"num_runs": 0, "max_identity_error": 0.0}
    assert "no run" in result.facts["outcome"]


def test_export_is_loaded_back_and_compared(tmp_path: Path):
    blocks = make_blocks(PARENT_LAYER, (NO_ATTENTION, swiglu(512)), (gqa(1), swiglu(48)))
    inputs = stage_inputs(tmp_path, rl_checkpoint=write_checkpoint(tmp_path / "rl", blocks))
    result = exported_model.run(
        ExportStage(export=ExportConfig(gguf="fp32", plain_llama=True)), inputs, tmp_path / "export"
    )
    assert result.metrics["max_abs_logit_difference"] <= 1e-5
    assert result.metrics["num_token_id_differences"] == 0
    assert result.metrics["num_padding_parameters"] == 2 * 3 * 32 * (256 - 48)
    assert result.metrics["num_layers_dropped"] == result.metrics["num_runtimes_that_cannot"] == 0
    assert [row[:2] for row in result.tables["portability"].rows] == [
        (runtime, "after re-packing") for runtime in ("transformers", "vLLM", "llama.cpp", "mlx-lm")
    ]
    assert result.facts["plain_llama"] == "not written: re-packed layer 1 is no_op+ffn512"
    assert result.metrics["llama_size_mib"] == 0
    assert result.facts["gguf"] == "model.gguf, fp32"
    assert result.metrics["gguf_size_mib"] == pytest.approx(result.metrics["size_mib"], rel=0.15)


@pytest.mark.parametrize(
    ("ffn", "gguf", "fact"),
    [
        (LINEAR_FFN, "fp32", "not written: linear FFN in layer 1: not implemented"),
        (swiglu(256), None, "not asked for"),
    ],
)
def test_export_without_gguf_says_why(tmp_path: Path, ffn: FFNSpec, gguf: str | None, fact: str):
    blocks = make_blocks(PARENT_LAYER, (gqa(1), ffn))
    inputs = stage_inputs(tmp_path, rl_checkpoint=write_checkpoint(tmp_path / "rl", blocks))
    config = ExportStage(export=ExportConfig.model_validate({"gguf": gguf, "plain_llama": False}))
    result = exported_model.run(config, inputs, tmp_path / "export")
    assert result.facts["gguf"] == fact
    assert result.metrics["gguf_size_mib"] == 0
    assert result.metrics["num_runtimes_that_cannot"] == (3 if gguf else 0)
    assert not (tmp_path / "export" / "model.gguf").exists()


@pytest.mark.parametrize("asked", [True, False])
def test_child_of_equal_layers_leaves_as_a_plain_llama_where_the_recipe_asks(tmp_path: Path, asked: bool):
    blocks = make_blocks(PARENT_LAYER, (NO_ATTENTION, NO_FFN), PARENT_LAYER)
    inputs = stage_inputs(tmp_path, rl_checkpoint=write_checkpoint(tmp_path / "rl", blocks))
    config = ExportStage(export=ExportConfig(gguf=None, plain_llama=asked))
    result = exported_model.run(config, inputs, tmp_path / "export")
    assert result.facts["plain_llama"] == ("llama/" if asked else "not asked for")
    assert (tmp_path / "export" / "llama").exists() is asked
    assert (result.metrics["llama_size_mib"] > 0) is asked
    # The layers that DeciLM pads are whole here.
    assert result.metrics["llama_size_mib"] < result.metrics["size_mib"]


def test_plain_llama_that_computes_something_else_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def export_another(checkpoint_dir: Path, *, out_dir: Path) -> Architecture:
        architecture = export_llama(checkpoint_dir, out_dir=out_dir)
        tensors = load_file(out_dir / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"] *= 2
        save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
        return architecture

    monkeypatch.setattr(exported_model, "export_llama", export_another)
    blocks = make_blocks(PARENT_LAYER, PARENT_LAYER)
    inputs = stage_inputs(tmp_path, rl_checkpoint=write_checkpoint(tmp_path / "rl", blocks))
    config = ExportStage(export=ExportConfig(gguf=None, plain_llama=True))
    result = exported_model.run(config, inputs, tmp_path / "export")
    assert result.metrics["max_abs_logit_difference"] > 0.01
