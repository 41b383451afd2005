"""How long the search takes at the sizes of the papers: python bench/bench_mip.py.

Tables are synthetic, shaped like a measured library: time falls more slowly than width, scores rise with what is cut,
and layers differ. Every answer is proven optimal (gap <= 1e-6) before its time is printed.
"""

import random
import time

from pipeline.puzzle.programme import Programme, Row, solve_diverse, solve_programme

ATTENTION_KEPT = (1.0, 0.5, 0.25, 0.125, 0.06, 0.0)
FFN_KEPT = (1.0, 0.87, 0.75, 0.62, 0.5, 0.25, 0.2, 0.1, 0.0)
SMALLER_BY = {"runtime_ms": 0.45, "memory_mib": 0.6, "num_params": 0.62}


def make_programme(*, num_layers: int, num_variants: int, num_rows: int, seed: int) -> Programme:
    """Return a table of `num_variants` of the 54 blocks per layer under `num_rows` limits."""
    rng = random.Random(seed)
    blocks = [(attention, ffn) for attention in ATTENTION_KEPT for ffn in FFN_KEPT]
    scores = []
    costs: dict[str, list[tuple[float, ...]]] = {name: [] for name in SMALLER_BY}
    for _ in range(num_layers):
        chosen = [blocks[0], *rng.sample(blocks[1:], num_variants - 1)]
        sensitivity = rng.uniform(0.1, 0.8), rng.uniform(0.1, 0.5)
        scores.append(
            tuple(
                ((1 - attention) * sensitivity[0] + (1 - ffn) * sensitivity[1]) * rng.uniform(0.8, 1.2)
                for attention, ffn in chosen
            )
        )
        costs["runtime_ms"].append(
            tuple(354 * attention**0.7 + (84 + 379 * ffn) * (ffn > 0) + rng.uniform(0, 3) for attention, ffn in chosen)
        )
        costs["memory_mib"].append(tuple(765 * attention + 672 * ffn for attention, ffn in chosen))
        costs["num_params"].append(tuple(151e6 * attention**0.3 + 705e6 * ffn for attention, ffn in chosen))
    rows = [
        Row(name=name, fixed=0.0, upper=share * sum(column[0] for column in costs[name]), cost=tuple(costs[name]))
        for name, share in SMALLER_BY.items()
    ]
    return Programme(scores=tuple(scores), rows=tuple(rows[:num_rows]))


def main() -> None:
    """Time each size over five tables, then a pool of eight diverse answers."""
    for num_layers, num_variants in ((80, 16), (126, 54)):
        for num_rows in (2, 3):
            seconds = []
            for seed in range(5):
                programme = make_programme(
                    num_layers=num_layers, num_variants=num_variants, num_rows=num_rows, seed=seed
                )
                began = time.perf_counter()
                answer = solve_programme(programme, time_limit_s=60, relative_gap=0.0)
                seconds.append(time.perf_counter() - began)
                assert answer is not None
                assert answer.status == "optimal"
                assert answer.gap <= 1e-6, answer.gap
            print(
                f"{num_layers} layers x {num_variants} variants, {num_rows} limits: "
                f"at most {max(seconds):.2f} s of {len(seconds)} tables ({5 / max(seconds):.0f} times below 5 s)"
            )
    programme = make_programme(num_layers=20, num_variants=16, num_rows=2, seed=0)
    began = time.perf_counter()
    answers = solve_diverse(programme, num_solutions=8, min_different=4, time_limit_s=60, relative_gap=0.0)
    seconds_8 = time.perf_counter() - began
    assert len(answers) == 8
    assert all(answer.status == "optimal" for answer in answers)
    print(f"8 diverse answers of 320 candidates: {seconds_8:.2f} s ({3 / seconds_8:.0f} times below 3 s)")


if __name__ == "__main__":
    main()
