"""What machine this is, as far as a measurement depends on it. No torch."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
_DEVICES = Path("/dev")


def hardware_id() -> dict[str, str | int]:
    """Return processor, cores, accelerators and torch version: a timing taken under one is not valid under another."""
    return {
        "cpu": _cpu_model(),
        "num_cpus": num_cpus(),
        "gpus": ", ".join(_gpu_models()) or "none",
        "torch": version("torch"),
    }


def num_cpus() -> int:
    """Return how many CPUs this process may use, which under a scheduler are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_hardware() -> str:
    """Return the hardware in one line for tables and reports."""
    found = hardware_id()
    gpus = "" if found["gpus"] == "none" else f", {found['gpus']}"
    return f"{found['cpu']}, {found['num_cpus']} cores{gpus}, torch {found['torch']}"


def idle_gpus() -> str | None:
    """Return why stages would leave this machine's GPUs alone, and what to do; None where they would not.

    An environment that was installed where no GPU was seen, on a login node or in an image, has PyTorch's CPU build.
    """
    models, torch = _nvidia_models(), version("torch")
    # A container may see the host's /proc and no device.
    if not models or not any(_DEVICES.glob("nvidia[0-9]*")) or _are_hidden() or not torch.endswith("+cpu"):
        return None
    return (
        f"this machine has {models[0]}, and torch {torch} is a CPU build, installed where no GPU was seen: run "
        "`.venv/bin/python -m pip uninstall --yes torch` and `make --always-make install` here"
    )


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def _gpu_models() -> list[str]:
    """Return the model of every accelerator that this process may use; CUDA_VISIBLE_DEVICES may hide some or all.

    Which of a machine's equal GPUs they are is not told: the same job started again may be given others.
    """
    if _are_hidden():
        return []
    visible, models = os.environ.get("CUDA_VISIBLE_DEVICES"), _nvidia_models()
    if visible is None:
        return models
    # Where models differ, what a number means is up to CUDA_DEVICE_ORDER and the container; a MIG slice is a share.
    if len(set(models)) != 1 or "MIG" in visible:
        return [f"CUDA_VISIBLE_DEVICES={visible}", *models]
    return models[:1] * len(visible.split(","))


def _are_hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


def _nvidia_models() -> list[str]:
    lines = (
        line
        for information in sorted(_NVIDIA_GPUS.glob("*/information"))
        for line in information.read_text(encoding="utf-8").splitlines()
    )
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
