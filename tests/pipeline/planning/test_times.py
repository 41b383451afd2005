"""Planned times against the run of `smol` that docs/log.md records stage by stage."""

from pathlib import Path

import pytest

from pipeline.artifacts import ArtifactStore
from pipeline.execution import Workspace
from pipeline.planning.devices import Device, device_of_peak, find_device
from pipeline.planning.plan import make_plan
from pipeline.planning.ranges import ZERO, Range
from pipeline.recipe_file import load_recipe
from pipeline.stage import ExecutionSettings

# docs/log.md, 25m22s from a clean clone: two cores with AVX512-BF16.
MEASURED_S = {
    ("channel_importance",): 7,
    ("block_library",): 259,
    ("block_scores",): 159,
    ("block_profile",): 41,
    ("reasoning_traces", "reasoning_toggle_dataset"): 25,
    ("child_checkpoint",): 34,
    ("kd_checkpoint",): 206,
    ("cpt_checkpoint",): 65,
    ("sft_checkpoint",): 181,
    ("rl_checkpoint",): 193,
    ("parent_evaluation", "evaluation"): 177,
    ("speed_report",): 48,
}


def planned_s(device: Device) -> dict[tuple[str, ...], Range]:
    workspace = Workspace(
        recipe=load_recipe("smol"),
        recipe_given="smol",
        store=ArtifactStore(Path("/nonexistent")),
        downloads=Path("/nonexistent"),
        execution=ExecutionSettings(),
    )
    plan = make_plan(workspace, target_name="decode-1.3x", device=device)
    times = {stage.name: stage.time_s for stage in plan.stages}
    found = {}
    for names in MEASURED_S:
        found[names] = ZERO
        for name in names:
            time_s = times[name]
            assert time_s is not None
            found[names] = found[names] + time_s
    return found


# Nobody measured the peak of the machine of that run. Another one with the same instructions reached 0.58 TFLOP/s; the
# 4.1 TFLOP of channel_importance in 7 s, with the start of a process in them, need more than that. block_scores did not
# order layers then, which is a hundredth of its work: at this peak its least is 0.8 s above what was measured.
@pytest.mark.parametrize(
    ("peak_tflops", "outside"), [(0.58, {("channel_importance",), ("block_scores",)}), (1.0, set())]
)
def test_what_smol_took_lies_in_the_planned_ranges(peak_tflops: float, outside: set[tuple[str, ...]]):
    planned = planned_s(device_of_peak(peak_tflops))
    assert {names for names, took in MEASURED_S.items() if not planned[names].holds(took)} == outside
    for names, time_s in planned.items():
        assert time_s.high <= 60 * time_s.low, names  # a range that holds everything says nothing


def test_a_peak_alone_gives_a_cpu_the_bandwidth_of_a_cpu():
    assert device_of_peak(0.5).bandwidth_bytes_per_s == pytest.approx(25e9)
    named = find_device("h100-80gb")
    assert device_of_peak(named.peak_flops_per_s / 1e12).bandwidth_bytes_per_s == pytest.approx(
        named.bandwidth_bytes_per_s, rel=0.25
    )
