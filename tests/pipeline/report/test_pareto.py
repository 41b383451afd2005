"""Points by hand: who beats whom, what is missing, and that the figure and the table hold every child."""

import itertools
import json
import math
import random
from pathlib import Path
from xml.etree import ElementTree

import polars as pl

from pipeline.evaluation.results import write_evaluations
from pipeline.puzzle.tables import CHILDREN, PARETO, SCHEMAS, read_table, write_table
from pipeline.recipe import Limit, ProfileConfig, Scenario
from pipeline.report.pareto import Panel, Point, Span, by_panel, dominated_targets, frontier
from pipeline.report.search_figures import pareto_panels
from pipeline.stage import StageInputs, target_key
from pipeline.stages import pareto
from pipeline.stages.configs import ParetoStage
from tests.pipeline.report.builders import PERPLEXITY, checkpoint_evaluation

PANEL = Panel(text="validation", scenario="chat", phase="decode")
PROFILE = ProfileConfig(
    backend="torch",
    scenarios=(Scenario(name="chat", batch_size=1, prompt_tokens=8, generation_tokens=4),),
    precision="fp32",
    served_precision="fp32",
    num_threads=1,
    warmups=1,
    repeats=3,
)
LIMITS = (Limit(quantity="decode_speed", scenario="chat", bound=1.2, relative_to="parent"),)


def point(method: str, speedup: float, kl: float, *, target: str = "fast") -> Point:
    return Point(
        target=target,
        method=method,
        panel=PANEL,
        speedup=Span.exactly(speedup),
        kl=Span.exactly(kl),
        num_parameters=10,
    )


def children(*rows: tuple[str, float, float]) -> pl.DataFrame:
    filled = [
        (method, "library", kl, 3.0, 0.1, 0.2, 64, 1000, "chat", "decode", speed, speed, 0.9 * speed, 1.1 * speed)
        for method, speed, kl in rows
    ]
    return pl.DataFrame(filled, schema=SCHEMAS[CHILDREN], orient="row")


def test_frontier_is_what_no_other_point_beats():
    rng = random.Random(0)
    for _ in range(20):
        # Few distinct values, so that ties are common.
        points = [point(str(i), rng.randint(1, 6), rng.randint(0, 5)) for i in range(8)]
        expected = {
            one.method
            for one in points
            if all(
                other.speedup.value < one.speedup.value
                or other.kl.value > one.kl.value
                or (other.speedup.value, other.kl.value) == (one.speedup.value, one.kl.value)
                for other in points
            )
        }
        found = frontier(points)
        assert {one.method for one in found} == expected
        assert all(
            a.speedup.value <= b.speedup.value and a.kl.value <= b.kl.value for a, b in itertools.pairwise(found)
        )


def test_frontier_leaves_out_a_broken_child():
    assert [one.method for one in frontier([point("a", 2, math.nan), point("b", 1, 3)])] == ["b"]


def test_target_is_dominated_by_a_baseline_of_its_own_only():
    ours = point("puzzle", 1.5, 0.2)
    assert dominated_targets([ours, point("greedy", 1.6, 0.3), point("uniform", 1.4, 0.1)]) == {}
    assert dominated_targets([ours, point("child", 1.6, 0.1), point("greedy", 1.6, 0.1, target="other")]) == {}
    rivals = [point("greedy", 1.5, 0.1), point("drop_last", 1.9, 0.05), point("uniform", 1.5, 0.2)]
    assert dominated_targets([ours, *rivals]) == {"fast": "drop_last"}


def make_inputs(tmp_path: Path) -> StageInputs:
    """Artifacts of two targets: `fast` complete, `small` with baselines alone; `gone` has none."""
    fast, small = children(("puzzle", 1.5, 0.2), ("drop_last", 1.6, 0.1)), children(("puzzle", 1.2, 0.05))
    write_table(tmp_path / "fast", CHILDREN, fast)
    write_table(tmp_path / "small", CHILDREN, small)
    names = ("parent", "child", "rl")
    write_evaluations(tmp_path / "evaluation", checkpoints={name: checkpoint_evaluation(name) for name in names})
    rows = [
        {"backend": backend, "scenario": "chat", "phase": phase, "model": model}
        | {"speedup": speed, "speedup_low": speed - 0.1, "speedup_high": speed + 0.1, "num_rounds": 5}
        for backend, model, speed in (
            ("torch", "parent", 1.0),
            ("torch", "child", 1.4),
            ("torch", "final", 1.45),
            ("vllm", "child", 9.0),
        )
        for phase in ("decode", "prefill")
    ]
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "speed.json").write_text(json.dumps({"backend_of_limits": "torch", "speed": rows}))
    artifacts = {
        target_key("baselines", "fast"): tmp_path / "fast",
        target_key("baselines", "small"): tmp_path / "small",
        target_key("evaluation", "fast"): tmp_path / "evaluation",
        target_key("speed_report", "fast"): tmp_path / "speed",
    }
    return StageInputs(artifacts=artifacts, store_root=tmp_path, downloads=tmp_path)


def test_stage_draws_what_is_there_and_names_what_is_not(tmp_path: Path):
    config = ParetoStage(limits={"fast": LIMITS, "small": LIMITS, "gone": ()}, profile=PROFILE)
    result = pareto.run(config, make_inputs(tmp_path), tmp_path / "out")

    assert result.metrics == {
        "num_targets": 3,
        "num_incomplete_targets": 2,
        "num_dominated_targets": 1,
        "num_children": 5,
    }
    assert result.facts == {
        "missing": "small: evaluation, speed_report; gone: baselines, evaluation, speed_report",
        "search beaten in": "fast: by drop_last",
    }
    table = read_table(tmp_path / "out", PARETO)
    rows = table.select("text", "target", "method", "measured_speedup", "kl", "is_on_frontier").rows()
    assert rows == [
        ("validation", "fast", "drop_last", 1.6, 0.1, True),
        ("validation", "fast", "puzzle", 1.5, 0.2, False),
        ("validation", "small", "puzzle", 1.2, 0.05, True),
        ("validation", "", "parent", 1.0, 0.0, True),
        ("held-out", "fast", "final", 1.45, PERPLEXITY["rl"] / 100, True),
        ("held-out", "fast", "child", 1.4, PERPLEXITY["child"] / 100, False),
        ("held-out", "", "parent", 1.0, 0.0, True),
    ]
    svg = (tmp_path / "out/view" / result.figures["pareto"]).read_text()
    texts = [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
    for words in ("puzzle", "drop_last", "final", "small", "validation text; decode speed, chat", "held-out text"):
        assert any(words in text for text in texts), words


def test_stage_without_any_target_is_a_table_without_rows(tmp_path: Path):
    inputs = StageInputs(artifacts={}, store_root=tmp_path, downloads=tmp_path)
    result = pareto.run(ParetoStage(limits={"fast": LIMITS}, profile=PROFILE), inputs, tmp_path / "out")

    assert result.metrics["num_incomplete_targets"] == 1
    assert result.figures == {}
    assert read_table(tmp_path / "out", PARETO).is_empty()


def test_figure_of_a_child_without_a_distance_still_draws_the_others():
    svg = pareto_panels(by_panel([point("greedy", 2.0, math.nan), point("puzzle", 1.5, 0.2)]))
    assert "puzzle" in svg
    assert svg == pareto_panels(by_panel([point("greedy", 2.0, math.nan), point("puzzle", 1.5, 0.2)]))
