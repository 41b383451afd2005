"""The whole recipe on `tiny` through the real command line, twice; then its summary and an answer in each mode."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.model.checkpoint import load_model
from pipeline.stages.registry import STAGES
from tests.dagster.commands import REPOSITORY, materialize_command, run_module
from tests.end_to_end.conftest import TinyRun

MAX_SECOND_RUN_S = 60.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tiny_from_the_command_line_runs_then_is_reused_and_summarised(tiny_run: TinyRun):
    home = tiny_run.home
    for stage in STAGES:
        assert f"{stage.name} ran: " in tiny_run.process.stderr, stage.name

    shutil.rmtree(home / "dagster")
    began = time.monotonic()
    second = run_module(*materialize_command(select="*", target="fused"), home=home)
    assert second.returncode == 0, second.stderr[-5000:]
    assert time.monotonic() - began < MAX_SECOND_RUN_S
    for stage in STAGES:
        assert f"{stage.name} reused: " in second.stderr, stage.name

    done = run_module("pipeline", "summary", "--started-at", str(time.time() - 100), home=home)
    assert done.returncode == 0, done.stderr
    summary = json.loads((home / "summary.json").read_text())
    assert summary["recipe"] == "tiny"
    assert summary["target"] == "fused"
    assert summary["wall_s"].keys() == {stage.name for stage in STAGES}
    assert summary["total_wall_s"] >= 100
    assert summary["parameters"]["child"] < summary["parameters"]["parent"]
    assert (REPOSITORY / summary["report"]).is_file()
    assert (REPOSITORY / summary["exported_model"]).is_dir()
    assert f"{summary['parameters']['child']:,}" in done.stdout

    for thinking in ("on", "off"):
        chat = run_module("pipeline", "chat", "--thinking", thinking, "What is 2 + 2?", home=home)
        assert chat.returncode == 0, chat.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_checkpoint_leaves_as_a_directory_that_transformers_loads(tiny_run: TinyRun, tmp_path: Path):
    out = tmp_path / "distilled"
    done = run_module("pipeline", "export", "kd_checkpoint", str(out), home=tiny_run.home)
    assert done.returncode == 0, done.stderr
    assert f"kd_checkpoint is in {out}" in done.stdout
    exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    (distilled,) = (tiny_run.home / "store" / "kd_checkpoint").glob("*/model.safetensors")
    ids_BT = torch.arange(24).reshape(2, 12)
    expected = load_model(distilled.parent, dtype=torch.float32)(input_ids=ids_BT).logits
    torch.testing.assert_close(exported(input_ids=ids_BT, use_cache=False).logits, expected, atol=1e-5, rtol=0)

    again = run_module("pipeline", "export", "kd_checkpoint", str(out), home=tiny_run.home)
    assert again.returncode == 1
    assert "want an empty or new directory" in again.stderr


def test_summary_before_anything_is_materialized_is_one_clear_line(tmp_path: Path):
    done = run_module("pipeline", "summary", home=tmp_path)

    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: recipe tiny, target fused, has no parent_checkpoint yet: run `make demo RECIPE=tiny TARGET=fused`"
    )
