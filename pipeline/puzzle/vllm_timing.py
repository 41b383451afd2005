"""Times taken by vLLM, of whole models with random weights, in a process of vLLM's own environment.

All engines live in one process, with one engine step after the other on its clock: scheduling and sampling are in the
times, a server's HTTP is not. They run as `vllm serve` runs them by default, compiled and, on a GPU, as CUDA graphs.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.architecture import Architecture
from pipeline.costs import BYTES_PER_PARAMETER, kv_bytes_per_token
from pipeline.model.checkpoint import TORCH_DTYPES
from pipeline.model.decilm_config import decilm_config
from pipeline.model.repacking import portable
from pipeline.model.vllm_process import VLLM
from pipeline.progress import Reporter
from pipeline.puzzle.calibration import PHASES, Phase
from pipeline.puzzle.measure import Measurements, time_in_turn
from pipeline.puzzle.timing import decode_work
from pipeline.recipe import MeasurementConfig, Precision, ProfileConfig, Scenario

SLACK_TOKENS = 512  # of a sequence's cache, which is given out in blocks


def measure_in_vllm(
    architectures: Mapping[str, Architecture],
    *,
    profile: ProfileConfig,
    scenarios: Sequence[Scenario],
    measurement: MeasurementConfig,
    work_dir: Path,
    reporter: Reporter,
) -> Measurements:
    """Time prefill and decode of whole models as re-packed for vLLM, in turn.

    Raises:
        RuntimeMissingError: when vLLM is not installed.
        StageError: when it cannot run a model.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=work_dir) as directory,
        VLLM(work_dir=work_dir, num_threads=profile.num_threads) as vllm,
    ):
        kv_bytes = {}
        for index, (name, architecture) in enumerate(architectures.items()):
            request = _load_request(
                name, architecture, Path(directory, str(index)), scenarios=scenarios, precision=profile.precision
            )
            kv_bytes[name] = float(vllm.ask(request)["kv_bytes_per_token"])
            reporter.step(index + 1, len(architectures), what="models loaded by vLLM")
        times_ms = time_in_turn(
            list(architectures),
            scenarios,
            lambda name, scenario: {phase: _time_ms(vllm, name, scenario, phase) for phase in PHASES},
            measurement=measurement,
            reporter=reporter,
            what="vLLM rounds",
        )
    return Measurements(times_ms=times_ms, kv_bytes_per_token=kv_bytes)


def _load_request(
    name: str, architecture: Architecture, directory: Path, *, scenarios: Sequence[Scenario], precision: Precision
) -> dict[str, object]:
    served = portable(architecture).architecture
    torch_dtype = str(TORCH_DTYPES[precision]).removeprefix("torch.")
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(decilm_config(served, torch_dtype=torch_dtype)))
    works = [(scenario, *decode_work(scenario)) for scenario in scenarios]
    max_batch_size = max(scenario.batch_size for scenario in scenarios)
    max_tokens = max(before + num_steps + 1 for _, before, num_steps in works)
    bytes_per_value = BYTES_PER_PARAMETER[precision]
    cached_tokens = max(
        scenario.batch_size * (before + num_steps + SLACK_TOKENS) for scenario, before, num_steps in works
    )
    return {
        "load": name,
        "directory": str(directory),
        "with_weights": False,
        "dtype": torch_dtype,
        "max_tokens": max_tokens,
        "max_batch_size": max_batch_size,
        "max_prefill_tokens": max(max_batch_size, *(scenario.batch_size * before for scenario, before, _ in works)),
        "cache_bytes": int(cached_tokens * kv_bytes_per_token(served, bytes_per_value=bytes_per_value)),
    }


def _time_ms(vllm: VLLM, name: str, scenario: Scenario, phase: Phase) -> float:
    """Return the milliseconds of the whole prefill, or of one decode step half-way through the generation."""
    before, num_steps = decode_work(scenario)
    work = {"time": name, "batch_size": scenario.batch_size}
    if phase == "prefill":
        (time_ms,) = vllm.ask(work | {"num_prompt_tokens": scenario.prompt_tokens, "num_tokens": 1})["steps_ms"]
        return float(time_ms)
    _, *steps_ms = vllm.ask(work | {"num_prompt_tokens": before, "num_tokens": 1 + num_steps})["steps_ms"]
    return statistics.fmean(steps_ms)
