"""The results of bench/quality.py as a page and a picture: python -m bench.quality_page RESULTS.json OUT_DIR.

Writes OUT_DIR/quality.md, two tables for each speed and the ratio that the bench is about, and OUT_DIR/quality.svg.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.quality import ratio_interval
from pipeline.puzzle.baselines import PUZZLE
from pipeline.report.pareto import OURS, Panel, Point, Span, by_panel
from pipeline.report.search_figures import pareto_panels


def main() -> None:
    """Read the results and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("out_dir", type=Path)
    given = parser.parse_args()
    results: dict[str, Any] = json.loads(given.results.read_text(encoding="utf-8"))
    parent = results.pop("parent")
    given.out_dir.mkdir(parents=True, exist_ok=True)
    given.out_dir.joinpath("quality.svg").write_text(pareto_panels(by_panel(list(points(results)))), encoding="utf-8")
    lines = [line for target, found in results.items() for line in page(target, found, parent)]
    given.out_dir.joinpath("quality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def points(results: Mapping[str, Any]) -> Iterator[Point]:
    """Give every child before distillation, and the distilled ones."""
    for target, found in results.items():
        for row in found["before"]:
            speed = Span(value=row["measured_speedup"], low=row["speedup_low"], high=row["speedup_high"])
            after = found.get("after", {}).get(row["method"])
            spans = {"validation": Span.exactly(row["kl"])}
            if after is not None:
                kl = after["overall"]["kl_nats_per_token"]
                spans["held-out"] = Span(value=kl["value"], low=kl["low"], high=kl["high"])
            for text, span in spans.items():
                yield Point(
                    target=target,
                    method=row["method"],
                    panel=Panel(text=text, scenario=row["scenario"], phase=row["phase"]),  # pyright: ignore[reportArgumentType]
                    speedup=speed,
                    kl=span,
                    num_parameters=row["num_parameters"],
                )


def page(target: str, found: Mapping[str, Any], parent: Mapping[str, Any]) -> Iterator[str]:
    """Give the lines of one speed."""
    rows = sorted(found["before"], key=lambda row: row["kl"])
    yield from (
        f"### {target}",
        "",
        "| before distillation | KL | measured speed | parameters |",
        "| --- | --- | --- | --- |",
    )
    for row in rows:
        yield (
            f"| {row['method']} | {row['kl']:.3f} | {row['measured_speedup']:.2f} "
            f"[{row['speedup_low']:.2f}, {row['speedup_high']:.2f}] | {row['num_parameters'] / 1e6:.1f} M |"
        )
    after = found.get("after", {})
    texts, tasks = list(parent["text"]), list(parent["multiple_choice"])
    if after:
        yield ""
        yield "| after distillation | KL, held out | " + " | ".join((*texts, *tasks)) + " |"
        yield "| --- |" + " --- |" * (1 + len(texts) + len(tasks))
        yield f"| parent | 0 | {measures(parent, texts=texts, tasks=tasks)} |"
    for method, one in sorted(after.items(), key=lambda pair: pair[1]["overall"]["kl_nats_per_token"]["value"]):
        kl = one["overall"]["kl_nats_per_token"]
        yield (
            f"| {method} | {kl['value']:.3f} [{kl['low']:.3f}, {kl['high']:.3f}] | "
            f"{measures(one, texts=texts, tasks=tasks)} |"
        )
    ours = next(row["kl"] for row in rows if row["method"] == PUZZLE)
    best = next(row for row in rows if row["method"] not in OURS)
    yield ""
    yield f"KL of puzzle over that of {best['method']}, before distillation: {ours / best['kl']:.2f}."
    rivals = [name for name in after if name not in OURS]
    if PUZZLE in after and rivals:
        name = min(rivals, key=lambda one: after[one]["overall"]["kl_nats_per_token"]["value"])
        low, middle, high = ratio_interval(after[PUZZLE]["kl_by_window"], after[name]["kl_by_window"])
        yield f"After, over {name}, the best of the {len(rivals)} distilled: {middle:.2f} [{low:.2f}, {high:.2f}]."
    yield ""


def measures(one: Mapping[str, Any], *, texts: list[str], tasks: list[str]) -> str:
    """Return perplexities and accuracies as cells, with their intervals."""
    cells = []
    for name in texts:
        found = one["text"][name]["perplexity"]
        cells.append(f"{found['value']:.1f} [{found['low']:.1f}, {found['high']:.1f}]")
    for name in tasks:
        found = one["multiple_choice"][name]["accuracy_normalised"]
        cells.append(f"{100 * found['value']:.0f}% [{100 * found['low']:.0f}, {100 * found['high']:.0f}]")
    return " | ".join(cells)


if __name__ == "__main__":
    main()
