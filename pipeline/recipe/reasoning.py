"""Reasoning data of a recipe: where traces come from, what is kept of them, and how they are blended."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.architecture import Frozen
from pipeline.recipe.data import InstructionsConfig
from pipeline.recipe.types import Name, Positive, PositiveFloat, Ratio

# How the truth of a reply is known. reference: an answer to compare with; majority: what most replies to the prompt
# come to; trusted: whoever made the rows has checked them, or there is no truth (chat).
Truth = Literal["reference", "majority", "trusted"]

# Bare on and off are booleans in YAML.
BlendMode = Literal["thinking_on", "thinking_off", "unset"]


class ChatConfig(Frozen):
    """Chat turns sampled from the parent itself, so that reasoning data does not cost the model its conversation."""

    num_samples: Annotated[int, Field(ge=0)]
    max_new_tokens: Positive
    temperature: PositiveFloat
    top_p: PositiveFloat
    batch_size: Positive


class TaskPrompts(Frozen):
    """The questions of the recipe's reasoning tasks that the solvers get too, each judged by its task's scorer."""

    kind: Literal["tasks"]


class FilePrompts(Frozen):
    """Questions in a JSONL file; with `truth` reference, each line has an answer in `answer_field`."""

    kind: Literal["jsonl"]
    path: str
    question_field: str
    answer_field: str | None
    category: Name
    truth: Truth

    @model_validator(mode="after")
    def _answers_are_there(self) -> Self:
        if (self.truth == "reference") != (self.answer_field is not None):
            raise ValueError(f"truth is {self.truth}, answer_field {self.answer_field}: only reference has one")
        return self


class EndpointTraces(Frozen):
    """Replies of a model behind an OpenAI-compatible endpoint.

    Address and key are read from the environment variables named here, so that neither is fingerprinted or logged:
    what the replies are depends on the model, wherever it is served.
    """

    name: Name
    model: str
    licence: str
    url_variable: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
    key_variable: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")] | None
    thinking: bool
    system_prompt: str | None = Field(description="what the generator is told; the trained system prompt is the toggle")
    prompts: Annotated[TaskPrompts | FilePrompts, Field(discriminator="kind")]
    num_samples: Positive
    temperature: Annotated[float, Field(ge=0)]
    top_p: PositiveFloat
    max_new_tokens: Positive
    seed: int


class ImportedTraces(Frozen):
    """Rows in the schema of Llama-Nemotron-Post-Training-Dataset in local JSONL or Parquet files; `path` may be a glob.

    `answer_field` names the column of a reference answer, which that schema does not have.
    """

    name: Name
    kind: Literal["jsonl", "parquet"]
    path: str
    truth: Truth
    answer_field: str | None
    max_rows: Positive

    @model_validator(mode="after")
    def _answers_are_there(self) -> Self:
        if (self.truth == "reference") != (self.answer_field is not None):
            raise ValueError(f"truth is {self.truth}, answer_field {self.answer_field}: only reference has one")
        return self


class TracesConfig(Frozen):
    """Rows before any filter: solver-written traces, the parent's own chat, replies of endpoints, imported sets."""

    items_per_task: Positive
    chat: ChatConfig
    endpoints: tuple[EndpointTraces, ...]
    imports: tuple[ImportedTraces, ...]
    seed: int

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = ["solvers", "chat", *(source.name for source in (*self.endpoints, *self.imports))]
        if len(set(names)) != len(names):
            raise ValueError(f"two sources of traces share a name: {sorted(names)}")
        return self


class RepetitionConfig(Frozen):
    """A reply is dropped when more than `max_share` of its n-grams of words stood in it before."""

    ngram_words: Positive
    max_share: Ratio


class NearDuplicatesConfig(Frozen):
    """Prompts whose sets of word n-grams have at least this Jaccard index are one prompt; the first is kept."""

    shingle_words: Positive
    min_jaccard: Annotated[float, Field(gt=0, le=1)]


class VoteConfig(Frozen):
    """The answer that at least `min_share` of at least `min_samples` replies come to is the truth."""

    min_samples: Annotated[int, Field(ge=2)]
    min_share: Annotated[float, Field(gt=0.5, le=1)]


class FiltersConfig(Frozen):
    """What a row must be to be trained on; lengths are tokens of the parent's tokenizer."""

    licences: Annotated[tuple[str, ...], Field(min_length=1)]
    languages: Annotated[tuple[str, ...], Field(min_length=1)]
    max_prompt_tokens: Positive
    max_output_tokens: Positive
    repetition: RepetitionConfig
    near_duplicates: NearDuplicatesConfig
    vote: VoteConfig
    verifier_timeout_s: PositiveFloat
    require_pairs: bool


class BlendConfig(Frozen):
    """One packed training set: which modes, in which shares by category, in which order.

    Shares are of prompts, and relative; what they name less of is left out, nothing is repeated. Without weights every
    row is in. `short_first` orders by length of the reply, the modes interleaved.
    """

    name: Name
    modes: Annotated[tuple[BlendMode, ...], Field(min_length=1)]
    weights: dict[str, PositiveFloat]
    order: Literal["shuffled", "short_first"]


class ToggleDatasetConfig(Frozen):
    """Filtered rows, packed once for every blend."""

    sequence_length: Positive
    filters: FiltersConfig
    blends: Annotated[tuple[BlendConfig, ...], Field(min_length=1)]
    seed: int

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [blend.name for blend in self.blends]
        if len(set(names)) != len(names):
            raise ValueError(f"two blends share a name: {sorted(names)}")
        return self


class RLPromptsConfig(Frozen):
    """Prompts for reinforcement learning: of every reasoning task, and requests with verifiable instructions.

    No answer of theirs is ever trained on.
    """

    items_per_task: Positive
    instructions: InstructionsConfig
    seed: int
