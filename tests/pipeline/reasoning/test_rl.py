"""Reinforcement learning on a tiny policy: what it writes, resume to the bit, reward that rises, refusals."""

import json
import re
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from pipeline.data.reasoning_items import ReasoningItem
from pipeline.errors import CheckpointError, DataError, DivergedError, RecipeError, StageError
from pipeline.model.checkpoint import load_model, load_tokenizer, read_architecture
from pipeline.processes import run_checked
from pipeline.progress import SilentReporter
from pipeline.reasoning.experience import Judged, Prompt, draw_prompts, sample_judged
from pipeline.reasoning.held_out import split_held_out
from pipeline.reasoning.rl import units_per_update
from pipeline.reasoning.samplers import OwnSampler
from pipeline.recipe import (
    RLOO,
    RPO,
    CurriculumConfig,
    DifficultyConfig,
    HeldOutRewardConfig,
    OnPolicyDistillation,
    RLAlgorithm,
    RLConfig,
    StopRulesConfig,
)
from pipeline.stage import StageResult
from pipeline.stages import rl_checkpoint
from tests.pipeline.reasoning.rl_builders import CONFIG, rl_artifacts, rl_inputs
from tests.pipeline.training.builders import counted_layer_runs, write_spec

OFFLINE_RPO = RPO(kind="rpo", divergence="squared", beta=0.1, reward_scale=3.0, online=False)
DISTILLATION = OnPolicyDistillation(kind="on_policy_distillation", clip_low=0.2, clip_high=0.2)


class Interrupted(Exception):  # noqa: N818 (it stands for a kill, not for an error of the code)
    """Raised by a reporter in place of a kill."""


class InterruptingReporter(SilentReporter):
    """Ends the stage right after it reported a step."""

    def __init__(self, *, at_step: int) -> None:
        self._at_step = at_step

    def step(self, step: int, total: int, /, *, what: str, **metrics: float) -> None:
        """Raise at the chosen step."""
        if step == self._at_step:
            raise Interrupted


@pytest.fixture(scope="module")
def artifacts(
    parent_dir: Path, items: list[ReasoningItem], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A policy that often ends its turn, so that some samples earn the format reward and some nothing."""
    root = tmp_path_factory.mktemp("rl")
    return rl_artifacts(root, parent_dir=parent_dir, items=items)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rl_checkpoint_stage_writes_checkpoint_curve_and_samples(
    artifacts: dict[str, Path], tmp_path: Path, precision: str
):
    config = CONFIG.model_copy(update={"precision": precision})
    result = rl_checkpoint.run(config, rl_inputs(artifacts), tmp_path)

    curve = pl.read_parquet(tmp_path / "curve.parquet")
    assert curve.columns[:2] == ["step", "tokens"]
    assert {"loss", "learning_rate", "grad_norm", "reward", "kl", "entropy", "format_rate"} <= set(curve.columns)
    assert curve["step"].to_list() == [1, 2, 3]
    assert all(norm > 0 for norm in curve["grad_norm"])
    assert curve["kl"][0] == pytest.approx(0.0, abs=1e-6)
    # Sampler and trainer differ by rounding alone.
    assert result.metrics["max_sampler_mismatch_nats"] < (1e-5 if precision == "fp32" else 0.05)
    assert 0 < result.metrics["final_kl"] < 1
    assert result.metrics["num_samples"] == 72
    assert load_model(tmp_path, dtype=torch.float32).architecture == read_architecture(artifacts["sft_checkpoint"])
    samples = pl.read_parquet(tmp_path / "rollout_samples.parquet")
    assert samples["step"].to_list() == [1] * 4 + [2] * 4 + [3] * 4
    assert samples["mode"].to_list()[:4] == ["on", "off", "off", "off"]


def test_rl_checkpoint_stage_interrupted_and_resumed_is_bit_identical(artifacts: dict[str, Path], tmp_path: Path):
    config = CONFIG.model_copy(update={"precision": "bf16"})
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    result = rl_checkpoint.run(config, rl_inputs(artifacts), whole)
    with pytest.raises(Interrupted):
        rl_checkpoint.run(config, rl_inputs(artifacts, reporter=InterruptingReporter(at_step=3)), resumed)
    again = rl_checkpoint.run(config, rl_inputs(artifacts), resumed)

    assert again == result
    for name in ("model.safetensors", "curve.parquet", "rollout_samples.parquet"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_rl_checkpoint_stage_that_makes_activations_again_is_bit_identical(artifacts: dict[str, Path], tmp_path: Path):
    num_runs: list[int] = []
    for recomputes in (False, True):
        with counted_layer_runs() as counted:
            rl_checkpoint.run(
                CONFIG, rl_inputs(artifacts, recompute_activations=recomputes), tmp_path / str(recomputes)
            )
        num_runs.append(counted())
    for name in ("model.safetensors", "curve.parquet"):
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes(), name
    assert num_runs[1] > num_runs[0]


def test_rl_checkpoint_stage_reward_rises_when_form_is_all_it_takes(artifacts: dict[str, Path], tmp_path: Path):
    config = CONFIG.model_copy(
        update={
            "steps": 8,
            "share_thinking_on": 0.0,
            "samples_per_prompt": 16,
            "updates_per_rollout": 1,
        }
    )
    result = rl_checkpoint.run(config, rl_inputs(artifacts), tmp_path)
    assert result.metrics["format_rate_last"] > result.metrics["format_rate_first"] + 0.3


@pytest.mark.parametrize(
    ("algorithm", "advice"),
    [
        (CONFIG.algorithm, "lower rl.optimizer.learning_rate, or raise rl.algorithm.kl_weight"),
        (OFFLINE_RPO, "lower rl.optimizer.learning_rate"),  # it has no such key
    ],
    ids=["grpo", "rpo"],
)
def test_rl_checkpoint_stage_non_finite_gradients_stop_it(
    artifacts: dict[str, Path], tmp_path: Path, algorithm: RLAlgorithm, advice: str
):
    optimizer = CONFIG.optimizer.model_copy(update={"learning_rate": 1e38})
    config = CONFIG.model_copy(update={"optimizer": optimizer, "algorithm": algorithm})
    with pytest.raises(DivergedError, match=rf": {re.escape(advice)}$"):
        rl_checkpoint.run(config, rl_inputs(artifacts), tmp_path)


@pytest.mark.parametrize(
    "algorithm",
    [
        RLOO(kind="rloo", kl_weight=0.01),
        RPO(kind="rpo", divergence="backward_kl", beta=0.1, reward_scale=3.0, online=True),
        OFFLINE_RPO,
        DISTILLATION,
    ],
    ids=["rloo", "online rpo", "offline rpo", "distillation"],
)
def test_rl_checkpoint_stage_trains_with_every_algorithm(
    artifacts: dict[str, Path], parent_dir: Path, tmp_path: Path, algorithm: RLAlgorithm
):
    # One reply in twenty ends and earns something: fewer samples may all earn the same, which teaches nothing.
    config = CONFIG.model_copy(
        update={"algorithm": algorithm, "steps": 2, "updates_per_rollout": 1, "samples_per_prompt": 32}
    )
    given = {**artifacts, "parent_checkpoint": parent_dir}
    result = rl_checkpoint.run(config, rl_inputs(given), tmp_path)
    curve = pl.read_parquet(tmp_path / "curve.parquet")
    assert all(norm > 0 for norm in curve["grad_norm"])
    if algorithm.kind == "on_policy_distillation":
        # The teacher is the parent, which does not favour the end token; the policy goes back to it.
        assert curve["kl"][0] > 0.01
        assert result.metrics["kl_to_teacher"] < curve["kl"][0]
        assert "final_kl" not in result.metrics
    else:
        assert curve["kl"][0] == pytest.approx(0.0, abs=1e-6)
        assert result.metrics["final_kl"] > 0


def _sampled(
    weights_dir: Path, prompts: list[Prompt], *, config: RLConfig, num_samples: int, seed: tuple[int | str, ...]
) -> list[Judged]:
    """Return what a checkpoint replies to prompts, and what that earns, drawn as the stage draws on its one rank."""
    model = load_model(weights_dir, dtype=torch.float32)
    groups = sample_judged(
        OwnSampler(model),
        prompts,
        eos_token_ids=model.architecture.eos_token_ids,
        tokenizer=load_tokenizer(weights_dir),
        reward_model=None,
        config=config,
        num_samples=num_samples,
        seed=seed,
    )
    return [judged for group in groups for judged in group]


def test_rl_checkpoint_stage_offline_rpo_reports_the_kl_from_the_reference_that_samples(
    artifacts: dict[str, Path], items: list[ReasoningItem], tmp_path: Path
):
    config = CONFIG.model_copy(
        update={
            "algorithm": OFFLINE_RPO,
            "samples_per_prompt": 64,
            "optimizer": CONFIG.optimizer.model_copy(update={"learning_rate": 1e-2}),
        }
    )
    result = rl_checkpoint.run(config, rl_inputs(artifacts), tmp_path)
    # Sampler and reference are one model, however far the policy has gone.
    assert result.metrics["max_sampler_mismatch_nats"] < 1e-5

    prompts = draw_prompts(split_held_out(items, config=config)[0], config=config, step=3, curriculum=None)
    seed = ("rollout", config.seed, 3, 0)
    replies = _sampled(artifacts["sft_checkpoint"], prompts, config=config, num_samples=64, seed=seed)
    models = [load_model(path, dtype=torch.float32).eval() for path in (artifacts["sft_checkpoint"], tmp_path)]
    exact, log_ratios = [], []
    for reply in replies:
        ids = torch.tensor([[*reply.row.prompt_ids, *reply.row.completion_ids]])
        sampled = ids[0, len(reply.row.prompt_ids) :]
        with torch.no_grad():
            reference, policy = (
                torch.distributions.Categorical(logits=model(input_ids=ids).logits[0, -len(sampled) - 1 : -1])
                for model in models
            )
        exact.append(torch.distributions.kl_divergence(reference, policy))
        log_ratios.append(reference.log_prob(sampled) - policy.log_prob(sampled))
    log_ratio = torch.cat(log_ratios)
    estimates = torch.exp(-log_ratio) - 1 + log_ratio
    assert result.metrics["final_kl"] == pytest.approx(estimates.mean().item(), rel=1e-4)
    # 0.60 of 0.71: the policy prefers what the reference seldom samples.
    assert result.metrics["final_kl"] == pytest.approx(torch.cat(exact).mean().item(), rel=0.25)


def test_rl_checkpoint_stage_publishes_what_the_published_weights_earn_on_held_out_prompts(
    artifacts: dict[str, Path], items: list[ReasoningItem], tmp_path: Path
):
    config = CONFIG.model_copy(
        update={
            "steps": 2,
            "share_thinking_on": 0.0,
            "samples_per_prompt": 16,
            "held_out": HeldOutRewardConfig(num_prompts=6, interval_steps=1),
            "optimizer": CONFIG.optimizer.model_copy(update={"learning_rate": 2e-3}),
        }
    )
    result = rl_checkpoint.run(config, rl_inputs(artifacts), tmp_path)
    prompts = [Prompt(item=item, thinking=False) for item in split_held_out(items, config=config)[1]]
    replies = _sampled(tmp_path, prompts, config=config, num_samples=1, seed=("held out", config.seed, 0))
    earned = sum(reply.reward for reply in replies) / len(replies)
    assert result.metrics["held_out_reward_last"] == pytest.approx(earned)
    # The last row of the curve was measured before the last step's updates.
    assert pl.read_parquet(tmp_path / "curve.parquet")["held_out_reward"][-1] != pytest.approx(earned)


def test_rl_checkpoint_stage_by_difficulty_resumes_with_the_pass_rates_it_measured(
    artifacts: dict[str, Path], tmp_path: Path
):
    difficulty = DifficultyConfig(
        num_samples=2, min_pass_rate=0.0, max_pass_rate=1.0, curriculum=CurriculumConfig(start=0.5, end=0.0, sigma=0.2)
    )
    config = CONFIG.model_copy(update={"difficulty": difficulty})
    with pytest.raises(Interrupted):
        rl_checkpoint.run(config, rl_inputs(artifacts, reporter=InterruptingReporter(at_step=2)), tmp_path)
    path = tmp_path / "_work" / "pass_rates.json"
    written_by = json.loads(path.read_text())
    assert written_by["sampler"] == "torch"
    assert len(written_by["rates"]) == 8  # ten prompts, two of them held out
    written = path.stat().st_mtime_ns
    result = rl_checkpoint.run(config, rl_inputs(artifacts), tmp_path)
    assert path.stat().st_mtime_ns == written
    assert sum(row[1] for row in result.tables["pass_rates"].rows) == 8
    assert pl.read_parquet(tmp_path / "curve.parquet")["aimed_pass_rate"].to_list() == [0.5, 0.25, 0.0]


def test_rl_checkpoint_stage_killed_while_trying_prompts_goes_on_behind_those_it_tried(
    artifacts: dict[str, Path], tmp_path: Path
):
    difficulty = DifficultyConfig(num_samples=8, min_pass_rate=0.0, max_pass_rate=1.0, curriculum=None)
    config = CONFIG.model_copy(update={"difficulty": difficulty})
    files = [tmp_path / name / "_work" / "pass_rates.json" for name in ("whole", "killed")]
    rl_checkpoint.run(config, rl_inputs(artifacts), tmp_path / "whole")
    with pytest.raises(Interrupted):
        rl_checkpoint.run(config, rl_inputs(artifacts, reporter=InterruptingReporter(at_step=4)), tmp_path / "killed")
    assert len(json.loads(files[1].read_text())["rates"]) == 4
    rl_checkpoint.run(config, rl_inputs(artifacts), tmp_path / "killed")
    assert files[0].read_text() == files[1].read_text()


def test_rl_checkpoint_stage_under_another_sampler_than_its_checkpoint_is_refused(
    artifacts: dict[str, Path], tmp_path: Path
):
    with pytest.raises(Interrupted):
        rl_checkpoint.run(CONFIG, rl_inputs(artifacts, reporter=InterruptingReporter(at_step=3)), tmp_path)
    (manifest,) = (tmp_path / "_work" / "checkpoints").glob("step-*4/manifest.json")
    saved = json.loads(manifest.read_text())
    saved["state"]["sampler"] = "vllm"
    manifest.write_text(json.dumps(saved))
    wanted = r"checkpoints was made with the sampler vllm, execution\.sampler is torch: set it to vllm to continue"
    with pytest.raises(CheckpointError, match=wanted):
        rl_checkpoint.run(CONFIG, rl_inputs(artifacts), tmp_path)


def test_rl_checkpoint_stage_under_another_sampler_than_its_pass_rates_is_refused(
    artifacts: dict[str, Path], tmp_path: Path
):
    difficulty = DifficultyConfig(num_samples=2, min_pass_rate=0.0, max_pass_rate=1.0, curriculum=None)
    (tmp_path / "_work").mkdir()
    (tmp_path / "_work" / "pass_rates.json").write_text(json.dumps({"sampler": "vllm", "rates": [0.0] * 8}))
    with pytest.raises(CheckpointError, match=r"pass_rates\.json was made with the sampler vllm"):
        rl_checkpoint.run(CONFIG.model_copy(update={"difficulty": difficulty}), rl_inputs(artifacts), tmp_path)


@pytest.mark.parametrize("algorithm", [CONFIG.algorithm, DISTILLATION], ids=["grpo", "distillation"])
def test_rl_checkpoint_stage_that_collapses_is_stopped_and_says_why(
    artifacts: dict[str, Path], parent_dir: Path, tmp_path: Path, algorithm: RLAlgorithm
):
    stop = StopRulesConfig(patience_steps=2, min_entropy_nats=100.0, max_kl_nats=5.0, max_held_out_drop=1.0)
    config = CONFIG.model_copy(update={"stop": stop, "algorithm": algorithm})
    result = rl_checkpoint.run(config, rl_inputs({**artifacts, "parent_checkpoint": parent_dir}), tmp_path)
    assert (result.metrics["num_steps"], result.metrics["num_stops"]) == (2, 1)
    assert result.facts["stopped"] == "collapse: entropy below 100 nats for 2 steps"
    assert (tmp_path / "model.safetensors").is_file()


def test_rl_checkpoint_stage_held_out_prompts_are_watched_and_not_trained_on(
    artifacts: dict[str, Path], items: list[ReasoningItem], tmp_path: Path
):
    rl_checkpoint.run(CONFIG, rl_inputs(artifacts), tmp_path)
    trained, held_out = split_held_out(items, config=CONFIG)
    assert (len(trained), len(held_out)) == (8, 2)
    asked = set(pl.read_parquet(tmp_path / "rollout_samples.parquet")["question"])
    assert not asked & {item.question.strip() for item in held_out}
    curve = pl.read_parquet(tmp_path / "curve.parquet")
    assert curve["held_out_reward"].null_count() == 0
    assert curve["held_out_reward"][1] == curve["held_out_reward"][0]
    assert curve["is_held_out_measured"].to_list() == [1, 0, 1]
    with pytest.raises(DataError, match="2 prompts are left"):
        split_held_out(items[:4], config=CONFIG)


@pytest.mark.slow
def test_rl_checkpoint_stage_two_ranks_share_the_prompts(artifacts: dict[str, Path], tmp_path: Path):
    write_spec(tmp_path / "spec.json", CONFIG, rl_inputs(artifacts), out_dir=tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_checked(
        [*launcher, "-m", "pipeline.stages", "rl_checkpoint", "--spec", str(tmp_path / "spec.json")],
        what="two ranks",
        timeout_s=240,
    )
    result = StageResult.model_validate_json((tmp_path / "_work" / "result.json").read_bytes())
    curve = pl.read_parquet(tmp_path / "curve.parquet")
    assert result.facts["world_size"] == "2"
    assert (curve["mean_length_tokens"] * 24).round().cast(pl.Int64).cum_sum().to_list() == curve["tokens"].to_list()
    assert curve["kl"][0] == pytest.approx(0.0, abs=1e-6)
    assert 0 < result.metrics["final_kl"] < 1


def test_rl_checkpoint_stage_sharded_weights_are_refused(artifacts: dict[str, Path], tmp_path: Path):
    with pytest.raises(StageError, match="zero_stage is 3"):
        rl_checkpoint.run(CONFIG, rl_inputs(artifacts, zero_stage=3), tmp_path)


def test_units_per_update_what_does_not_divide_is_an_error():
    assert units_per_update(CONFIG, world_size=2) == 12
    with pytest.raises(RecipeError, match="3 ranks do not divide: run with 1 ranks"):
        units_per_update(CONFIG, world_size=3)
    with pytest.raises(RecipeError, match="updates_per_rollout = 5"):
        units_per_update(CONFIG.model_copy(update={"updates_per_rollout": 5}), world_size=1)
