"""The two stages that evaluate, on artifacts small enough for a test: a parent and one model as six checkpoints."""

import contextlib
from dataclasses import replace
from pathlib import Path

from pipeline.artifacts import ArtifactStore
from pipeline.data.instruction_items import generate_instruction_items
from pipeline.progress import Reporter, SilentReporter
from pipeline.recipe import EvaluationConfig, InstructionsConfig, ReasoningTask, SampledConfig
from pipeline.stage import StageInputs, StageResult
from pipeline.stages import evaluation, parent_evaluation
from pipeline.stages.configs import EvaluationStage

CONFIG = EvaluationStage(
    evaluation=EvaluationConfig(
        robustness_items=1,
        sampled=SampledConfig(num_items=2, num_samples=2, temperature=0.6, top_p=0.95),
        sequence_length=32,
        text_tokens_per_set=128,
        batch_size=4,
        max_new_tokens_on=6,
        max_new_tokens_off=4,
        precision="fp32",
        lm_eval=None,
    )
)
TASK = ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
INSTRUCTED = generate_instruction_items(
    InstructionsConfig(num_prompts=3, kinds="all", max_instructions=2, max_words=10),
    part="evaluation",
    seed=1,
    exclude_questions=frozenset(),
)
OTHER_TASK = ReasoningTask(name="count_bits", config={"max_n": 15})


class FinishedMeanwhile(SilentReporter):
    """Plays another process that measures the same: it holds the lock, and publishes once it is waited for."""

    def __init__(self, path: Path) -> None:
        self._held = contextlib.ExitStack()
        self._path = path
        self.heard: list[str] = []

    def __enter__(self) -> "FinishedMeanwhile":
        self._path.rename(self._path.with_suffix(".made"))
        self._held.enter_context(ArtifactStore(self._path.parents[1]).locked(self._path.parent.name, self._path.name))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def note(self, message: str) -> None:
        """Keep the message; at the first that tells of waiting, publish and let go of the lock."""
        self.heard.append(message)
        if message.startswith("waiting for process"):
            self._path.rmdir()
            self._path.with_suffix(".made").rename(self._path)
            self._held.close()


def publish(store: ArtifactStore, asset: str, fingerprint: str = "f00") -> Path:
    result = StageResult()
    return store.publish(asset, fingerprint, result=result, wall_s=1.0, provenance={}).path


def run_both(
    artifacts: dict[str, Path], root: Path, *, config: EvaluationStage = CONFIG, reporter: Reporter | None = None
) -> StageResult:
    reporter = reporter or SilentReporter()
    inputs = StageInputs(artifacts=artifacts, store_root=root, downloads=root, reporter=reporter)
    parent_out = root / "parent_evaluation" / "f00"
    parent_out.mkdir(parents=True, exist_ok=True)
    parent_evaluation.run(config, inputs, parent_out)
    out_dir = root / "evaluation" / "f00"
    out_dir.mkdir(parents=True, exist_ok=True)
    given = {**artifacts, "parent_evaluation": parent_out}
    return evaluation.run(config, replace(inputs, artifacts=given), out_dir)
