"""The runtimes that models are measured in, by name: torch in this process, llama.cpp and vLLM in their own.

What a search's limits are held to is measured in the runtime whose times the profile holds, so that both speak of the
same. A roofline is computed for a device that need not be there; what is measured beside it is torch on this machine.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.architecture import Architecture
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import Reporter
from pipeline.puzzle.differences import profile_by_differences
from pipeline.puzzle.llama_cpp import measure_in_llama_cpp
from pipeline.puzzle.measure import Measurements, measure_models
from pipeline.puzzle.profiling import Profile
from pipeline.puzzle.search_space import SearchSpace, require_timeable
from pipeline.puzzle.vllm_timing import measure_in_vllm
from pipeline.recipe import Backend, MeasurementConfig, ProfileConfig, Scenario

RUNTIME_NAMES: dict[Backend, str] = {
    "torch": "torch eager",
    "llama_cpp": "llama.cpp, random weights",
    "vllm": "vLLM, random weights",
}
_OUTSIDE = {"llama_cpp": measure_in_llama_cpp, "vllm": measure_in_vllm}


def runtime_name(profile: ProfileConfig) -> str:
    """Return the runtime of a search's measurements in the words of tables and reports."""
    return RUNTIME_NAMES[profile.measured_in]


def measure_as_profiled(
    models: Mapping[str, HeterogeneousLlamaForCausalLM],
    *,
    profile: ProfileConfig,
    scenarios: Sequence[Scenario],
    measurement: MeasurementConfig,
    work_dir: Path,
    reporter: Reporter,
) -> Measurements:
    """Time prefill and decode of every model in every scenario, in turn, in the profile's runtime.

    Raises:
        RuntimeMissingError: when that is not installed.
    """
    return measure_in(
        profile.measured_in,
        models,
        profile=profile,
        scenarios=scenarios,
        measurement=measurement,
        work_dir=work_dir,
        reporter=reporter,
    )


def measure_in(
    backend: Backend,
    models: Mapping[str, HeterogeneousLlamaForCausalLM],
    *,
    profile: ProfileConfig,
    scenarios: Sequence[Scenario],
    measurement: MeasurementConfig,
    work_dir: Path,
    reporter: Reporter,
) -> Measurements:
    """Time prefill and decode of every model in every scenario, in turn; only torch is given more than architectures.

    Raises:
        RuntimeMissingError: when the backend is not installed.
    """
    if backend == "torch":
        return measure_models(
            models, scenarios, measurement=measurement, threads=profile.num_threads, reporter=reporter
        )
    return _OUTSIDE[backend](
        {name: model.architecture for name, model in models.items()},
        profile=profile,
        scenarios=scenarios,
        measurement=measurement,
        work_dir=work_dir,
        reporter=reporter,
    )


def profile_outside(
    architecture: Architecture, space: SearchSpace, *, profile: ProfileConfig, work_dir: Path, reporter: Reporter
) -> Profile:
    """Time every distinct variant of the space and the whole parent in a profile's runtime that is not torch.

    Raises:
        RecipeError: for a space with linear variants that the runtime does not have.
        RuntimeMissingError: when it is not installed.
    """
    assert profile.backend in ("llama_cpp", "vllm")
    require_timeable(space, backend=profile.backend)
    measure = _OUTSIDE[profile.backend]

    def measure_all(models: Mapping[str, Architecture]) -> Measurements:
        return measure(
            models,
            profile=profile,
            scenarios=profile.scenarios,
            measurement=MeasurementConfig(rounds=profile.repeats, warmups=profile.warmups),
            work_dir=work_dir,
            reporter=reporter,
        )

    return profile_by_differences(architecture, space, profile=profile, measure=measure_all)
