"""Times taken by llama.cpp's own llama-bench, of whole models with random weights.

A call's fastest repetition counts: what else a machine does only adds. Whatever the weights' precision, the cache holds
fp16, as it does in llama.cpp's server unless told otherwise; llama-bench knows no fp32 cache.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.architecture import Architecture
from pipeline.costs import kv_bytes_per_token
from pipeline.model.checkpoint import TORCH_DTYPES
from pipeline.model.export_gguf import write_gguf
from pipeline.model.heterogeneous import build_model
from pipeline.model.repacking import portable
from pipeline.processes import run_checked
from pipeline.progress import Reporter
from pipeline.puzzle.calibration import PHASES, Phase
from pipeline.puzzle.measure import Measurements, time_in_turn
from pipeline.puzzle.timing import decode_work
from pipeline.recipe import MeasurementConfig, ProfileConfig, Scenario
from pipeline.runtimes import require_llama_cpp

REPETITIONS = 5  # of one call of llama-bench
CALL_TIMEOUT_S = 1800.0
CACHE_BYTES_PER_VALUE = 2.0


def measure_in_llama_cpp(
    architectures: Mapping[str, Architecture],
    *,
    profile: ProfileConfig,
    scenarios: Sequence[Scenario],
    measurement: MeasurementConfig,
    work_dir: Path,
    reporter: Reporter,
) -> Measurements:
    """Time prefill and decode of whole models as re-packed for llama.cpp, in turn.

    Raises:
        RuntimeMissingError: when llama-bench is not installed.
    """
    program = require_llama_cpp("llama-bench")
    with _files(architectures, profile=profile, work_dir=work_dir) as files:
        times_ms = time_in_turn(
            list(architectures),
            scenarios,
            lambda name, scenario: {
                phase: _time_ms(program, files[name], scenario, phase, num_threads=profile.num_threads)
                for phase in PHASES
            },
            measurement=measurement,
            reporter=reporter,
            what="llama-bench rounds",
        )
    return Measurements(
        times_ms=times_ms,
        kv_bytes_per_token={
            name: kv_bytes_per_token(portable(architecture).architecture, bytes_per_value=CACHE_BYTES_PER_VALUE)
            for name, architecture in architectures.items()
        },
    )


@contextmanager
def _files(
    architectures: Mapping[str, Architecture], *, profile: ProfileConfig, work_dir: Path
) -> Iterator[dict[str, Path]]:
    """Write each model with random weights: time does not depend on their values."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=work_dir) as directory:
        files = {}
        for index, (name, architecture) in enumerate(architectures.items()):
            files[name] = Path(directory, f"{index}.gguf")
            served = portable(architecture).architecture
            state = build_model(served, dtype=TORCH_DTYPES[profile.precision], seed=0).state_dict()
            write_gguf(
                files[name],
                architecture=served,
                read=state.__getitem__,
                precision=profile.precision,
                tokenizer_dir=None,
            )
        yield files


def _time_ms(program: Path, gguf: Path, scenario: Scenario, phase: Phase, *, num_threads: int) -> float:
    """Return the milliseconds of the whole prefill, or of one decode step half-way through the generation."""
    before, num_steps = decode_work(scenario)
    work = {
        "prefill": ("-p", str(scenario.prompt_tokens), "-n", "0"),
        "decode": ("-p", "0", "-n", str(num_steps), "-d", str(before)),
    }[phase]
    settings = ("-t", str(num_threads), "-r", str(REPETITIONS), "-o", "json")
    command = (str(program), "-m", str(gguf), *settings, *work)
    output = run_checked(command, what="llama-bench", timeout_s=CALL_TIMEOUT_S)
    (result,) = json.loads(output)
    return min(result["samples_ns"]) / 1e6 / (1 if phase == "prefill" else num_steps)
