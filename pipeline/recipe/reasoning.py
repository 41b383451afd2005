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

    num_samples: Annotated[int, Field(ge=0)] = Field(
        description="conversations that are sampled, of which the sound ones are kept; 0: none"
    )
    max_new_tokens: Positive = Field(description="most tokens of a question, and of an answer")
    temperature: PositiveFloat = Field(description="of sampling")
    top_p: PositiveFloat = Field(
        description="tokens are drawn from the likeliest ones whose probabilities add up to this"
    )
    batch_size: Positive = Field(description="conversations at once; another number samples others")


class TaskPrompts(Frozen):
    """The questions of the recipe's reasoning tasks that the solvers get too, each judged by its task's scorer."""

    kind: Literal["tasks"]


class FilePrompts(Frozen):
    """Questions in a JSONL file."""

    kind: Literal["jsonl"]
    path: str = Field(description="the file")
    question_field: str = Field(description="key of a line's question")
    answer_field: str | None = Field(description="key of a line's answer; null unless truth is reference")
    category: Name = Field(description="of the rows; blends weigh by it")
    truth: Truth = Field(
        description="how a row's answer is judged: `reference` by comparison with a given answer, `majority` by what "
        "most replies to its prompt come to, `trusted` not at all"
    )

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

    name: Name = Field(description="of the source in tables")
    model: str = Field(description="as the endpoint calls it")
    licence: str = Field(description="of what the model writes")
    url_variable: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")] = Field(
        description="environment variable with the address, such as http://127.0.0.1:8000/v1"
    )
    key_variable: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")] | None = Field(
        description="environment variable with the key; null: none is sent"
    )
    thinking: bool = Field(description="which mode the replies are: true for thinking on")
    system_prompt: str | None = Field(description="what the generator is told; the trained system prompt is the toggle")
    prompts: Annotated[TaskPrompts | FilePrompts, Field(discriminator="kind")]
    num_samples: Positive = Field(description="replies to each question")
    temperature: Annotated[float, Field(ge=0)] = Field(description="sent with each request")
    top_p: PositiveFloat = Field(description="sent with each request")
    max_new_tokens: Positive = Field(description="most tokens of a reply")
    seed: int = Field(description="from which each request's seed is made")


class ImportedTraces(Frozen):
    """Rows in the schema of Llama-Nemotron-Post-Training-Dataset, in JSONL or Parquet files on this machine."""

    name: Name = Field(description="of the source in tables")
    kind: Literal["jsonl", "parquet"] = Field(description="format of the files")
    path: str = Field(description="a file, or a glob")
    truth: Truth = Field(
        description="how a row's answer is judged: `reference` by comparison with a given answer, `majority` by what "
        "most replies to its prompt come to, `trusted` not at all"
    )
    answer_field: str | None = Field(
        description="column of the answer, which that schema does not have; null unless truth is reference"
    )
    max_rows: Positive = Field(description="rows that are read, the first ones")

    @model_validator(mode="after")
    def _answers_are_there(self) -> Self:
        if (self.truth == "reference") != (self.answer_field is not None):
            raise ValueError(f"truth is {self.truth}, answer_field {self.answer_field}: only reference has one")
        return self


class TracesConfig(Frozen):
    """Rows before any filter: solver-written traces, the parent's own chat, replies of endpoints, imported sets."""

    items_per_task: Positive = Field(description="questions drawn of each of reasoning_tasks")
    chat: ChatConfig
    endpoints: tuple[EndpointTraces, ...]
    imports: tuple[ImportedTraces, ...]
    seed: int = Field(description="of questions and chat")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = ["solvers", "chat", *(source.name for source in (*self.endpoints, *self.imports))]
        if len(set(names)) != len(names):
            raise ValueError(f"two sources of traces share a name: {sorted(names)}")
        return self


class RepetitionConfig(Frozen):
    """A reply is dropped when more than `max_share` of its n-grams of words stood in it before."""

    ngram_words: Positive = Field(description="words of an n-gram")
    max_share: Ratio = Field(description="share of a reply's n-grams")


class NearDuplicatesConfig(Frozen):
    """Prompts whose sets of word n-grams have at least this Jaccard index are one prompt; the first is kept."""

    shingle_words: Positive = Field(description="words of an n-gram")
    min_jaccard: Annotated[float, Field(gt=0, le=1)] = Field(
        description="n-grams in both prompts over n-grams in either"
    )


class VoteConfig(Frozen):
    """The answer that at least `min_share` of at least `min_samples` replies come to is the truth."""

    min_samples: Annotated[int, Field(ge=2)] = Field(description="fewest replies; a prompt with fewer is dropped")
    min_share: Annotated[float, Field(gt=0.5, le=1)] = Field(
        description="share of the replies; a prompt without such a majority is dropped"
    )


class FiltersConfig(Frozen):
    """What a row must be to be trained on; lengths are tokens of the parent's tokenizer."""

    licences: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="what a row's `license` may be; case does not matter"
    )
    languages: Annotated[tuple[str, ...], Field(min_length=1)] = Field(description="two-letter codes, such as en")
    max_prompt_tokens: Positive = Field(description="most tokens in front of the reply, the template's included")
    max_output_tokens: Positive = Field(description="most tokens of the reply, its end included")
    repetition: RepetitionConfig
    near_duplicates: NearDuplicatesConfig
    vote: VoteConfig
    verifier_timeout_s: PositiveFloat = Field(
        description="seconds that judging one answer may take; a row without a verdict is dropped"
    )
    require_pairs: bool = Field(description="drop prompts, but for chat, that are not there in both modes")


class BlendConfig(Frozen):
    """One packed training set: which modes, in which shares by category, in which order.

    What the weights name less of is left out, and nothing is repeated.
    """

    name: Name = Field(description="by which sft.stages refers to it")
    modes: Annotated[tuple[BlendMode, ...], Field(min_length=1)] = Field(
        description="rows whose system prompt asks for thinking on, for thinking off, or for neither (`unset`)"
    )
    weights: dict[str, PositiveFloat] = Field(
        description="prompts of each category, relative to the others; {} takes every row"
    )
    order: Literal["shuffled", "short_first"] = Field(
        description="`short_first` orders by length of the reply, the modes interleaved"
    )


class ToggleDatasetConfig(Frozen):
    """Filtered rows, packed once for every blend."""

    sequence_length: Positive = Field(description="tokens of a window; a longer conversation is dropped")
    filters: FiltersConfig
    blends: Annotated[tuple[BlendConfig, ...], Field(min_length=1)]
    seed: int = Field(description="of the order, and of what is kept for validation")

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

    items_per_task: Positive = Field(description="questions drawn of each of reasoning_tasks")
    instructions: InstructionsConfig
    seed: int = Field(description="of what is drawn")
