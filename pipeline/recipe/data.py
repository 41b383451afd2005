"""Sources, evaluation sets and mixtures of a recipe."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from pipeline.architecture import Frozen
from pipeline.recipe.types import InstructionKind, Name, Positive, PositiveFloat


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


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusedTask:
    """Why a reasoning-gym task cannot be judged, and a task like it that can."""

    why: str
    instead: str


_EVALUATES = "its scorer evaluates the answer as code, and that of 9**9**7 never ends"

# Answers are what a model wrote, and evaluation and reinforcement learning judge them where nobody can kill the judge.
# Found by trying 49 hostile answers on every task of reasoning-gym 0.1.19.
REFUSED_TASKS = {
    "game_of_life_halting": RefusedTask(why="its scorer gives 1.0 to any text", instead="game_of_life"),
    "complex_arithmetic": RefusedTask(why="its scorer gives 1.0 to 'nan'", instead="decimal_arithmetic"),
    "propositional_logic": RefusedTask(
        why="its scorer pays for answers that are not conclusions", instead="knights_knaves"
    ),
    "countdown": RefusedTask(why=_EVALUATES, instead="basic_arithmetic"),
    "puzzle24": RefusedTask(why=_EVALUATES, instead="basic_arithmetic"),
    "simple_integration": RefusedTask(why=_EVALUATES, instead="simple_equations"),
    "intermediate_integration": RefusedTask(why=_EVALUATES, instead="simple_equations"),
    "polynomial_multiplication": RefusedTask(why=_EVALUATES, instead="products"),
    "string_insertion": RefusedTask(why=_EVALUATES, instead="string_manipulation"),
    "spiral_matrix": RefusedTask(why=_EVALUATES, instead="rotate_matrix"),
    "binary_matrix": RefusedTask(why=_EVALUATES, instead="manipulate_matrix"),
    "n_queens": RefusedTask(why=_EVALUATES, instead="mini_sudoku"),
    "coin_flip": RefusedTask(why="its scorer writes 1e999999999 out as a fraction, which never ends", instead="dice"),
    "rubiks_cube": RefusedTask(
        why="its scorer turns the cube as often as the answer R999999999 says", instead="color_cube_rotation"
    ),
    "rush_hour": RefusedTask(
        why="its scorer moves a car as far as the answer A+999999999 says", instead="tower_of_hanoi"
    ),
}


class ReasoningTask(Frozen):
    """One reasoning-gym dataset and its difficulty; a task of REFUSED_TASKS cannot be named."""

    name: Name
    config: dict[str, int | float | str | bool]

    @field_validator("name")
    @classmethod
    def _can_be_judged(cls, name: str) -> str:
        refused = REFUSED_TASKS.get(name)
        if refused is not None:
            raise ValueError(f"reasoning task {name} is refused: {refused.why}; take {refused.instead}")
        return name


class InstructionsConfig(Frozen):
    """Requests with one to `max_instructions` verifiable instructions each; 0 prompts: none.

    `max_words` is the most words that an instruction asks for: what the replies' token limit has room for.
    """

    num_prompts: Annotated[int, Field(ge=0)]
    kinds: Literal["all"] | Annotated[tuple[InstructionKind, ...], Field(min_length=1)]
    max_instructions: Annotated[int, Field(ge=1, le=10)]
    max_words: Positive

    @property
    def allowed_kinds(self) -> tuple[InstructionKind, ...]:
        """The kinds by name."""
        return get_args(InstructionKind) if self.kinds == "all" else self.kinds


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
    held_out_tasks: tuple[ReasoningTask, ...] = Field(description="families and difficulties that nothing trains on")
    instructions: InstructionsConfig
    ngram_tokens: Positive
    seed: int


class MixtureEntry(Frozen):
    """How much of a mixture one source makes up; weights are relative."""

    source: Name
    weight: PositiveFloat


class LongContextTokens(Frozen):
    """Further training tokens of a mixture, of the same sources, in longer windows."""

    sequence_length: Positive
    tokens: Positive


class MixtureConfig(Frozen):
    """A packed token set: `tokens` for training and `validation_tokens` that no mixture trains on.

    `long_context` adds sets of longer windows, shortest first, for trainings that extend the context at their end.

    Which of the two a document serves depends on its text alone: one in sixteen, by its sha1, is only ever validation,
    whatever the mixture and its seed (pipeline.data.documents.is_validation_document).
    """

    sequence_length: Positive
    tokens: Positive
    validation_tokens: Positive
    long_context: tuple[LongContextTokens, ...]
    entries: Annotated[tuple[MixtureEntry, ...], Field(min_length=1)]
    seed: int

    @model_validator(mode="after")
    def _windows_grow(self) -> Self:
        lengths = [self.sequence_length, *(more.sequence_length for more in self.long_context)]
        if lengths != sorted(set(lengths)):
            raise ValueError(f"long_context windows must grow from one set to the next, got {lengths} tokens")
        return self
