"""Predicted against measured speed of whole children: python bench/bench_prediction.py.

Children of different kinds in SmolLM2-135M's shape, random weights: block_profile's times added up and calibrated on
the parent, as the search does, beside the same runtime's measurement of the assembled child, in turn with the parent.
Every backend that is installed here, or those that --backend names. A line is printed as soon as its child is
measured; with --keep FILE the profile and what is measured are kept there, and a run that was interrupted goes on.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionSpec, BlockSpec, FFNSpec, gqa, swiglu
from pipeline.artifacts import write_atomically
from pipeline.fingerprint import fingerprint
from pipeline.hardware import describe_hardware, hardware_id
from pipeline.model.architecture_files import load_architecture
from pipeline.model.checkpoint import TORCH_DTYPES
from pipeline.model.heterogeneous import build_model
from pipeline.progress import SilentReporter
from pipeline.puzzle.backends import measure_as_profiled, profile_outside
from pipeline.puzzle.calibration import PHASES, Calibration
from pipeline.puzzle.devices import Ranks, place
from pipeline.puzzle.predictions import CostModel
from pipeline.puzzle.profiling import Profile, profile_blocks
from pipeline.puzzle.search_space import resolve
from pipeline.recipe import Backend, MeasurementConfig, ProfileConfig, Scenario, SearchSpaceConfig
from pipeline.runtimes import find_llama_cpp, find_python, runtime_ids

WANTED_ERROR = 0.10
DEVICE = Ranks().device
SCENARIO = Scenario(name="chat", batch_size=1, prompt_tokens=128, generation_tokens=64)
SPACE = SearchSpaceConfig(
    attention=("parent", 1, "no_op"), ffn=("parent", 1024, 512, "no_op"), overrides=(), portable=False
)
NUM_ROUNDS, NUM_WARMUPS = 7, 1
BACKENDS: tuple[Backend, ...] = ("torch", "llama_cpp", "vllm")
FULL, ONE_HEAD = gqa(3), gqa(1)
WIDE, MIDDLE, NARROW = swiglu(1536), swiglu(1024), swiglu(512)


def children(parent: Architecture) -> dict[str, Architecture]:
    """Return one child of each kind; layer 0 keeps its attention, as llama.cpp and vLLM need it."""
    layers = range(parent.num_hidden_layers)

    def child(attention: Sequence[AttentionSpec], ffn: Sequence[FFNSpec]) -> Architecture:
        return parent.with_blocks(
            [
                BlockSpec(
                    attention=attention[layer % len(attention)], ffn=ffn[layer % len(ffn)], parent_layers=(layer,)
                )
                for layer in layers
            ]
        )

    dropped = [
        block.model_copy(update={"attention": NO_ATTENTION, "ffn": NO_FFN}) if layer in range(12, 22) else block
        for layer, block in enumerate(parent.blocks)
    ]
    return {
        "half the attention": child([FULL, NO_ATTENTION], [WIDE]),
        "narrow FFNs": child([FULL], [NARROW]),
        "one key/value head": child([ONE_HEAD], [WIDE]),
        "ten layers dropped": parent.with_blocks(dropped),
        "a third of the FFNs": child([FULL], [WIDE, NO_FFN, WIDE]),
        "mixed": child([FULL, NO_ATTENTION, ONE_HEAD, NO_ATTENTION], [WIDE, MIDDLE, NARROW]),
        "mixed, aggressive": child([FULL, NO_ATTENTION, NO_ATTENTION, ONE_HEAD], [NARROW, NO_FFN, NARROW]),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One child and phase: how many times faster than the parent."""

    phase: str
    child: str
    predicted: float
    measured: float
    low: float
    high: float
    coverage: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


class Keeper:
    """A JSON file of what was measured, by what it depends on; without a file, of this run alone."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[str, object] = json.loads(path.read_text()) if path is not None and path.is_file() else {}

    def get(self, key: str) -> object | None:
        """Return what is kept under the key."""
        return self._found.get(key)

    def put(self, key: str, value: object) -> None:
        """Keep a value of JSON types."""
        self._found[key] = value
        if self._path is not None:
            write_atomically(self._path, json.dumps(self._found, indent=1).encode())


def profile_of(parent: Architecture, config: ProfileConfig, work_dir: Path) -> Profile:
    """Return what block_profile would measure."""
    space = resolve(SPACE, parent)
    if config.backend != "torch":
        return profile_outside(parent, space, profile=config, work_dir=work_dir, reporter=SilentReporter())
    return profile_blocks(
        parent,
        space,
        profile=config,
        device=DEVICE,
        dtype=TORCH_DTYPES[config.precision],
        reporter=SilentReporter(),
    )


def cost_model(parent: Architecture, config: ProfileConfig, *, keeper: Keeper, key: str, work_dir: Path) -> CostModel:
    """Return what predictions are made from, measured now or kept."""
    kept = keeper.get(key)
    if kept is None:
        profile = profile_of(parent, config, work_dir)
        times_ms = [(*names, samples.median_ms) for names, samples in profile.samples.items()]
        kept = {"times_ms": times_ms, "calibration": profile.calibration.model_dump()}
        keeper.put(key, kept)
    assert isinstance(kept, dict)
    return CostModel(
        parent=parent,
        profile=config,
        time_ms={tuple(names): time_ms for *names, time_ms in kept["times_ms"]},
        calibration=Calibration.model_validate(kept["calibration"]),
    )


def rows_of(
    name: str, child: Architecture, *, costs: CostModel, measurement: MeasurementConfig, work_dir: Path
) -> list[Row]:
    """Measure one child in turn with the parent."""
    measured = measure_as_profiled(
        {
            which: place(build_model(architecture, dtype=TORCH_DTYPES[costs.profile.precision], seed=0), DEVICE).eval()
            for which, architecture in (("parent", costs.parent), ("child", child))
        },
        profile=costs.profile,
        scenarios=[SCENARIO],
        measurement=measurement,
        work_dir=work_dir,
        reporter=SilentReporter(),
    )
    rows = []
    for phase in PHASES:
        predicted_ms = costs.predicted_ms(child.blocks, SCENARIO.name, phase)
        # Relative to the parent of the same sitting: a machine that got slower since the profile did so for both.
        parent_ms = costs.calibration.get(SCENARIO.name, phase).parent_ms
        found = measured.speedup("child", SCENARIO.name, phase, over="parent")
        rows.append(
            Row(
                phase=phase,
                child=name,
                predicted=parent_ms / predicted_ms,
                measured=found.median,
                low=found.low,
                high=found.high,
                coverage=found.coverage,
            )
        )
    return rows


def compare(backend: Backend, measurement: MeasurementConfig, keeper: Keeper) -> None:
    """Profile, predict, measure, and print the ratio of every child and phase."""
    parent = load_architecture("smollm2-135m-instruct")
    config = ProfileConfig(
        backend=backend,
        scenarios=(SCENARIO,),
        precision="fp32",
        served_precision="fp32",
        num_threads=1,
        warmups=measurement.warmups,
        repeats=measurement.rounds,
    )
    of_this = fingerprint({"config": config, "space": SPACE, "hardware": hardware_id(), **runtime_ids((backend,))})
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        costs = cost_model(parent, config, keeper=keeper, key=f"{of_this} profile", work_dir=Path(directory))
        for name, child in children(parent).items():
            key = f"{of_this} {name}"
            kept = keeper.get(key)
            if kept is None:
                kept = [
                    asdict(row)
                    for row in rows_of(name, child, costs=costs, measurement=measurement, work_dir=Path(directory))
                ]
                keeper.put(key, kept)
            assert isinstance(kept, list)
            for row in (Row(**fields) for fields in kept):
                print(
                    f"{backend:10} {row.phase:8} {name:22} predicted {row.predicted:5.2f}x, measured "
                    f"{row.measured:5.2f}x [{row.low:.2f}, {row.high:.2f}], error {row.error:+.1%}",
                    flush=True,
                )
                rows.append(row)
    within = sum(abs(row.error) <= WANTED_ERROR for row in rows)
    print(
        f"{backend}: {within} of {len(rows)} predictions within {WANTED_ERROR:.0%}, the worst off by "
        f"{max(abs(row.error) for row in rows):.1%} ({describe_hardware()}, 1 thread, fp32, {SCENARIO.prompt_tokens} "
        f"prompt tokens, n = {measurement.rounds} rounds, {rows[0].coverage:.0%} intervals)",
        flush=True,
    )


def main() -> None:
    """Compare in every backend that is asked for, or in every one that is there."""
    there = {"torch": True, "llama_cpp": find_llama_cpp("llama-bench"), "vllm": find_python("vllm")}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be given several times")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS, help="of every measurement; the profile's, too")
    parser.add_argument("--keep", type=Path, help="a JSON file of what was measured, to go on with")
    given = parser.parse_args()
    keeper = Keeper(given.keep)
    measurement = MeasurementConfig(rounds=given.rounds, warmups=NUM_WARMUPS)
    for backend in BACKENDS:
        if backend in given.backend if given.backend else there[backend]:
            compare(backend, measurement, keeper)


if __name__ == "__main__":
    main()
