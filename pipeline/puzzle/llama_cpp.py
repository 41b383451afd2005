"""Times taken by llama.cpp's own llama-bench: whole models, and subblocks as differences of whole models.

llama-bench times prefill and decode of a GGUF file and sees no layers, so a subblock's time is what a model gains by
it. With L layers of the parent's attention p and FFN q, T the time of a model and T(x -> y) that of the parent with y
in the place of x (attention from layer 1 on: without it in layer 0 no file loads):

    block   = (T - T of L/2 layers) / (L - L/2)
    fixed   = T - L block
    p       = (T - T(p -> none)) / (L - 1)                    q = block - p
    a       = p + (T(p -> a) - T) / (L - 1)                   f = q + (T(q -> f) - T) / L

so that the sum over the parent's subblocks is the parent by construction. What differences of whole models cannot see
is checked on one more model, whose layers take all variants in turn: the residual is its sum against its measurement.
A call's fastest repetition counts: what else a machine does only adds. Whatever the weights' precision, the cache holds
fp16, as it does in llama.cpp's server unless told otherwise; llama-bench knows no fp32 cache.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.architecture import NO_ATTENTION, Architecture, AttentionSpec, FFNSpec
from pipeline.errors import RecipeError
from pipeline.model.checkpoint import TORCH_DTYPES
from pipeline.model.export_gguf import write_gguf
from pipeline.model.heterogeneous import build_model
from pipeline.model.repacking import portable
from pipeline.processes import run_checked
from pipeline.progress import Reporter
from pipeline.puzzle.calibration import PHASES, Phase
from pipeline.puzzle.measure import Measurements
from pipeline.puzzle.predictions import FIXED
from pipeline.puzzle.profiling import Profile, ProfileKey, Samples, mixed_blocks
from pipeline.puzzle.search_space import SearchSpace
from pipeline.puzzle.timing import MAX_DECODE_STEPS
from pipeline.recipe import MeasurementConfig, ProfileConfig, Scenario
from pipeline.runtimes import require_llama_cpp

PARENT, SHALLOW, MIXED = "parent", "shallow", "mixed"
REPETITIONS = 5  # of one call of llama-bench
CALL_TIMEOUT_S = 1800.0

Times = dict[tuple[str, str, Phase], list[float]]  # model, scenario, phase


def measure_in_llama_cpp(
    architectures: Mapping[str, Architecture],
    *,
    profile: ProfileConfig,
    scenarios: Sequence[Scenario],
    measurement: MeasurementConfig,
    work_dir: Path,
    reporter: Reporter,
) -> Measurements:
    """Time prefill and decode of whole models with random weights, as re-packed for llama.cpp, in turn.

    Raises:
        RuntimeMissingError: when llama-bench is not installed.
    """
    times = _rounds(
        architectures,
        scenarios=scenarios,
        profile=profile,
        warmups=measurement.warmups,
        rounds=measurement.rounds,
        work_dir=work_dir,
        reporter=reporter,
    )
    return Measurements(times_ms={key: tuple(values) for key, values in times.items()})


def profile_in_llama_cpp(
    architecture: Architecture, space: SearchSpace, *, profile: ProfileConfig, work_dir: Path, reporter: Reporter
) -> Profile:
    """Time every distinct variant of the space and the whole parent in every scenario.

    Raises:
        RecipeError: for a space with linear FFNs, which llama.cpp does not have.
        RuntimeMissingError: when llama-bench is not installed.
    """
    _require_known(space)
    models = _models(architecture, space)
    times = _rounds(
        models,
        scenarios=profile.scenarios,
        profile=profile,
        warmups=profile.warmups,
        rounds=profile.repeats,
        work_dir=work_dir,
        reporter=reporter,
    )
    samples: defaultdict[ProfileKey, list[float]] = defaultdict(list)
    for scenario in profile.scenarios:
        for phase in PHASES:
            for round_index in range(profile.repeats):
                whole = {name: times[name, scenario.name, phase][round_index] for name in models}
                for (part, variant), value in subblock_times(architecture, space, whole).items():
                    samples[scenario.name, phase, part, variant].append(value)
    kept = {key: Samples(times_ms=tuple(values)) for key, values in samples.items()}
    whole_keys: list[tuple[str, Phase]] = [(scenario.name, phase) for scenario in profile.scenarios for phase in PHASES]
    mixed = models[MIXED]
    return Profile(
        samples=kept,
        parent={key: Samples(times_ms=tuple(times[PARENT, *key])) for key in whole_keys},
        sum_ms={key: _sum_ms(architecture, kept, *key) for key in whole_keys},
        checked={key: (_sum_ms(mixed, kept, *key), statistics.median(times[MIXED, *key])) for key in whole_keys},
    )


def subblock_times(
    architecture: Architecture, space: SearchSpace, whole_ms: Mapping[str, float]
) -> dict[tuple[str, str], float]:
    """Return the milliseconds of each part and variant, and of what is outside the layers, from those of whole models.

    Noise can make a small difference negative; no subblock takes less than nothing.
    """
    layers = architecture.num_hidden_layers
    parent_block = architecture.homogeneous_block()
    parent_ms = whole_ms[PARENT]
    block_ms = (parent_ms - whole_ms[SHALLOW]) / (layers - layers // 2)
    attention_ms = (parent_ms - whole_ms[_name(NO_ATTENTION)]) / (layers - 1)
    ffn_ms = block_ms - attention_ms
    found = {(FIXED, FIXED): parent_ms - layers * block_ms}
    for spec in space.distinct_attention:
        if spec == parent_block.attention:
            found["attention", spec.key] = attention_ms
        elif spec == NO_ATTENTION:
            found["attention", spec.key] = 0.0
        else:
            found["attention", spec.key] = attention_ms + (whole_ms[_name(spec)] - parent_ms) / (layers - 1)
    for spec in space.distinct_ffn:
        other_ms = parent_ms if spec == parent_block.ffn else whole_ms[_name(spec)]
        found["ffn", spec.key] = ffn_ms + (other_ms - parent_ms) / layers
    return {key: max(0.0, value) for key, value in found.items()}


def _require_known(space: SearchSpace) -> None:
    if any(spec.kind == "linear" for spec in space.distinct_ffn):
        raise RecipeError(
            "search_space.ffn lists 'linear', which llama.cpp does not have: take it out, or set "
            "block_profile.backend: torch"
        )


def _models(architecture: Architecture, space: SearchSpace) -> dict[str, Architecture]:
    """Return the whole models whose differences are the subblocks."""
    blocks = architecture.blocks
    parent_block = architecture.homogeneous_block()
    if len(blocks) < 2:
        raise RecipeError("a parent of one layer has no differences to take: set block_profile.backend: torch")
    models = {PARENT: architecture, SHALLOW: architecture.with_blocks(blocks[: len(blocks) // 2])}
    for spec in dict.fromkeys([NO_ATTENTION, *space.distinct_attention]):
        if spec != parent_block.attention:
            changed = [block.model_copy(update={"attention": spec}) for block in blocks[1:]]
            models[_name(spec)] = architecture.with_blocks([blocks[0], *changed])
    for spec in space.distinct_ffn:
        if spec != parent_block.ffn:
            models[_name(spec)] = architecture.with_blocks([block.model_copy(update={"ffn": spec}) for block in blocks])
    mixed = mixed_blocks(space.distinct_attention, space.distinct_ffn, num_layers=len(blocks))
    models[MIXED] = architecture.with_blocks([blocks[0], *mixed[1:]])
    return models


def _name(spec: AttentionSpec | FFNSpec) -> str:
    return f"{'attention' if isinstance(spec, AttentionSpec) else 'ffn'} {spec.key}"


def _sum_ms(architecture: Architecture, samples: Mapping[ProfileKey, Samples], scenario: str, phase: Phase) -> float:
    return samples[scenario, phase, FIXED, FIXED].median_ms + sum(
        samples[scenario, phase, "attention", block.attention.key].median_ms
        + samples[scenario, phase, "ffn", block.ffn.key].median_ms
        for block in architecture.blocks
    )


def _rounds(
    architectures: Mapping[str, Architecture],
    *,
    scenarios: Sequence[Scenario],
    profile: ProfileConfig,
    warmups: int,
    rounds: int,
    work_dir: Path,
    reporter: Reporter,
) -> Times:
    """Time every model once per round; the model that begins changes, so a change of the machine's load meets all."""
    program = require_llama_cpp("llama-bench")
    names = list(architectures)
    times: Times = defaultdict(list)
    with _files(architectures, profile=profile, work_dir=work_dir) as files:
        for round_index in range(warmups + rounds):
            begin = round_index % len(names)
            for scenario in scenarios:
                for name in names[begin:] + names[:begin]:
                    for phase in PHASES:
                        time_ms = _time_ms(program, files[name], scenario, phase, profile=profile)
                        if round_index >= warmups:
                            times[name, scenario.name, phase].append(time_ms)
            reporter.step(round_index + 1, warmups + rounds, what="llama-bench rounds")
    return times


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


def _time_ms(program: Path, gguf: Path, scenario: Scenario, phase: Phase, *, profile: ProfileConfig) -> float:
    """Return the milliseconds of the whole prefill, or of one decode step half-way through the generation."""
    num_steps = min(scenario.generation_tokens, MAX_DECODE_STEPS)
    before = scenario.prompt_tokens + (scenario.generation_tokens - num_steps) // 2
    work = {
        "prefill": ("-p", str(scenario.prompt_tokens), "-n", "0"),
        "decode": ("-p", "0", "-n", str(num_steps), "-d", str(before)),
    }[phase]
    settings = ("-t", str(profile.num_threads), "-r", str(REPETITIONS), "-o", "json")
    command = (str(program), "-m", str(gguf), *settings, *work)
    output = run_checked(command, what="llama-bench", timeout_s=CALL_TIMEOUT_S)
    (result,) = json.loads(output)
    return min(result["samples_ns"]) / 1e6 / (1 if phase == "prefill" else num_steps)
