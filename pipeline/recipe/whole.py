"""The whole recipe: its sections, and what they must say of one another."""

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from pipeline.architecture import Frozen
from pipeline.recipe.data import TRACED_TASKS, CorporaConfig, EvaluationSetsConfig, MixtureConfig, ReasoningTask
from pipeline.recipe.delivery import ExportConfig
from pipeline.recipe.fusion import (
    DependencyConfig,
    FusionConfig,
)
from pipeline.recipe.measuring import (
    OWN_REASONING_TASKS,
    OWN_TASK_PREFIX,
    BaselinesConfig,
    EvaluationConfig,
    SpeedReportConfig,
    Thresholds,
)
from pipeline.recipe.parent import ParentConfig
from pipeline.recipe.profile import (
    ProfileConfig,
)
from pipeline.recipe.puzzle import (
    BlockLibraryConfig,
    BlockScoresConfig,
    ImportanceConfig,
    SearchSpaceConfig,
)
from pipeline.recipe.reasoning import RLPromptsConfig, ToggleDatasetConfig, TracesConfig
from pipeline.recipe.search import (
    SearchConfig,
    Target,
)
from pipeline.recipe.training import (
    DistillationConfig,
    LongContextPhase,
    PretrainingConfig,
    RLConfig,
    SFTConfig,
)
from pipeline.recipe.types import Name


class Recipe(Frozen):
    """One experiment: parent in, one child per target out."""

    name: Name = Field(
        description="by which what is made for it is known; a recipe of your own needs another than the shipped ones"
    )
    description: str = Field(description="in words, for reports")
    parent: ParentConfig
    corpora: CorporaConfig
    reasoning_tasks: Annotated[tuple[ReasoningTask, ...], Field(min_length=1)]
    evaluation_sets: EvaluationSetsConfig
    distillation_mix: MixtureConfig
    pretraining_mix: MixtureConfig
    channel_importance: ImportanceConfig
    search_space: SearchSpaceConfig
    block_library: BlockLibraryConfig
    block_scores: BlockScoresConfig
    block_profile: ProfileConfig
    search: SearchConfig
    targets: Annotated[dict[Name, Target], Field(min_length=1)]
    default_target: Name = Field(description="the target that is made where none is named")
    baselines: BaselinesConfig
    dependency_matrix: DependencyConfig
    fusion: FusionConfig
    kd: DistillationConfig
    cpt: PretrainingConfig
    reasoning_traces: TracesConfig
    reasoning_toggle_dataset: ToggleDatasetConfig
    rl_prompts: RLPromptsConfig
    sft: SFTConfig
    rl: RLConfig
    evaluation: EvaluationConfig
    speed_report: SpeedReportConfig
    exported_model: ExportConfig
    thresholds: Thresholds

    @model_validator(mode="after")
    def _references_resolve(self) -> Self:
        sources = {source.name for source in self.corpora.sources}
        wanted = {
            "evaluation_sets.held_out": [text.source for text in self.evaluation_sets.held_out],
            "distillation_mix.entries": [entry.source for entry in self.distillation_mix.entries],
            "pretraining_mix.entries": [entry.source for entry in self.pretraining_mix.entries],
        }
        for where, names in wanted.items():
            for name in names:
                if name not in sources:
                    raise ValueError(f"{where} names {name!r}, which is not in corpora.sources: {sorted(sources)}")
        if self.default_target not in self.targets:
            raise ValueError(f"default_target is {self.default_target!r}; the targets are {sorted(self.targets)}")
        sweeps = self.block_profile.sweeps
        scenarios = {scenario.sweep or scenario.name for scenario in self.block_profile.scenarios}
        for target_name, target in self.targets.items():
            for limit in target.limits:
                if limit.scenario is not None and limit.scenario not in scenarios:
                    raise ValueError(
                        f"target {target_name} names scenario {limit.scenario!r}; block_profile has {sorted(scenarios)}"
                    )
            swept = sorted({limit.scenario for limit in target.limits if limit.scenario in sweeps})
            if len(swept) > 1:
                raise ValueError(
                    f"target {target_name} names {' and '.join(swept)}, which have several batch sizes each: a target "
                    "sweeps one scenario; give the others one batch_size"
                )
        _require_backends(self.speed_report, self.block_profile)
        for stage, tokens, available in (
            ("channel_importance.tokens", self.channel_importance.tokens, self.distillation_mix.tokens),
            ("block_library.tokens", self.block_library.tokens, self.distillation_mix.tokens),
            ("block_scores.tokens", self.block_scores.tokens, self.distillation_mix.validation_tokens),
            ("dependency_matrix.tokens", self.dependency_matrix.tokens, self.distillation_mix.validation_tokens),
            ("fusion.calibration_tokens", self.fusion.calibration_tokens, self.distillation_mix.validation_tokens),
            ("kd.tokens", self.kd.tokens, self.distillation_mix.tokens),
            ("cpt.tokens", self.cpt.tokens, self.pretraining_mix.tokens),
        ):
            if tokens > available:
                raise ValueError(f"{stage} is {tokens:,} tokens, its mixture holds {available:,}: enlarge the mixture")
        _require_search_windows(self.search, self.block_scores, self.distillation_mix)
        for task in self.reasoning_tasks:
            if task.name not in TRACED_TASKS:
                raise ValueError(
                    f"reasoning_tasks names {task.name}, whose steps nothing can write; what can be trained on: "
                    f"{', '.join(sorted(TRACED_TASKS))}; evaluation_sets.held_out_tasks takes any"
                )
        for task in self.evaluation_sets.held_out_tasks:
            if task in self.reasoning_tasks:
                raise ValueError(
                    f"evaluation_sets.held_out_tasks names {task.name} with {task.config}, which reasoning_tasks "
                    "trains on: choose another difficulty or another task"
                )
        blends = {blend.name: blend for blend in self.reasoning_toggle_dataset.blends}
        for stage in self.sft.stages:
            if stage.blend not in blends:
                raise ValueError(
                    f"sft.stages names the blend {stage.blend!r}; reasoning_toggle_dataset.blends has {sorted(blends)}"
                )
            if stage.shuffle and blends[stage.blend].order == "short_first":
                raise ValueError(
                    f"sft.stages shuffles the blend {stage.blend!r}, whose order is short_first: change one of them"
                )
            text, samples = self.pretraining_mix.sequence_length, self.reasoning_toggle_dataset.sequence_length
            if stage.replay_share > 0 and text != samples:
                raise ValueError(
                    f"sft.stages replays text beside the blend {stage.blend!r}: pretraining_mix.sequence_length is "
                    f"{text:,}, reasoning_toggle_dataset.sequence_length {samples:,}; make them equal, or "
                    "replay_share 0"
                )
        if self.search.objective == "task_error" and self.block_scores.task is None:
            raise ValueError(
                "search.objective is task_error, but block_scores.task is null: name a multiple-choice set there, such "
                "as {name: piqa, num_items: 100}"
            )
        _require_own_tasks(self.evaluation, self.evaluation_sets)
        if self.search.layers == "depth_only":
            self.search_space.require_droppable_layers()
        _require_windows("kd", self.kd.long_context, "distillation_mix", self.distillation_mix)
        _require_windows("cpt", self.cpt.long_context, "pretraining_mix", self.pretraining_mix)
        return self


def _require_own_tasks(evaluation: EvaluationConfig, sets: EvaluationSetsConfig) -> None:
    """Refuse an lm-eval task of an evaluation set that the recipe does not have."""
    known = [f"{OWN_TASK_PREFIX}{choice.name}" for choice in sets.multiple_choice]
    known += OWN_REASONING_TASKS[: 2 if sets.held_out_tasks else 1]
    for task in evaluation.lm_eval.tasks if evaluation.lm_eval is not None else ():
        if task.is_own and task.name not in known:
            raise ValueError(
                f"evaluation.lm_eval names {task.name}, but of this recipe's evaluation_sets there are {known}"
            )


def _require_search_windows(search: SearchConfig, block_scores: BlockScoresConfig, mix: MixtureConfig) -> None:
    """Refuse fewer validation windows than the search shares out (pipeline.stages.score_inputs)."""
    refinement, length = search.refinement, mix.sequence_length
    compared, of_round = (math.ceil(count / length) for count in (refinement.tokens, refinement.tokens_per_round))
    wanted = 2 * compared + refinement.num_reads * of_round
    if wanted * length > mix.validation_tokens:
        raise ValueError(
            f"distillation_mix.validation_tokens is {mix.validation_tokens:,}; search.refinement shares out "
            f"{wanted * length:,}: tokens twice, and tokens_per_round for each of {refinement.num_reads} steps and "
            f"rounds, in windows of {length:,}; enlarge the one, or ask for less of the other"
        )
    if block_scores.tokens > mix.validation_tokens - compared * length:
        raise ValueError(
            f"block_scores.tokens is {block_scores.tokens:,} of {mix.validation_tokens:,} "
            f"distillation_mix.validation_tokens, the last {compared * length:,} of which are to choose nothing "
            "(search.refinement.tokens): enlarge the mixture, or ask for fewer"
        )


def _require_backends(report: SpeedReportConfig, profile: ProfileConfig) -> None:
    """Refuse a speed report without the backend of the limits, or with scenarios that a backend cannot time."""
    if profile.measured_in not in report.backends:
        raise ValueError(
            f"speed_report.backends is {list(report.backends)}; a target's limits are measured in "
            f"{profile.measured_in!r}, as block_profile.backend {profile.backend!r} asks: add it"
        )
    batched = [scenario.name for scenario in profile.scenarios if scenario.batch_size > 1]
    if "llama_cpp" in report.backends and batched:
        raise ValueError(
            f"speed_report.backends has 'llama_cpp', and llama-bench times one sequence, but scenario {batched[0]} of "
            "block_profile has a batch_size above 1: set it to 1, or take llama_cpp out"
        )
    for name in {scenario.name for scenario in report.depth_scenarios} & {one.name for one in profile.scenarios}:
        raise ValueError(f"block_profile has a scenario {name!r}, as speed_report calls one of its depths: rename it")


def _require_windows(
    stage: str, phases: tuple[LongContextPhase, ...], mixture_name: str, mixture: MixtureConfig
) -> None:
    """Refuse a long-context phase whose windows its mixture does not hold."""
    available = {more.sequence_length: more.tokens for more in mixture.long_context}
    for phase in phases:
        held = available.get(phase.sequence_length, 0)
        if phase.tokens > held:
            raise ValueError(
                f"{stage}.long_context asks for {phase.tokens:,} tokens in windows of {phase.sequence_length:,}; "
                f"{mixture_name}.long_context holds {held:,}: enlarge the mixture"
            )
