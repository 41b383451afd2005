"""What is wrong with the machine that the stages run on. Read only."""

from pipeline.hardware import describe_hardware, idle_gpus
from pipeline.inspection.findings import Finding


def examine_machine() -> tuple[Finding, ...]:
    """Return whether PyTorch is a build for what this machine has."""
    told = idle_gpus()
    if told is not None:
        reason, _, step = told.rpartition(": ")
        return (Finding(severity="problem", subject="machine", detail=reason, next_step=step),)
    return (Finding(severity="ok", subject="machine", detail=describe_hardware()),)
