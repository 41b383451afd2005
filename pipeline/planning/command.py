"""The command `plan`: which device, then the plan as text."""

from pipeline.execution import Workspace
from pipeline.planning.devices import device_of_peak, find_device
from pipeline.planning.plan import make_plan
from pipeline.planning.render import render_plan


def plan_text(
    workspace: Workspace, *, target: str, device: str | None, peak_tflops: float | None, measure: bool
) -> str:
    """Return the plan of a target; without a device there are no times, since none would be honest.

    Raises:
        RecipeError, CheckpointError: see make_plan; or no such device.
    """
    if measure:
        from pipeline.puzzle.devices import measure_this_machine  # loads torch, which other plans need not pay for

        chosen = measure_this_machine("bf16")
    elif peak_tflops is not None:
        chosen = device_of_peak(peak_tflops)
    else:
        chosen = None if device is None else find_device(device)
    return render_plan(make_plan(workspace, target_name=target, device=chosen))
