"""On a GPU: the same blocks, scores, trainings and samples as on a CPU, and every stage of the tiny recipe."""

import copy
from pathlib import Path

import pytest
import torch

from pipeline.data.packed import load_packed
from pipeline.execution import find_artifact, materialize, open_workspace
from pipeline.model.checkpoint import load_model
from pipeline.model.sampling import sample_completions, seeded_generator
from pipeline.progress import SilentReporter
from pipeline.puzzle.bld import TrainedBlock
from pipeline.puzzle.devices import Ranks, place
from pipeline.puzzle.profiling import profile_blocks
from pipeline.puzzle.score_functions import DivergenceScore
from pipeline.puzzle.scoring import Scores, score_blocks
from pipeline.stage import ExecutionSettings
from pipeline.stages.registry import STAGES
from pipeline.training.engine import TrainEngine
from tests.pipeline.puzzle.builders import make_profile
from tests.pipeline.puzzle.test_bld import ALL, train
from tests.pipeline.puzzle.test_scoring import initial_variants, make_space
from tests.pipeline.puzzle.workplace import Workplace
from tests.pipeline.training.builders import OPTIMIZER

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CPU = torch.device("cpu")
# float32 sums in another order; TF32 is off, as it is by default.
TOLERANCE = 2e-4


def test_train_blocks_gives_the_blocks_of_a_cpu(workplace: Workplace, tmp_path: Path):
    device = Ranks().device
    assert device.type == "cuda"
    here = train(workplace, ALL, tmp_path / "gpu", model=place(workplace.model(), device))
    there = train(workplace, ALL, tmp_path / "cpu")
    for one, other in zip(here, there, strict=True):
        assert isinstance(one, TrainedBlock)
        assert isinstance(other, TrainedBlock)
        assert one.record.final_loss == pytest.approx(other.record.final_loss, rel=1e-3)
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], atol=1e-3, rtol=0)


def scored(workplace: Workplace, device: torch.device, work_dir: Path, *, max_activation_bytes: int) -> Scores:
    space = make_space(workplace)
    return score_blocks(
        place(workplace.model(), device),
        space,
        lambda layer: {key: place(module, device) for key, module in initial_variants(workplace, space, layer).items()},
        [DivergenceScore(packed=workplace.packed("validation"))],
        work_dir=work_dir,
        max_activation_bytes=max_activation_bytes,
        reporter=SilentReporter(),
    )


@pytest.mark.parametrize("max_activation_bytes", [0, 10**9])
def test_score_blocks_gives_the_scores_of_a_cpu(workplace: Workplace, tmp_path: Path, max_activation_bytes: int):
    here = scored(workplace, Ranks().device, tmp_path / "gpu", max_activation_bytes=max_activation_bytes)
    there = scored(workplace, CPU, tmp_path / "cpu", max_activation_bytes=10**9)
    assert here.base.kl == 0.0
    for one, other in zip(here.candidates, there.candidates, strict=True):
        assert one.block == other.block
        assert one.divergence.kl == pytest.approx(other.divergence.kl, rel=TOLERANCE, abs=1e-7)
        assert one.divergence.lm_loss == pytest.approx(other.divergence.lm_loss, rel=TOLERANCE)


def test_engine_trains_as_plain_adamw_does_on_a_cpu(workplace: Workplace):
    model, windows = workplace.model(), load_packed(workplace.mixture_dir, "train").tokens_NT[:8]
    engine = TrainEngine.create(
        copy.deepcopy(model),
        optimizer=OPTIMIZER.model_copy(update={"schedule": "constant", "warmup_ratio": 0.0}),
        total_steps=2,
        precision="fp32",
        execution=ExecutionSettings(zero_stage=1, micro_batch_size=2),
        global_batch_size=4,
    )
    assert engine.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight for weight in model.parameters() if weight.ndim > 1]},
            {"params": [weight for weight in model.parameters() if weight.ndim == 1], "weight_decay": 0.0},
        ],
        lr=OPTIMIZER.learning_rate,
        betas=OPTIMIZER.betas,
        weight_decay=OPTIMIZER.weight_decay,
    )
    for step_BT in windows.split(4):
        for micro_BT in step_BT.to(engine.device).split(2):
            engine.backward(engine.forward(input_ids=micro_BT, labels=micro_BT, use_cache=False).loss / 2)
        found = engine.step()
        model(input_ids=step_BT, labels=step_BT, use_cache=False).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert found.grad_norm == pytest.approx(float(norm), rel=TOLERANCE)
    exported = dict(engine.exported_tensors())
    engine.close()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(exported[name], weight.detach(), atol=1e-4, rtol=0)


def test_sampled_logprobs_are_those_of_a_cpu(workplace: Workplace):
    model = place(workplace.model(), Ranks().device)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    groups = sample_completions(
        model,
        prompts,
        num_samples=8,
        max_new_tokens=12,
        temperature=1.3,
        top_p=1.0,
        stop_ids=(2,),
        generator=seeded_generator(0, device=Ranks().device),
    )
    plain = load_model(workplace.parent_dir, dtype=torch.float32)
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt, *completion.ids]])
            with torch.no_grad():
                logprobs = (plain(ids).logits[0].double() / 1.3).log_softmax(dim=1)
            wanted = [logprobs[len(prompt) - 1 + place_, id_].item() for place_, id_ in enumerate(completion.ids)]
            assert completion.logprobs == pytest.approx(wanted, abs=1e-3)


def test_profile_blocks_times_every_part_of_the_parent(workplace: Workplace):
    profile = profile_blocks(
        workplace.architecture,
        make_space(workplace),
        profile=make_profile(),
        device=Ranks().device,
        dtype=torch.float32,
        reporter=SilentReporter(),
    )
    assert all(samples.median_ms > 0 for names, samples in profile.samples.items() if "no_op" not in names)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_of_tiny_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    execution = tmp_path / "execution.yaml"
    execution.write_text("launcher: in_process\n")  # libraries are imported once, not once for each stage
    monkeypatch.setenv("REFIT_EXECUTION", str(execution))
    monkeypatch.setenv("REFIT_HOME", str(tmp_path))
    workspace = open_workspace("tiny")
    target = workspace.recipe.default_target
    for stage in STAGES:
        assert materialize(workspace, stage.name, target).how == "ran", stage.name
    trained = find_artifact(workspace, "kd_checkpoint", target)
    assert trained is not None
    assert trained.record.result.facts["device"] == "cuda"
