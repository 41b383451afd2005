"""Which runtime whole models are measured in: the one whose times the profile holds, so that both speak of the same.

A roofline is computed for a device that need not be there; what is measured beside it is torch on this machine.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.puzzle.llama_cpp import measure_in_llama_cpp
from pipeline.puzzle.measure import Measurements, measure_models
from pipeline.recipe import MeasurementConfig, ProfileConfig, Scenario


def runtime_name(profile: ProfileConfig) -> str:
    """Return the runtime in the words of tables and reports."""
    return "llama.cpp, random weights" if profile.backend == "llama_cpp" else "torch eager"


def measure_as_profiled(
    models: Mapping[str, HeterogeneousLlamaForCausalLM],
    *,
    profile: ProfileConfig,
    scenarios: Sequence[Scenario],
    measurement: MeasurementConfig,
    work_dir: Path,
    reporter: Reporter,
) -> Measurements:
    """Time prefill and decode of every model in every scenario, in turn; llama.cpp is given their architectures.

    Raises:
        RuntimeMissingError: when the profile is llama.cpp's and llama-bench is not installed.
    """
    if profile.backend == "llama_cpp":
        return measure_in_llama_cpp(
            {name: model.architecture for name, model in models.items()},
            profile=profile,
            scenarios=scenarios,
            measurement=measurement,
            work_dir=work_dir,
            reporter=reporter,
        )
    return measure_models(models, scenarios, measurement=measurement, threads=profile.num_threads, reporter=reporter)
