"""llama-bench and vLLM's engine time the models they are given, and hold the caches that are counted."""

from pathlib import Path

import pytest
import torch

from pipeline.architecture import NO_ATTENTION, gqa, swiglu
from pipeline.costs import kv_bytes_per_token
from pipeline.model.heterogeneous import build_model
from pipeline.model.repacking import portable
from pipeline.progress import SilentReporter
from pipeline.puzzle.backends import measure_in
from pipeline.recipe import Backend, MeasurementConfig, ProfileConfig, Scenario
from tests.pipeline.model.builders import make_architecture, make_blocks
from tests.serving.cases import SHAPE

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1800)]

SHORT = Scenario(name="short", batch_size=1, prompt_tokens=32, generation_tokens=8)
LONG = Scenario(name="long", batch_size=1, prompt_tokens=224, generation_tokens=8)
PROFILE = ProfileConfig(
    backend="torch",
    scenarios=(SHORT, LONG),
    precision="fp32",
    served_precision="fp32",
    num_threads=1,
    warmups=1,
    repeats=5,
)


@pytest.mark.parametrize(("backend", "bytes_per_value"), [("llama_cpp", 2), ("vllm", 4)])
def test_shallow_child_is_faster_and_its_cache_is_what_is_counted(
    backend: Backend, bytes_per_value: int, tmp_path: Path
):
    layers = [(gqa(4), swiglu(1024))] * 16
    child_layers = [(NO_ATTENTION, swiglu(1024)), (gqa(2), swiglu(256)), (gqa(8), swiglu(512))]
    architectures = {
        "parent": make_architecture(**SHAPE, blocks=make_blocks(*layers)),
        "child": make_architecture(**SHAPE, blocks=make_blocks(*child_layers)),
    }
    found = measure_in(
        backend,
        {name: build_model(one, dtype=torch.float32, seed=0) for name, one in architectures.items()},
        profile=PROFILE,
        scenarios=PROFILE.scenarios,
        measurement=MeasurementConfig(rounds=3, warmups=1),
        work_dir=tmp_path,
        reporter=SilentReporter(),
    )
    # 16 layers against 3, 224 tokens against 32: beside other work medians move, but not by that much.
    for scenario in ("short", "long"):
        for phase in ("prefill", "decode"):
            assert found.speedup("child", scenario, phase, over="parent").median > 1, (scenario, phase)
    assert found.median_ms("parent", "long", "prefill") > found.median_ms("parent", "short", "prefill")
    assert found.kv_bytes_per_token == {
        name: kv_bytes_per_token(portable(one).architecture, bytes_per_value=bytes_per_value)
        for name, one in architectures.items()
    }
