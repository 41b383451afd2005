"""Subblock times from whole models, and how llama-bench is asked.

The llama-bench here is a script of this file. It reads the layers out of the GGUF file and says what a machine would
take on which every subblock has a time of its own, so that what comes back is known.
"""

import sys
from pathlib import Path

import pytest

from pipeline.architecture import NO_ATTENTION, NO_FFN, Architecture, gqa, swiglu
from pipeline.errors import RecipeError, StageError
from pipeline.progress import SilentReporter
from pipeline.puzzle.llama_cpp import measure_in_llama_cpp, profile_in_llama_cpp, subblock_times
from pipeline.puzzle.search_space import SearchSpace, resolve
from pipeline.recipe import MeasurementConfig, ProfileConfig, Scenario, SearchSpaceConfig
from pipeline.runtimes import RuntimeMissingError
from tests.pipeline.model.builders import make_architecture, make_blocks

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

# 7 us outside the layers, 100 per key/value head and 10 per query head, 1 per FFN channel; ten times that in a prefill.
BENCH = """#!{python}
import json, sys
from gguf import GGUFReader
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert (given["-t"], given["-r"], given["-o"]) == ("3", "5", "json"), given
fields = GGUFReader(given["-m"]).fields
def per_layer(name):
    return fields["deci." + name].contents()
heads, kv_heads = per_layer("attention.head_count"), per_layer("attention.head_count_kv")
one_us = 7 + sum(10 * h + 100 * kv for h, kv in zip(heads, kv_heads)) + sum(per_layer("feed_forward_length"))
if given["-n"] == "0":
    assert given["-p"] == "40" and "-d" not in given, given
    total_us = 10 * one_us
else:
    assert (given["-p"], given["-n"], given["-d"]) == ("0", "8", "46"), given
    total_us = 8 * one_us
print(json.dumps([{{"samples_ns": [1000 * total_us * slow for slow in (3, 1, 2)]}}]))
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama-bench on PATH, and no other."""
    program = tmp_path / "bin" / "llama-bench"
    program.parent.mkdir()
    program.write_text(BENCH.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.delenv("REFIT_RUNTIMES", raising=False)
    return program


def space_of(*, attention: tuple = ("parent", 1, "no_op"), ffn: tuple = ("parent", 256, "no_op")) -> SearchSpace:
    return resolve(SearchSpaceConfig(attention=attention, ffn=ffn, overrides=(), portable=False), PARENT)


def test_profile_finds_the_time_of_every_subblock(tmp_path: Path, bench: Path):
    profile = profile_in_llama_cpp(
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


def test_residual_is_that_of_a_model_of_all_variants(tmp_path: Path, bench: Path):
    profile = profile_in_llama_cpp(
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


def test_noise_never_makes_a_subblock_take_less_than_nothing():
    space = space_of(ffn=("parent", "no_op"))
    whole_ms = {
        "parent": 10.0,
        "shallow": 5.5,
        "attention no_op": 4.0,
        "attention kv1": 3.0,
        "ffn no_op": 1.0,
    }
    times = subblock_times(PARENT, space, whole_ms)
    assert times["attention", "kv2"] == pytest.approx(1.2)
    assert times["attention", "kv1"] == 0.0
    assert times["ffn", "no_op"] == 0.0
    assert times["fixed", "fixed"] == pytest.approx(1.0)


def test_what_llama_cpp_cannot_time_is_refused(tmp_path: Path, bench: Path):
    with pytest.raises(RecipeError, match=r"'linear', which llama\.cpp does not have"):
        profile_in_llama_cpp(
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
    monkeypatch.delenv("REFIT_RUNTIMES", raising=False)
    with pytest.raises(RuntimeMissingError, match="make install-llama-cpp"):
        one_round(tmp_path, PARENT)
