"""The search over a table of somebody else's library, as the command that a user runs."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.puzzle.table_search import main
from tests.pipeline.puzzle.builders import give_solver_no_time

TABLE = {
    f"layer_{layer}": {
        name: {
            "metrics": {"kl_div": kl * (layer + 1), "lm_loss": 1.5 + kl},
            "stats": {"runtime_ms": runtime, "memory_mib": memory, "num_params": int(10 * memory)},
        }
        for name, kl, runtime, memory in (
            ("parent", 0.0, 10.0, 8.0),
            ("narrow", 0.1, 6.0, 5.0),
            ("no_op", 0.5, 1.0, 1.0),
        )
    }
    for layer in range(4)
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE), encoding="utf-8")
    return path


def best_by_enumeration(*, runtime_ms: float, memory_mib: float) -> float:
    found = []
    for names in itertools.product(("parent", "narrow", "no_op"), repeat=len(TABLE)):
        entries = [TABLE[layer][name] for layer, name in zip(TABLE, names, strict=True)]
        within = (
            sum(entry["stats"]["runtime_ms"] for entry in entries) <= runtime_ms
            and sum(entry["stats"]["memory_mib"] for entry in entries) <= memory_mib
        )
        if within:
            found.append(sum(entry["metrics"]["kl_div"] for entry in entries))
    return min(found)


def test_the_command_prints_one_json_object(table: Path):
    arguments = ["--minimize", "kl_div", "--limit", "runtime_ms=26", "--limit", "memory_mib=20"]
    printed = subprocess.run(
        [sys.executable, "-m", "pipeline.puzzle.mip", str(table), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(printed.stdout)
    (solution,) = found["solutions"]
    assert found["status"] == "optimal"
    assert found["gap"] <= 1e-6
    assert solution["objective"] == pytest.approx(best_by_enumeration(runtime_ms=26, memory_mib=20))
    assert solution["totals"]["runtime_ms"] <= 26
    assert solution["totals"]["memory_mib"] <= 20
    chosen = [TABLE[layer][variant]["stats"]["num_params"] for layer, variant in solution["chosen"].items()]
    assert solution["totals"]["num_params"] == sum(chosen)
    assert list(solution["chosen"]) == list(TABLE)


def test_diverse_solutions_differ_and_do_not_improve(table: Path, capsys: pytest.CaptureFixture[str]):
    main([str(table), "--minimize", "kl_div", "--limit", "runtime_ms=26", "--solutions", "3", "--min-diversity", "2"])
    solutions = json.loads(capsys.readouterr().out)["solutions"]
    assert len(solutions) == 3
    for one, other in itertools.combinations(solutions, 2):
        assert sum(one["chosen"][layer] != other["chosen"][layer] for layer in TABLE) >= 2
    objectives = [solution["objective"] for solution in solutions]
    assert objectives == sorted(objectives)


def test_fewer_solutions_for_want_of_time_are_told(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    give_solver_no_time(monkeypatch, [1])
    main([str(table), "--minimize", "kl_div", "--limit", "runtime_ms=26", "--solutions", "3"])
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["solutions"]) == 1
    assert printed.err.startswith("note: the pool ends at 1 of 3 answers: the solver found no other within its time")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minimize", "nope"], r"has no metrics 'nope'; it has kl_div, lm_loss"),
        (["--minimize", "kl_div", "--limit", "watts=3"], r"has no stats 'watts'"),
        (["--minimize", "kl_div", "--limit", "runtime_ms"], r"wanted NAME=BOUND"),
        (["--minimize", "kl_div", "--limit", "runtime_ms=nan"], r"wanted NAME=BOUND"),
        (["--minimize", "kl_div", "--limit", "runtime_ms=2"], r"least that each can reach alone: runtime_ms: 4 of 2"),
    ],
)
def test_what_cannot_be_done_is_one_line(table: Path, arguments: list[str], message: str):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main([str(table), *arguments])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a JSON table"),
        ("[]", r"is \[\]; wanted a JSON object"),
        ('{"layer_0": {}}', r"layer layer_0 is \{\}; wanted"),
        ('{"layer_0": {"a": {"metrics": {"kl_div": 1}}}}', "variant a: stats is null"),
        ('{"layer_0": {"a": {"metrics": {"kl_div": NaN}, "stats": {"t": 1}}}}', "kl_div is nan"),
    ],
)
def test_a_table_of_another_layout_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "table.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main([str(path), "--minimize", "kl_div"])


def test_homogeneous_and_only_are_what_enumeration_under_them_gives(table: Path, capsys: pytest.CaptureFixture[str]):
    limits = ["--minimize", "kl_div", "--limit", "runtime_ms=26", "--limit", "memory_mib=20"]
    main([str(table), *limits, "--homogeneous"])
    (alike,) = json.loads(capsys.readouterr().out)["solutions"]
    assert set(alike["chosen"].values()) == {"narrow"}  # parent: 40 ms; no_op loses more
    main([str(table), *limits, "--only", "parent", "--only", "no_op"])
    (depth,) = json.loads(capsys.readouterr().out)["solutions"]
    # Two layers may stay (22 ms, 18 MiB), and the last two are dearest to lose: 0.5 x (1 + 2).
    assert list(depth["chosen"].values()) == ["no_op", "no_op", "parent", "parent"]
    assert depth["objective"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nope"], r"layer layer_0 has none of the variants nope; it has parent, narrow, no_op"),
        (
            ["--only", "parent", "--homogeneous", "--limit", "runtime_ms=26"],
            r"least that each can reach alone: runtime_ms: 40 of 26.*runtime_ms needs 40 of 26",
        ),
    ],
)
def test_what_the_modes_of_a_table_cannot_do_is_one_line(table: Path, arguments: list[str], message: str):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main([str(table), "--minimize", "kl_div", *arguments])


def test_homogeneous_without_a_common_name_is_refused(tmp_path: Path):
    renamed = {layer: {f"{layer}_{name}": one for name, one in options.items()} for layer, options in TABLE.items()}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(renamed), encoding="utf-8")
    with pytest.raises(SystemExit, match="no variant has one name in all layers"):
        main([str(path), "--minimize", "kl_div", "--homogeneous"])
