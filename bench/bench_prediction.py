"""Predicted against measured speed of whole children: python bench/bench_prediction.py [torch | llama_cpp].

Children of different kinds in SmolLM2-135M's shape, random weights: block_profile's times added up and calibrated on
the parent, as the search does, beside llama-bench's or torch's measurement of the assembled child. Both backends where
llama.cpp is installed (make install-llama-cpp), torch alone where it is not.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionSpec, BlockSpec, FFNSpec, gqa, swiglu
from pipeline.hardware import describe_hardware
from pipeline.model.architecture_files import load_architecture
from pipeline.model.checkpoint import TORCH_DTYPES
from pipeline.model.heterogeneous import build_model
from pipeline.progress import SilentReporter
from pipeline.puzzle.backends import measure_as_profiled
from pipeline.puzzle.calibration import PHASES
from pipeline.puzzle.llama_cpp import profile_in_llama_cpp
from pipeline.puzzle.predictions import CostModel
from pipeline.puzzle.profiling import Profile, profile_blocks
from pipeline.puzzle.search_space import resolve
from pipeline.recipe import MeasurementConfig, ProfileConfig, Scenario, SearchSpaceConfig
from pipeline.runtimes import find_llama_cpp

WANTED_ERROR = 0.10
SCENARIO = Scenario(name="chat", batch_size=1, prompt_tokens=128, generation_tokens=64)
SPACE = SearchSpaceConfig(
    attention=("parent", 1, "no_op"), ffn=("parent", 1024, 512, "no_op"), overrides=(), portable=False
)
MEASUREMENT = MeasurementConfig(rounds=5, warmups=1)
FULL, ONE_HEAD = gqa(3), gqa(1)
WIDE, MIDDLE, NARROW = swiglu(1536), swiglu(1024), swiglu(512)


def children(parent: Architecture) -> dict[str, Architecture]:
    """Return one child of each kind; layer 0 keeps its attention, as llama.cpp needs it."""
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


def profile_of(parent: Architecture, config: ProfileConfig, work_dir: Path) -> Profile:
    """Return what block_profile would measure."""
    space = resolve(SPACE, parent)
    if config.backend == "llama_cpp":
        return profile_in_llama_cpp(parent, space, profile=config, work_dir=work_dir, reporter=SilentReporter())
    return profile_blocks(
        parent,
        space,
        profile=config,
        device=torch.device("cpu"),
        dtype=TORCH_DTYPES[config.precision],
        reporter=SilentReporter(),
    )


def compare(backend: str) -> None:
    """Profile, predict, measure, and print the ratio of every child and phase."""
    parent = load_architecture("smollm2-135m-instruct")
    config = ProfileConfig.model_validate(
        {
            "backend": backend,
            "scenarios": [SCENARIO],
            "precision": "fp32",
            "served_precision": "fp32",
            "num_threads": 1,
            "warmups": MEASUREMENT.warmups,
            "repeats": MEASUREMENT.rounds,
        }
    )
    with tempfile.TemporaryDirectory() as directory:
        profile = profile_of(parent, config, Path(directory))
        costs = CostModel(
            parent=parent,
            profile=config,
            time_ms={key: samples.median_ms for key, samples in profile.samples.items()},
            calibration=profile.calibration,
        )
        models = {"parent": parent, **children(parent)}
        measured = measure_as_profiled(
            {
                name: build_model(architecture, dtype=torch.float32, seed=0).eval()
                for name, architecture in models.items()
            },
            profile=config,
            scenarios=[SCENARIO],
            measurement=MEASUREMENT,
            work_dir=Path(directory),
            reporter=SilentReporter(),
        )
    errors = []
    for phase in PHASES:
        for name, architecture in models.items():
            predicted_ms = costs.predicted_ms(architecture.blocks, SCENARIO.name, phase)
            # Relative to the parent of the same sitting: a machine that got slower since the profile did so for both.
            parent_ms = costs.calibration.get(SCENARIO.name, phase).parent_ms
            predicted = parent_ms / predicted_ms
            found = measured.speedup(name, SCENARIO.name, phase, over="parent")
            errors.append(predicted / found.median - 1)
            print(
                f"{backend:10} {phase:8} {name:22} predicted {predicted:5.2f}x, measured {found.median:5.2f}x "
                f"[{found.low:.2f}, {found.high:.2f}], ratio {predicted / found.median:.3f}"
            )
    within = sum(abs(error) <= WANTED_ERROR for error in errors)
    print(
        f"{backend}: {within} of {len(errors)} predictions within {WANTED_ERROR:.0%}, the worst off by "
        f"{max(map(abs, errors)):.1%} ({describe_hardware()}, 1 thread, fp32, {SCENARIO.prompt_tokens} prompt tokens, "
        f"n = {MEASUREMENT.rounds} rounds)"
    )


def main() -> None:
    """Compare in every backend that is asked for, or in every one that is there."""
    there = ["torch", *(["llama_cpp"] if find_llama_cpp("llama-bench") else [])]
    for backend in sys.argv[1:] or there:
        compare(backend)


if __name__ == "__main__":
    main()
