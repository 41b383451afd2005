"""Small architectures, tables and problems made by hand for the Puzzle tests."""

import itertools
import random
from collections.abc import Container
from typing import Any

import pytest

from pipeline.architecture import Architecture, BlockSpec, gqa, swiglu
from pipeline.puzzle import programme
from pipeline.puzzle.calibration import PHASES, calibrate
from pipeline.puzzle.predictions import CostModel
from pipeline.recipe import Limit, ProfileConfig, Scenario


def make_architecture(
    *,
    num_layers: int = 3,
    hidden_size: int = 32,
    intermediate_size: int = 64,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    vocab_size: int = 48,
) -> Architecture:
    return Architecture(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        head_dim=hidden_size // num_attention_heads,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_ids=(2,),
        pad_token_id=None,
        blocks=tuple(
            BlockSpec(attention=gqa(num_key_value_heads), ffn=swiglu(intermediate_size), parent_layers=(layer,))
            for layer in range(num_layers)
        ),
    )


def make_profile(*, scenarios: tuple[Scenario, ...] | None = None) -> ProfileConfig:
    chat = Scenario(name="chat", batch_size=2, prompt_tokens=8, generation_tokens=4)
    return ProfileConfig(
        backend="torch",
        scenarios=scenarios or (chat,),
        precision="fp32",
        served_precision="fp32",
        num_threads=1,
        warmups=1,
        repeats=3,
    )


def make_costs(
    architecture: Architecture, blocks: list[BlockSpec], *, seed: int = 0, profile: ProfileConfig | None = None
) -> CostModel:
    """A cost model with random times; the parent is measured 10 % above the sum of its blocks."""
    rng = random.Random(seed)
    profile = profile or make_profile()
    time_ms: dict[tuple[str, str, str, str], float] = {}
    for scenario in profile.scenarios:
        for phase in PHASES:
            time_ms[scenario.name, phase, "fixed", "fixed"] = 0.5
            for block in (*architecture.blocks, *blocks):
                for part, key in (("attention", block.attention.key), ("ffn", block.ffn.key)):
                    slow = 3.0 if (part, key) in (("attention", "kv2"), ("ffn", "ffn64")) else 0.0
                    time_ms.setdefault((scenario.name, phase, part, key), slow + rng.uniform(0.1, 1.0))
    sum_ms = {
        (scenario.name, phase): 0.5
        + sum(
            time_ms[scenario.name, phase, "attention", block.attention.key]
            + time_ms[scenario.name, phase, "ffn", block.ffn.key]
            for block in architecture.blocks
        )
        for scenario in profile.scenarios
        for phase in PHASES
    }
    measured_ms = {key: 1.1 * value for key, value in sum_ms.items()}
    return CostModel(
        parent=architecture,
        profile=profile,
        time_ms=time_ms,
        calibration=calibrate(sum_ms=sum_ms, measured_ms=measured_ms, parent_ms=measured_ms),
    )


def limit(
    quantity: str,
    bound: float,
    *,
    relative: bool = True,
    scenario: str = "chat",
    device_memory_gb: float | None = None,
) -> Limit:
    needs = quantity not in ("cached_tokens", "num_parameters", "kv_bytes_per_token")
    return Limit.model_validate(
        {
            "quantity": quantity,
            "scenario": scenario if needs else None,
            "bound": bound,
            "relative_to": "parent" if relative else "absolute",
            "device_memory_gb": device_memory_gb,
        }
    )


def give_solver_no_time(monkeypatch: pytest.MonkeyPatch, runs: Container[int]) -> None:
    """Let the solver's time end as these of its next runs begin, counted from 0."""
    run_solver, numbers = programme._run_solver, itertools.count()

    def run(model: Any, *, time_limit_s: float, relative_gap: float) -> None:
        left_s = 0.0 if next(numbers) in runs else time_limit_s
        run_solver(model, time_limit_s=left_s, relative_gap=relative_gap)

    monkeypatch.setattr(programme, "_run_solver", run)
