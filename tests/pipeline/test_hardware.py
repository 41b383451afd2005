"""What this machine is: the GPU that an environment installed elsewhere would leave alone."""

from pathlib import Path

import pytest

from pipeline import hardware
from pipeline.hardware import hardware_id, idle_gpus
from pipeline.inspection.machine_health import examine_machine


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hardware, "_NVIDIA_GPUS", tmp_path)
    monkeypatch.setattr(hardware, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.mark.parametrize(("torch", "is_told"), [("2.13.0+cpu", True), ("2.13.0+cu130", False), ("2.13.0", False)])
def test_a_gpu_beside_a_cpu_build_is_told_with_the_way_out(
    torch: str, is_told: bool, gpus: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hardware, "version", lambda _: torch)
    assert idle_gpus() is None
    (gpus / "0000:01:00.0").mkdir()
    (gpus / "0000:01:00.0" / "information").write_text("Model: \t NVIDIA H100 80GB HBM3\nIRQ: \t 16\n")
    assert idle_gpus() is None  # a container without the device
    (gpus / "nvidia0").touch()
    told = idle_gpus()
    assert (told is not None) == is_told
    if told is not None:
        assert told.startswith("this machine has NVIDIA H100 80GB HBM3, and torch 2.13.0+cpu is a CPU build")
        assert told.endswith("`make --always-make install` here")
        (finding,) = examine_machine()
        assert (finding.severity, f"{finding.detail}: {finding.next_step}") == ("problem", told)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert idle_gpus() is None


@pytest.mark.parametrize(
    ("models", "visible", "found"),
    [
        (["H100"] * 4, None, "H100, H100, H100, H100"),
        (["H100"] * 4, "0,1", "H100, H100"),
        (["H100"] * 4, "2,3", "H100, H100"),
        (["H100"] * 4, "GPU-8932f937", "H100"),
        (["H100"] * 4, "", "none"),
        (["H100", "A100"], "1", "CUDA_VISIBLE_DEVICES=1, H100, A100"),
        (["H100"] * 2, "MIG-57d8", "CUDA_VISIBLE_DEVICES=MIG-57d8, H100, H100"),
    ],
)
def test_hardware_is_the_models_and_the_number_of_visible_gpus(
    models: list[str], visible: str | None, found: str, gpus: Path, monkeypatch: pytest.MonkeyPatch
):
    for number, model in enumerate(models):
        (gpus / f"0000:0{number}:00.0").mkdir()
        (gpus / f"0000:0{number}:00.0" / "information").write_text(f"Model: \t {model}\nIRQ: \t 16\n")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware_id()["gpus"] == found
