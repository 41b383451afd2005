"""The programme on a table of anybody's block library: one JSON file in, one JSON object out.

    {layer: {variant: {"metrics": {name: number, ...}, "stats": {name: number, ...}}}}

is the layout in which NVlabs/puzzle publishes the library of Llama-3.3-70B. Metrics are summed and minimised, stats are
summed and kept within their limits.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import InfeasibleError, RecipeError, RefitError
from pipeline.puzzle.programme import Programme, Row, least_of_row, least_overrun, solve_diverse

TIME_LIMIT_S = 60.0
KINDS = ("metrics", "stats")


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryTable:
    """Layers and variants in the file's own order, with the metrics and stats of each."""

    variants: Mapping[str, tuple[str, ...]]
    values: Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]

    def only(self, names: Sequence[str]) -> "LibraryTable":
        """Return the table with these variants alone.

        Raises:
            RecipeError: when that leaves a layer without any.
        """
        variants = {layer: tuple(one for one in have if one in names) for layer, have in self.variants.items()}
        for layer, kept in variants.items():
            if not kept:
                raise RecipeError(
                    f"layer {layer} has none of the variants {', '.join(names)}; it has "
                    f"{', '.join(self.variants[layer])}"
                )
        return replace(self, variants=variants)

    def column(self, kind: str, name: str) -> tuple[tuple[float, ...], ...]:
        """Return one metric or stat by layer and variant.

        Raises:
            RecipeError: when a variant lacks it, naming those that it has.
        """
        return tuple(
            tuple(self._value(layer, variant, kind, name) for variant in variants)
            for layer, variants in self.variants.items()
        )

    def _value(self, layer: str, variant: str, kind: str, name: str) -> float:
        found = self.values[layer, variant][kind]
        if name not in found:
            raise RecipeError(f"layer {layer}, variant {variant} has no {kind} {name!r}; it has {', '.join(found)}")
        return found[name]


def read_library_table(path: Path) -> LibraryTable:
    """Read a table.

    Raises:
        RecipeError: when the file is missing, is not JSON, or has another layout, naming the place.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise RecipeError(f"{path} cannot be read as a JSON table: {err}") from err
    layers = _mapping(data, at=str(path))
    variants: dict[str, tuple[str, ...]] = {}
    values: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for layer, options in layers.items():
        named = _mapping(options, at=f"{path}: layer {layer}")
        variants[layer] = tuple(named)
        for variant, entry in named.items():
            at = f"{path}: layer {layer}, variant {variant}"
            parts = _mapping(entry, at=at)
            values[layer, variant] = {
                kind: _numbers(parts.get(kind), at=f"{at}: {kind}") for kind in ("metrics", "stats")
            }
    return LibraryTable(variants=variants, values=values)


def search_table(
    table: LibraryTable,
    *,
    minimize: str,
    limits: Mapping[str, float],
    num_solutions: int,
    min_different: int,
    is_homogeneous: bool,
) -> dict[str, Any]:
    """Return the best choices as a JSON object: status, gap, seconds, solutions.

    A homogeneous choice takes the variant of one name in every layer.

    Raises:
        InfeasibleError: naming what each limit could reach.
        RecipeError: for a metric or stat that the table does not have, or without a name that all layers have.
        StageError: when the solver finds nothing in its time.
    """
    programme = Programme(
        scores=table.column("metrics", minimize),
        rows=tuple(
            Row(name=name, fixed=0.0, upper=upper, cost=table.column("stats", name)) for name, upper in limits.items()
        ),
        families=tuple(table.variants.values()) if is_homogeneous else None,
    )
    if not programme.alternatives:
        raise RecipeError("no variant has one name in all layers: leave --homogeneous out")
    began = time.perf_counter()
    answers = solve_diverse(
        programme,
        num_solutions=num_solutions,
        min_different=min_different,
        time_limit_s=TIME_LIMIT_S,
        relative_gap=0.0,
        note=_tell,
    )
    if not answers:
        raise _infeasible(programme)
    return {
        "status": "optimal" if all(answer.status == "optimal" for answer in answers) else "feasible",
        "gap": max(answer.gap for answer in answers),
        "seconds": round(time.perf_counter() - began, 3),
        "solutions": [_solution(table, programme, answer.chosen) for answer in answers],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; an error of ours is one line and exit code 1."""
    given = _parser().parse_args(arguments)
    try:
        table = read_library_table(given.table)
        found = search_table(
            table.only(given.only) if given.only else table,
            minimize=given.minimize,
            limits=dict(_parse_limit(text) for text in given.limit),
            num_solutions=given.solutions,
            min_different=given.min_diversity,
            is_homogeneous=given.homogeneous,
        )
    except RefitError as err:
        sys.exit(f"error: {err}")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def _tell(message: str) -> None:
    sys.stderr.write(f"note: {message}\n")


def _solution(table: LibraryTable, programme: Programme, chosen: Sequence[int]) -> dict[str, Any]:
    names = {layer: variants[index] for (layer, variants), index in zip(table.variants.items(), chosen, strict=True)}
    shared = set.intersection(*(set(table.values[layer, variant]["stats"]) for layer, variant in names.items()))
    first = next(iter(names.items()))
    return {
        "objective": programme.objective(chosen),
        "totals": {
            stat: math.fsum(table.values[layer, variant]["stats"][stat] for layer, variant in names.items())
            for stat in table.values[first]["stats"]
            if stat in shared
        },
        "chosen": names,
    }


def _infeasible(programme: Programme) -> InfeasibleError:
    alone = ", ".join(f"{row.name}: {programme.least(row):,.6g} of {row.upper:,.6g}" for row in programme.rows)
    beside: list[str] = []
    for index, row in enumerate(programme.rows):
        chosen = least_of_row(programme, index, time_limit_s=TIME_LIMIT_S)
        if chosen is not None:
            beside.append(f"{row.name}: {row.total(chosen):,.6g}")
    nearest = least_overrun(programme, time_limit_s=TIME_LIMIT_S)
    missed = "; ".join(
        f"{row.name} needs {row.total(nearest):,.6g} of {row.upper:,.6g}" for row in programme.broken_rows(nearest)
    )
    return InfeasibleError(
        f"no choice of blocks meets every limit. The least that each can reach alone: {alone}; while all others are "
        f"met: {', '.join(beside) or 'no limit can make up for the others'}. In the nearest choice {missed}. "
        "Raise those limits"
    )


def _mapping(value: object, *, at: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise RecipeError(f"{at} is {json.dumps(value)[:40]}; wanted a JSON object with entries")
    return value


def _numbers(value: object, *, at: str) -> dict[str, float]:
    numbers = _mapping(value, at=at)
    found = {
        name: float(number)
        for name, number in numbers.items()
        if isinstance(number, int | float) and not isinstance(number, bool)
    }
    wrong = [name for name, number in found.items() if not math.isfinite(number)]
    if wrong:
        raise RecipeError(f"{at}: {wrong[0]} is {found[wrong[0]]}; wanted a finite number")
    return found


def _parse_limit(text: str) -> tuple[str, float]:
    name, _, bound = text.partition("=")
    try:
        upper = float(bound)
    except ValueError:
        upper = math.nan
    if not name or not (math.isfinite(upper) and upper > 0):
        raise RecipeError(f"--limit {text!r}: wanted NAME=BOUND with a bound above 0, such as runtime_ms=51200")
    return name, upper


def _positive(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is below 1")
    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.puzzle.mip", description="Choose one variant per layer from a block library's table."
    )
    parser.add_argument("table", type=Path, help="JSON: {layer: {variant: {metrics: {...}, stats: {...}}}}")
    parser.add_argument("--minimize", required=True, help="the metric whose sum is minimised, such as kl_div")
    parser.add_argument("--limit", action="append", default=[], help="NAME=BOUND: the sum of a stat stays within it")
    parser.add_argument("--solutions", type=_positive, default=1, help="how many diverse solutions to look for")
    parser.add_argument("--min-diversity", type=_positive, default=1, help="layers in which any two of them differ")
    parser.add_argument("--homogeneous", action="store_true", help="take the variant of one name in every layer")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="VARIANT",
        help="leave every other variant out; given for the parent's and for the empty one, layers stay whole or go",
    )
    return parser
