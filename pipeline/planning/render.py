"""A plan as text for a terminal: one line per stage, units that suit the size, warnings below."""

from collections.abc import Callable, Sequence

from pipeline.costs import num_parameters
from pipeline.planning.plan import Plan, StagePlan
from pipeline.planning.ranges import Range
from pipeline.progress import format_duration

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def render_plan(plan: Plan) -> str:
    """Return the plan as a page of text."""
    sizes, execution = plan.sizes, plan.execution
    child = sizes.child_parameters
    lines = [
        f"Plan of recipe {plan.recipe_name}, target {plan.target_name}: low / expected / high, by configuration",
        f"parent    {short(num_parameters(sizes.parent))} parameters, {sizes.parent.num_hidden_layers} layers; search "
        f"space {sizes.space.num_candidates:,} blocks besides the parent's own",
        f"child     {_three(child, short)} parameters (the smallest there is, what the target suggests, the parent)",
        f"execution {execution.num_ranks} ranks, ZeRO {execution.zero_stage}, "
        f"micro-batch {execution.micro_batch_size}; "
        + (
            "no device given: for times, add --device NAME, --peak-tflops X or --measure"
            if plan.device is None
            else f"each on {plan.device.name}: {plan.device.peak_flops_per_s / 1e12:,.3g} TFLOP/s in bf16, "
            f"{plan.device.bandwidth_bytes_per_s / 1e9:,.4g} GB/s"
        ),
        "",
    ]
    header = ["stage", "tokens", "FLOPs", "peak memory of a rank", "disk kept", "while running", "time"]
    has_actual = any(stage.actual is not None for stage in plan.stages)
    if has_actual:
        header += ["took", "plan", "disk taken"]
    rows = [_row(stage, has_actual=has_actual) for stage in plan.stages]
    total = plan.total_time_s
    last = ["total", "", "", "", _three(plan.total_disk, binary), "", "-" if total is None else _three(total, seconds)]
    if has_actual:
        done = [stage.actual for stage in plan.stages if stage.actual is not None]
        last += [seconds(sum(one.wall_s for one in done)), "", binary(sum(one.disk_bytes for one in done))]
    lines += _aligned([header, *rows, last])
    if has_actual:
        lines += ["", "took: the artifact that is in the store now; of a resumed stage, its last session alone"]
    lines += ["", f"{len(plan.warnings)} warnings" if plan.warnings else "no warnings"]
    return "\n".join([*lines, *(f"! {warning}" for warning in plan.warnings)])


def short(value: float) -> str:
    """Return a count with three digits and a letter: 49.9 B."""
    for size, letter in ((1e15, "e15"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g} {letter}" if size < 1e15 else f"{value:.2g}"
    return f"{value:.3g}"


def binary(num_bytes: float) -> str:
    """Return bytes in the unit that leaves one to four digits before the point."""
    power = 0
    while num_bytes >= 1000 * 1024**power and power < len(_BINARY) - 1:
        power += 1
    return f"{num_bytes / 1024**power:.3g} {_BINARY[power]}"


def seconds(value: float) -> str:
    """Return a duration in words a person plans with."""
    if value < 90:
        return f"{value:.0f}s"
    if value < 2 * 86_400:
        return format_duration(value)
    return f"{value / 86_400:,.0f} days"


def _row(stage: StagePlan, *, has_actual: bool) -> list[str]:
    one = stage.estimate
    row = [
        stage.name,
        short(one.tokens.expected) if one.tokens.expected else "-",
        f"{one.flops.expected:.2g}" if one.flops.expected else "-",
        _three(one.memory, binary) if one.memory.high else "-",
        _three(one.disk, binary) if one.disk.high else "-",
        f"+{binary(one.working_disk.expected)}" if one.working_disk.high else "-",
        "-" if stage.time_s is None else _three(stage.time_s, seconds),
    ]
    if has_actual:
        row += _actual_cells(stage)
    return row


def _actual_cells(stage: StagePlan) -> list[str]:
    if stage.actual is None:
        return ["-", "-", "-"]
    if stage.time_s is None:
        verdict = "-"
    elif stage.time_s.holds(stage.actual.wall_s):
        verdict = "inside"
    else:
        verdict = f"{stage.actual.wall_s / max(stage.time_s.expected, 1e-9):.2g} x expected"
    return [seconds(stage.actual.wall_s), verdict, binary(stage.actual.disk_bytes)]


def _three(value: Range, spell: Callable[[float], str]) -> str:
    texts = [spell(value.low), spell(value.expected), spell(value.high)]
    return texts[1] if len(set(texts)) == 1 else " / ".join(texts)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
