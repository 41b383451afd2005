"""Every stage by name: what runs it, what it reads, what its artifact must pass.

Strings only: importing this loads no torch. Adding a stage is one file in stages/, one in assets/, one in tests/,
and one entry here.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.architecture import Frozen
from pipeline.errors import RecipeError
from pipeline.recipe import Backend, Recipe, Target
from pipeline.stage import StageInputs, StageResult
from pipeline.stages import configs
from pipeline.stages.checks import CHECKS, Check

RunStage = Callable[[Frozen, StageInputs, Path], StageResult]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the recipe and the asset it makes.

    `version` is raised by hand when the stage computes something else for the same inputs. `measures_in` says of a
    recipe in which runtimes the stage times models: where there is one, its result holds for this machine alone. Of the
    assets `over_targets`, a stage that all targets share reads every target's artifact that is there and passes its
    blocking checks; none of them must be.
    """

    name: str
    group: str
    module: str
    version: int
    inputs: tuple[str, ...]
    config: Callable[[Recipe, str], Frozen]
    description: str
    over_targets: tuple[str, ...] = ()
    per_target: bool = False
    in_child: bool = False
    measures_in: Callable[[Recipe], tuple[Backend, ...]] = lambda recipe: ()
    trains: bool = False
    runs_on_all_ranks: bool = False
    checks: tuple[Check, ...] = ()

    @property
    def upstream(self) -> tuple[str, ...]:
        """Every asset that the stage reads, of one target or of all."""
        return (*self.inputs, *self.over_targets)

    def load(self) -> RunStage:
        """Import the stage's module and return its `run`."""
        run: RunStage = importlib.import_module(self.module).run
        return run


def _target(recipe: Recipe, name: str) -> Target:
    if name not in recipe.targets:
        raise RecipeError(f"recipe {recipe.name} has no target {name!r}; it has {', '.join(sorted(recipe.targets))}")
    return recipe.targets[name]


def _mixture(which: Literal["distillation_mix", "pretraining_mix"]) -> Callable[[Recipe, str], Frozen]:
    return lambda recipe, _: configs.MixtureStage(
        mixture=getattr(recipe, which), ngram_tokens=recipe.evaluation_sets.ngram_tokens
    )


def _report(recipe: Recipe, target: str) -> Frozen:
    return configs.ReportStage(
        recipe_name=recipe.name,
        recipe_description=recipe.description,
        target_name=target,
        target=_target(recipe, target),
        parent=recipe.parent,
    )


def _mip(recipe: Recipe, target: str) -> Frozen:
    return configs.MipStage(
        target_name=target,
        requirements=_target(recipe, target).requirements,
        search=recipe.search,
        profile=recipe.block_profile,
    )


def _refined(recipe: Recipe, target: str) -> Frozen:
    return configs.RefinedStage(
        search_space=recipe.search_space,
        target_name=target,
        requirements=_target(recipe, target).requirements,
        search=recipe.search,
        profile=recipe.block_profile,
        task=recipe.block_scores.task,
        precision=recipe.block_scores.precision,
    )


def _baselines(recipe: Recipe, target: str) -> Frozen:
    return configs.BaselinesStage(
        search_space=recipe.search_space,
        requirements=_target(recipe, target).requirements,
        search=recipe.search,
        profile=recipe.block_profile,
        task=recipe.block_scores.task,
        precision=recipe.block_scores.precision,
        baselines=recipe.baselines,
    )


def _child(recipe: Recipe, target: str) -> Frozen:
    return configs.ChildStage(
        target_name=target,
        requirements=_target(recipe, target).requirements,
        search=recipe.search,
        profile=recipe.block_profile,
        measurement=recipe.speed_report.measurement,
    )


def _fused(recipe: Recipe, _: str) -> Frozen:
    return configs.FusedStage(
        fusion=recipe.fusion,
        served_precision=recipe.block_profile.served_precision,
        num_devices=recipe.block_profile.num_devices,
    )


def _fusion_report(recipe: Recipe, _: str) -> Frozen:
    return configs.FusionReportStage(
        fusion=recipe.fusion,
        measurement=recipe.baselines.measurement,
        num_threads=recipe.block_profile.num_threads,
    )


def _profiled_in(recipe: Recipe) -> tuple[Backend, ...]:
    profile = recipe.block_profile
    return (profile.measured_in,) if profile.is_of_this_machine else ()


def _speed(recipe: Recipe, target: str) -> Frozen:
    return configs.SpeedStage(
        profile=recipe.block_profile,
        speed=recipe.speed_report,
        limits=_target(recipe, target).limits,
        speed_tolerance=recipe.search.speed_tolerance,
    )


def _pareto(recipe: Recipe, _: str) -> Frozen:
    return configs.ParetoStage(
        limits={name: target.limits for name, target in sorted(recipe.targets.items())},
        profile=recipe.block_profile,
    )


STAGES: tuple[Stage, ...] = (
    Stage(
        name="parent_checkpoint",
        group="parent",
        module="pipeline.stages.parent_checkpoint",
        version=2,
        inputs=(),
        config=lambda recipe, _: configs.ParentStage(parent=recipe.parent),
        description="The checkpoint that everything starts from, verified and in the pipeline's own layout.",
        checks=CHECKS["parent_checkpoint"],
    ),
    Stage(
        name="corpora",
        group="data",
        module="pipeline.stages.corpora",
        version=1,
        inputs=(),
        config=lambda recipe, _: configs.CorporaStage(corpora=recipe.corpora),
        description="Documents of every named source, with licence and counts per domain.",
        checks=CHECKS["corpora"],
    ),
    Stage(
        name="evaluation_sets",
        group="data",
        module="pipeline.stages.evaluation_sets",
        version=3,
        inputs=("corpora",),
        config=lambda recipe, _: configs.EvaluationSetsStage(
            evaluation_sets=recipe.evaluation_sets,
            search_task=recipe.block_scores.task,
            reasoning_tasks=recipe.reasoning_tasks,
        ),
        description="Held-out text, multiple-choice items and verifiable tasks that nothing trains on.",
        checks=CHECKS["evaluation_sets"],
    ),
    Stage(
        name="distillation_mix",
        group="data",
        module="pipeline.stages.distillation_mix",
        version=2,
        inputs=("corpora", "evaluation_sets", "parent_checkpoint"),
        config=_mixture("distillation_mix"),
        description="Packed tokens for importance, block distillation, scores and knowledge distillation.",
        checks=CHECKS["distillation_mix"],
    ),
    Stage(
        name="pretraining_mix",
        group="data",
        module="pipeline.stages.pretraining_mix",
        version=2,
        inputs=("corpora", "evaluation_sets", "parent_checkpoint"),
        config=_mixture("pretraining_mix"),
        description="Packed tokens for continued pre-training.",
        checks=CHECKS["pretraining_mix"],
    ),
    Stage(
        name="channel_importance",
        group="puzzle",
        module="pipeline.stages.channel_importance",
        version=2,
        inputs=("parent_checkpoint", "distillation_mix"),
        config=lambda recipe, _: configs.ImportanceStage(
            importance=recipe.channel_importance, with_output_curvature=recipe.block_library.loss == "kl"
        ),
        description="FFN channel contribution and KV-head statistics over calibration tokens.",
        in_child=True,
        checks=CHECKS["channel_importance"],
    ),
    Stage(
        name="block_library",
        group="puzzle",
        module="pipeline.stages.block_library",
        version=2,
        inputs=("parent_checkpoint", "distillation_mix", "channel_importance"),
        config=lambda recipe, _: configs.BlockLibraryStage(
            search_space=recipe.search_space, block_library=recipe.block_library
        ),
        description="Alternative subblocks of every layer, or pairs of them, trained by block-wise local distillation.",
        in_child=True,
        trains=True,
        runs_on_all_ranks=True,
        checks=CHECKS["block_library"],
    ),
    Stage(
        name="block_scores",
        group="puzzle",
        module="pipeline.stages.block_scores",
        version=7,
        inputs=("parent_checkpoint", "distillation_mix", "block_library", "evaluation_sets"),
        config=lambda recipe, _: configs.BlockScoresStage(
            search_space=recipe.search_space, block_scores=recipe.block_scores
        ),
        description="Replace-1-block measures of every composed block, KL and others; in which order layers may go.",
        in_child=True,
        checks=CHECKS["block_scores"],
    ),
    Stage(
        name="block_profile",
        group="puzzle",
        module="pipeline.stages.block_profile",
        version=4,
        inputs=("parent_checkpoint",),
        config=lambda recipe, _: configs.BlockProfileStage(
            search_space=recipe.search_space, profile=recipe.block_profile
        ),
        description="Prefill and decode time of every variant, measured or computed, with exact weight and KV memory.",
        in_child=True,
        measures_in=_profiled_in,
        checks=CHECKS["block_profile"],
    ),
    Stage(
        name="reasoning_traces",
        group="reasoning",
        module="pipeline.stages.reasoning_traces",
        version=2,
        inputs=("parent_checkpoint", "evaluation_sets"),
        config=lambda recipe, _: configs.TracesStage(
            traces=recipe.reasoning_traces,
            reasoning_tasks=recipe.reasoning_tasks,
            parent_licence=getattr(recipe.parent, "licence", "Apache-2.0"),
        ),
        description="Rows of reasoning and chat before any filter: solvers, the parent, endpoints, imported sets.",
        in_child=True,
        checks=CHECKS["reasoning_traces"],
    ),
    Stage(
        name="reasoning_toggle_dataset",
        group="reasoning",
        module="pipeline.stages.reasoning_toggle_dataset",
        version=3,
        inputs=("parent_checkpoint", "evaluation_sets", "reasoning_traces"),
        config=lambda recipe, _: configs.ToggleDatasetStage(
            dataset=recipe.reasoning_toggle_dataset,
            ngram_tokens=recipe.evaluation_sets.ngram_tokens,
        ),
        description="Traces filtered, verified, paired with thinking on and off, blended and packed.",
        in_child=True,
        checks=CHECKS["reasoning_toggle_dataset"],
    ),
    Stage(
        name="rl_prompts",
        group="reasoning",
        module="pipeline.stages.rl_prompts",
        version=3,
        inputs=("evaluation_sets", "reasoning_toggle_dataset"),
        config=lambda recipe, _: configs.RLPromptsStage(
            rl_prompts=recipe.rl_prompts,
            reasoning_tasks=recipe.reasoning_tasks,
            ngram_tokens=recipe.evaluation_sets.ngram_tokens,
        ),
        description="Verifiable questions and instructions that neither supervised fine-tuning nor evaluation uses.",
        checks=CHECKS["rl_prompts"],
    ),
    Stage(
        name="parent_evaluation",
        group="parent",
        module="pipeline.stages.parent_evaluation",
        version=4,
        inputs=("parent_checkpoint", "evaluation_sets"),
        config=lambda recipe, _: configs.EvaluationStage(evaluation=recipe.evaluation),
        description="The parent measured by the harness that measures its children.",
        in_child=True,
        checks=CHECKS["parent_evaluation"],
    ),
    Stage(
        name="mip_solution",
        group="target",
        module="pipeline.stages.mip_solution",
        version=4,
        inputs=("block_scores", "block_profile"),
        config=_mip,
        description="One variant per layer, the lowest predicted loss that meets every limit; and answers unlike it.",
        per_target=True,
        checks=CHECKS["mip_solution"],
    ),
    Stage(
        name="refined_solution",
        group="target",
        module="pipeline.stages.refined_solution",
        version=8,
        inputs=(
            "mip_solution",
            "block_scores",
            "block_profile",
            "block_library",
            "parent_checkpoint",
            "distillation_mix",
            "evaluation_sets",
        ),
        config=_refined,
        description="Answers and what other methods choose, scored as whole models; the best improved in rounds.",
        per_target=True,
        in_child=True,
        checks=CHECKS["refined_solution"],
    ),
    Stage(
        name="baselines",
        group="target",
        module="pipeline.stages.baselines",
        version=7,
        inputs=(
            "refined_solution",
            "block_scores",
            "block_profile",
            "block_library",
            "channel_importance",
            "parent_checkpoint",
            "distillation_mix",
            "evaluation_sets",
        ),
        config=_baselines,
        description="What simpler methods choose under the same limits, scored as whole models and measured.",
        per_target=True,
        in_child=True,
        measures_in=lambda recipe: (recipe.block_profile.measured_in,),
        checks=CHECKS["baselines"],
    ),
    Stage(
        name="child_checkpoint",
        group="target",
        module="pipeline.stages.child_checkpoint",
        version=5,
        inputs=("refined_solution", "block_profile", "block_library", "parent_checkpoint"),
        config=_child,
        description="The child assembled from the library and measured; the search is repeated where it falls short.",
        per_target=True,
        in_child=True,
        measures_in=lambda recipe: (recipe.block_profile.measured_in,),
        checks=CHECKS["child_checkpoint"],
    ),
    Stage(
        name="dependency_matrix",
        group="target",
        module="pipeline.stages.dependency_matrix",
        version=1,
        inputs=("child_checkpoint", "distillation_mix"),
        config=lambda recipe, _: recipe.dependency_matrix,
        description="How much each block of the child needs the blocks before it; groups that could run side by side.",
        in_child=True,
        per_target=True,
        checks=CHECKS["dependency_matrix"],
    ),
    Stage(
        name="fused_checkpoint",
        group="target",
        module="pipeline.stages.fused_checkpoint",
        version=2,
        inputs=("child_checkpoint", "dependency_matrix", "distillation_mix"),
        config=_fused,
        description="Runs of attention-free layers joined into wide FFNs; the child itself where it has none.",
        in_child=True,
        per_target=True,
        checks=CHECKS["fused_checkpoint"],
    ),
    Stage(
        name="kd_checkpoint",
        group="training",
        module="pipeline.stages.kd_checkpoint",
        version=1,
        inputs=("fused_checkpoint", "parent_checkpoint", "distillation_mix"),
        config=lambda recipe, _: recipe.kd,
        description="The child after knowledge distillation from the parent.",
        per_target=True,
        in_child=True,
        trains=True,
        runs_on_all_ranks=True,
        checks=CHECKS["kd_checkpoint"],
    ),
    Stage(
        name="fusion_report",
        group="results",
        module="pipeline.stages.fusion_report",
        version=2,
        inputs=("parent_checkpoint", "child_checkpoint", "fused_checkpoint", "kd_checkpoint", "distillation_mix"),
        config=_fusion_report,
        description="What fusion cost, beside reversed and deleted FFNs at equal latency, and after distillation.",
        per_target=True,
        in_child=True,
        measures_in=lambda _: ("torch",),
        checks=CHECKS["fusion_report"],
    ),
    Stage(
        name="cpt_checkpoint",
        group="training",
        module="pipeline.stages.cpt_checkpoint",
        version=1,
        inputs=("kd_checkpoint", "pretraining_mix"),
        config=lambda recipe, _: recipe.cpt,
        description="The child after continued pre-training.",
        per_target=True,
        in_child=True,
        trains=True,
        runs_on_all_ranks=True,
        checks=CHECKS["cpt_checkpoint"],
    ),
    Stage(
        name="sft_checkpoint",
        group="training",
        module="pipeline.stages.sft_checkpoint",
        version=2,
        inputs=("cpt_checkpoint", "reasoning_toggle_dataset", "pretraining_mix"),
        config=lambda recipe, _: recipe.sft,
        description="The child after supervised fine-tuning on paired reasoning modes.",
        per_target=True,
        in_child=True,
        trains=True,
        runs_on_all_ranks=True,
        checks=CHECKS["sft_checkpoint"],
    ),
    Stage(
        name="rl_checkpoint",
        group="training",
        module="pipeline.stages.rl_checkpoint",
        version=7,
        inputs=("sft_checkpoint", "rl_prompts", "parent_checkpoint"),
        config=lambda recipe, _: recipe.rl,
        description="The child after reinforcement learning on verifiable rewards.",
        per_target=True,
        in_child=True,
        trains=True,
        runs_on_all_ranks=True,
        checks=CHECKS["rl_checkpoint"],
    ),
    Stage(
        name="evaluation",
        group="results",
        module="pipeline.stages.evaluation",
        version=4,
        inputs=(
            "parent_evaluation",
            "parent_checkpoint",
            "evaluation_sets",
            "child_checkpoint",
            "fused_checkpoint",
            "kd_checkpoint",
            "cpt_checkpoint",
            "sft_checkpoint",
            "rl_checkpoint",
        ),
        config=lambda recipe, _: configs.EvaluationStage(evaluation=recipe.evaluation),
        description="Every checkpoint of the target by one harness: perplexity, KL, tasks, toggle compliance.",
        per_target=True,
        in_child=True,
        checks=CHECKS["evaluation"],
    ),
    Stage(
        name="speed_report",
        group="results",
        module="pipeline.stages.speed_report",
        version=4,
        inputs=("parent_checkpoint", "child_checkpoint", "rl_checkpoint"),
        config=_speed,
        description="Prefill and decode of parent, child and final checkpoint in each runtime asked for; caches.",
        per_target=True,
        in_child=True,
        measures_in=lambda recipe: recipe.speed_report.backends,
        checks=CHECKS["speed_report"],
    ),
    Stage(
        name="exported_model",
        group="results",
        module="pipeline.stages.exported_model",
        version=4,
        inputs=("rl_checkpoint",),
        config=lambda recipe, _: configs.ExportStage(export=recipe.exported_model),
        description="The final checkpoint as one DeciLM (nemotron-nas) directory, and as GGUF.",
        in_child=True,
        per_target=True,
        checks=CHECKS["exported_model"],
    ),
    Stage(
        name="model_card",
        group="results",
        module="pipeline.stages.model_card",
        version=1,
        inputs=(
            "exported_model",
            "evaluation",
            "speed_report",
            "child_checkpoint",
            "corpora",
            "reasoning_toggle_dataset",
        ),
        config=_report,
        description="What the exported model is, how it was made, measured and licensed.",
        per_target=True,
        checks=CHECKS["model_card"],
    ),
    Stage(
        name="report",
        group="results",
        module="pipeline.stages.report",
        version=2,
        inputs=(
            "parent_checkpoint",
            "corpora",
            "evaluation_sets",
            "distillation_mix",
            "pretraining_mix",
            "channel_importance",
            "block_library",
            "block_scores",
            "block_profile",
            "mip_solution",
            "refined_solution",
            "baselines",
            "child_checkpoint",
            "dependency_matrix",
            "fused_checkpoint",
            "fusion_report",
            "kd_checkpoint",
            "cpt_checkpoint",
            "reasoning_traces",
            "reasoning_toggle_dataset",
            "sft_checkpoint",
            "rl_prompts",
            "rl_checkpoint",
            "parent_evaluation",
            "evaluation",
            "speed_report",
            "exported_model",
        ),
        config=_report,
        description="One self-contained HTML page: architecture, predicted against measured, quality, loss curves.",
        per_target=True,
        checks=CHECKS["report"],
    ),
    Stage(
        name="pareto",
        group="results",
        module="pipeline.stages.pareto",
        version=1,
        inputs=(),
        over_targets=("baselines", "evaluation", "speed_report"),
        config=_pareto,
        description="Quality against measured speed: every target's children, what simpler methods chose, the parent.",
        checks=CHECKS["pareto"],
    ),
)

BY_NAME: dict[str, Stage] = {stage.name: stage for stage in STAGES}


def get_stage(name: str) -> Stage:
    """Return a stage by its asset name.

    Raises:
        RecipeError: when there is none, listing the names.
    """
    if name not in BY_NAME:
        raise RecipeError(f"no stage {name!r}; the stages are {', '.join(BY_NAME)}")
    return BY_NAME[name]
