"""What each stage reads of the recipe, one frozen model per stage: the slice that is fingerprinted. No torch."""

from pipeline.architecture import Frozen
from pipeline.recipe import (
    BaselinesConfig,
    BlockLibraryConfig,
    BlockScoresConfig,
    CorporaConfig,
    EvaluationConfig,
    EvaluationSetsConfig,
    ExportConfig,
    FusionConfig,
    ImportanceConfig,
    Limit,
    MeasurementConfig,
    MixtureConfig,
    MultipleChoiceSet,
    ParentConfig,
    Precision,
    ProfileConfig,
    ReasoningTask,
    Requirements,
    RLPromptsConfig,
    SearchConfig,
    SearchSpaceConfig,
    ServedPrecision,
    SpeedReportConfig,
    Target,
    ToggleDatasetConfig,
    TracesConfig,
)

CARD_FILE = "model_card.md"  # in the artifact of model_card


class ParentStage(Frozen):
    """parent_checkpoint."""

    parent: ParentConfig


class CorporaStage(Frozen):
    """corpora."""

    corpora: CorporaConfig


class EvaluationSetsStage(Frozen):
    """evaluation_sets."""

    evaluation_sets: EvaluationSetsConfig
    search_task: MultipleChoiceSet | None
    reasoning_tasks: tuple[ReasoningTask, ...]


class MixtureStage(Frozen):
    """distillation_mix and pretraining_mix."""

    mixture: MixtureConfig
    ngram_tokens: int


class ImportanceStage(Frozen):
    """channel_importance."""

    importance: ImportanceConfig
    with_output_curvature: bool


class BlockLibraryStage(Frozen):
    """block_library."""

    search_space: SearchSpaceConfig
    block_library: BlockLibraryConfig


class BlockScoresStage(Frozen):
    """block_scores."""

    search_space: SearchSpaceConfig
    block_scores: BlockScoresConfig


class BlockProfileStage(Frozen):
    """block_profile."""

    search_space: SearchSpaceConfig
    profile: ProfileConfig


class MipStage(Frozen):
    """mip_solution."""

    target_name: str
    requirements: Requirements
    search: SearchConfig
    profile: ProfileConfig


class RefinedStage(Frozen):
    """refined_solution."""

    search_space: SearchSpaceConfig
    target_name: str
    requirements: Requirements
    search: SearchConfig
    profile: ProfileConfig
    task: MultipleChoiceSet | None
    precision: Precision


class BaselinesStage(Frozen):
    """baselines."""

    search_space: SearchSpaceConfig
    requirements: Requirements
    search: SearchConfig
    profile: ProfileConfig
    task: MultipleChoiceSet | None
    precision: Precision
    baselines: BaselinesConfig


class ChildStage(Frozen):
    """child_checkpoint: assembly, measurement, and the loop back to the programme."""

    target_name: str
    requirements: Requirements
    search: SearchConfig
    profile: ProfileConfig
    measurement: MeasurementConfig


class FusedStage(Frozen):
    """fused_checkpoint; of the profile, what one device holds of a layer's weights."""

    fusion: FusionConfig
    served_precision: ServedPrecision
    num_devices: int


class FusionReportStage(Frozen):
    """fusion_report; of the profile, on how many threads a model is timed."""

    fusion: FusionConfig
    measurement: MeasurementConfig
    num_threads: int


class TracesStage(Frozen):
    """reasoning_traces."""

    traces: TracesConfig
    reasoning_tasks: tuple[ReasoningTask, ...]
    parent_licence: str


class ToggleDatasetStage(Frozen):
    """reasoning_toggle_dataset; not the recipe's name, or a copied recipe would train on the same rows anew."""

    dataset: ToggleDatasetConfig
    ngram_tokens: int


class RLPromptsStage(Frozen):
    """rl_prompts."""

    rl_prompts: RLPromptsConfig
    reasoning_tasks: tuple[ReasoningTask, ...]
    ngram_tokens: int


class EvaluationStage(Frozen):
    """parent_evaluation and evaluation."""

    evaluation: EvaluationConfig


class SpeedStage(Frozen):
    """speed_report; of the target its limits alone, so that its words re-measure nothing."""

    profile: ProfileConfig
    speed: SpeedReportConfig
    limits: tuple[Limit, ...]
    speed_tolerance: float


class ExportStage(Frozen):
    """exported_model."""

    export: ExportConfig


class ParetoStage(Frozen):
    """pareto: of each target its limits, which name the scenario that its children are compared in."""

    limits: dict[str, tuple[Limit, ...]]
    profile: ProfileConfig


class NoOptions(Frozen):
    """A stage that reads nothing of the recipe but its inputs."""


class ReportStage(Frozen):
    """report and model_card."""

    recipe_name: str
    recipe_description: str
    target_name: str
    target: Target
    parent: ParentConfig
