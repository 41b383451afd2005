"""How llama-bench is asked, and what block times come of its answers."""

from pathlib import Path

import pytest

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, gqa, swiglu
from pipeline.errors import RecipeError, StageError
from pipeline.progress import SilentReporter
from pipeline.puzzle.backends import profile_outside
from pipeline.puzzle.llama_cpp import measure_in_llama_cpp
from pipeline.puzzle.search_space import SearchSpace, resolve
from pipeline.recipe import MeasurementConfig, ProfileConfig, Scenario, SearchSpaceConfig
from pipeline.runtimes import RuntimeMissingError
from tests.pipeline.model.builders import make_architecture, make_blocks
from tests.pipeline.puzzle.fake_runtimes import install_llama_bench, read_calls

CHAT = Scenario(name="chat", batch_size=1, prompt_tokens=40, generation_tokens=20)
PROFILE = ProfileConfig(
    backend="llama_cpp",
    scenarios=(CHAT,),
    precision="fp32",
    served_precision="fp32",
    num_threads=3,
    warmups=1,
    repeats=3,
)
PARENT = make_architecture(blocks=make_blocks(*[(gqa(2), swiglu(512))] * 6))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama-bench, and no other."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    return install_llama_bench(tmp_path / "runtimes", monkeypatch)


def space_of(*, attention: tuple = ("parent", 1, "no_op"), ffn: tuple = ("parent", 256, "no_op")) -> SearchSpace:
    return resolve(SearchSpaceConfig(attention=attention, ffn=ffn, overrides=(), portable=False), PARENT)


def test_profile_finds_the_time_of_every_subblock(tmp_path: Path, bench: Path):
    profile = profile_outside(
        PARENT, space_of(), profile=PROFILE, work_dir=tmp_path / "work", reporter=SilentReporter()
    )
    one_us = {
        ("attention", "kv2"): 240,
        ("attention", "kv1"): 140,
        ("attention", "no_op"): 0,
        ("ffn", "ffn512"): 512,
        ("ffn", "ffn256"): 256,
        ("ffn", "no_op"): 32,  # attention without FFN is written with a zero FFN of 32 channels
        ("fixed", "fixed"): 7,
    }
    expected = {
        ("chat", phase, *key): times * value / 1000
        for key, value in one_us.items()
        for phase, times in (("prefill", 10), ("decode", 1))
    }
    found = {key: samples.median_ms for key, samples in profile.samples.items()}
    assert found == pytest.approx(expected, abs=1e-9)
    assert {len(samples.times_ms) for samples in profile.samples.values()} == {3}
    assert profile.parent["chat", "decode"].median_ms == pytest.approx((7 + 6 * 752) / 1000)
    assert profile.calibration.get("chat", "prefill").factor == pytest.approx(1.0)
    assert list((tmp_path / "work").iterdir()) == []
    calls = [
        {key: value for key, value in call.items() if key != "-m"}
        for call in read_calls(bench.with_name("calls.jsonl"))
    ]
    common = {"-t": "3", "-r": "5", "-o": "json"}
    prefill, decode = common | {"-p": "40", "-n": "0"}, common | {"-p": "0", "-n": "8", "-d": "46"}
    assert calls == [prefill, decode] * (len(calls) // 2)


def test_residual_is_that_of_a_model_of_all_variants(tmp_path: Path, bench: Path):
    profile = profile_outside(
        PARENT, space_of(), profile=PROFILE, work_dir=tmp_path / "work", reporter=SilentReporter()
    )
    # Layers take kv2 kv1 none and 512 256 none in turn, so two of six have no subblock: in the file they are not there,
    # while their sum holds 32 channels each.
    measured = 7 + 2 * (240 + 512) + 2 * (140 + 256)
    assert profile.residuals["chat", "decode"] == pytest.approx(2 * 32 / measured)


def test_whole_models_are_timed_as_they_are_served(tmp_path: Path, bench: Path):
    child = PARENT.with_blocks(make_blocks((NO_ATTENTION, swiglu(300)), (gqa(2), NO_FFN), (NO_ATTENTION, NO_FFN)))
    measurements = measure_in_llama_cpp(
        {"parent": PARENT, "child": child},
        profile=PROFILE,
        scenarios=PROFILE.scenarios,
        measurement=MeasurementConfig(rounds=2, warmups=1),
        work_dir=tmp_path / "work",
        reporter=SilentReporter(),
    )
    # One head of zeros in layer 0, 300 channels padded to 512, an FFN of 32 zeros behind attention alone.
    child_us = 7 + 140 + 512 + 240 + 32
    assert measurements.times_ms["child", "chat", "decode"] == pytest.approx((child_us / 1000,) * 2)
    assert measurements.speedup("child", "chat", "prefill", over="parent").median == pytest.approx(4519 / child_us)
    # Keys and values of 8 channels, 2 bytes each; the head of zeros takes its place in the cache.
    assert measurements.kv_bytes_per_token == {"parent": 6 * 2 * 32, "child": (1 + 2) * 32}


def test_what_llama_cpp_cannot_time_is_refused(tmp_path: Path, bench: Path):
    with pytest.raises(RecipeError, match=r"'linear', which llama\.cpp does not have"):
        profile_outside(
            PARENT, space_of(ffn=("parent", "linear")), profile=PROFILE, work_dir=tmp_path, reporter=SilentReporter()
        )


def one_round(tmp_path: Path, architecture: Architecture) -> None:
    measure_in_llama_cpp(
        {"parent": architecture},
        profile=PROFILE,
        scenarios=PROFILE.scenarios,
        measurement=MeasurementConfig(rounds=1, warmups=1),
        work_dir=tmp_path / "work",
        reporter=SilentReporter(),
    )


def test_llama_bench_that_fails_says_why(tmp_path: Path, bench: Path):
    bench.write_text("#!/bin/sh\necho no such device; exit 3\n")
    with pytest.raises(StageError, match="llama-bench failed with exit code 3:\nno such device"):
        one_round(tmp_path, PARENT)


def test_missing_llama_bench_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("REFIT_RUNTIMES", str(tmp_path))
    with pytest.raises(RuntimeMissingError, match="make install-llama-cpp"):
        one_round(tmp_path, PARENT)
