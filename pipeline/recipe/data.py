"""Sources, evaluation sets and mixtures of a recipe."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from pipeline.architecture import Frozen
from pipeline.recipe.types import InstructionKind, Name, Positive, PositiveFloat


class EmbeddedSource(Frozen):
    """A text that comes with a package of the Python index, pinned by its hash, or with the interpreter."""

    kind: Literal["embedded"]
    name: Name = Field(description="of the text, and of the source wherever the recipe refers to it")
    domain: str = Field(description="any word; tables count documents and tokens by it")
    max_documents: Positive = Field(
        description="most documents that are kept, those of the smallest sha1; equal and very short texts are left out"
    )


class FileSource(Frozen):
    """Documents in JSONL or Parquet files on this machine."""

    kind: Literal["jsonl", "parquet"] = Field(description="format of the files")
    name: Name = Field(description="of the source wherever the recipe refers to it")
    domain: str = Field(description="any word; tables count documents and tokens by it")
    licence: str = Field(description="of the documents, for records and the model card")
    path: str = Field(description="a file, or a glob")
    text_field: str = Field(description="key of a JSONL line, or column of a Parquet file")
    max_documents: Positive = Field(
        description="most documents that are kept, those of the smallest sha1; equal and very short texts are left out"
    )


class DatasetSource(Frozen):
    """A Hugging Face dataset: a hub id at one commit, or a directory written by save_to_disk."""

    kind: Literal["datasets"]
    name: Name = Field(description="of the source wherever the recipe refers to it")
    domain: str = Field(description="any word; tables count documents and tokens by it")
    licence: str = Field(description="of the documents, for records and the model card")
    path: str = Field(description="hub id (`owner/name`), or directory")
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = Field(
        description="commit of a hub id, 40 hex digits; null for a directory"
    )
    config_name: str | None = Field(description="subset of a hub id, null for the default one; null for a directory")
    split: str = Field(description="the split that is read, such as `train`")
    text_field: str = Field(description="column that holds the text")
    max_documents: Positive = Field(
        description="most documents that are kept: the first of a hub id, those of the smallest sha1 in a directory; "
        "equal and very short texts are left out"
    )


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

# The tasks that pipeline.reasoning.traces can solve in steps: what a recipe may train on.
TRACED_TASKS = frozenset(
    {
        "chain_sum",
        "count_bits",
        "gcd",
        "lcm",
        "leg_counting",
        "letter_counting",
        "number_filtering",
        "number_sorting",
        "prime_factorization",
        "products",
        "simple_equations",
        "spell_backward",
        "word_sequence_reversal",
        "word_sorting",
    }
)


class ReasoningTask(Frozen):
    """One reasoning-gym dataset and its difficulty; one whose answers cannot be judged is refused."""

    name: Name = Field(description="of the reasoning-gym dataset")
    config: dict[str, int | float | str | bool] = Field(
        description="that dataset's own settings; those that are left out keep reasoning-gym's defaults"
    )

    @field_validator("name")
    @classmethod
    def _can_be_judged(cls, name: str) -> str:
        refused = REFUSED_TASKS.get(name)
        if refused is not None:
            raise ValueError(f"reasoning task {name} is refused: {refused.why}; take {refused.instead}")
        return name


class InstructionsConfig(Frozen):
    """Requests with instructions of which a program can tell whether a reply follows them."""

    num_prompts: Annotated[int, Field(ge=0)] = Field(description="requests that are drawn; 0: none")
    kinds: Literal["all"] | Annotated[tuple[InstructionKind, ...], Field(min_length=1)] = Field(
        description="instructions to draw from"
    )
    max_instructions: Annotated[int, Field(ge=1, le=10)] = Field(
        description="most instructions of one request, all of different kinds; every request has at least one"
    )
    max_words: Positive = Field(
        description="most words that an instruction asks for; the replies' token limit must have room for them"
    )

    @property
    def allowed_kinds(self) -> tuple[InstructionKind, ...]:
        """The kinds by name."""
        return get_args(InstructionKind) if self.kinds == "all" else self.kinds


class HeldOutText(Frozen):
    """Documents of one source that no training may see; perplexity is measured on them."""

    source: Name = Field(description="name of a source of corpora")
    num_documents: Positive = Field(description="documents that are held out, those of the smallest sha1")


class MultipleChoiceSet(Frozen):
    """Items of one multiple-choice benchmark, drawn with the seed of evaluation_sets."""

    name: Name = Field(description="of the benchmark")
    num_items: Positive = Field(description="items that are drawn")


class EvaluationSetsConfig(Frozen):
    """What is measured, and therefore what every training set is decontaminated against."""

    held_out: Annotated[tuple[HeldOutText, ...], Field(min_length=1)]
    multiple_choice: tuple[MultipleChoiceSet, ...]
    reasoning_items_per_task: Positive = Field(
        description="questions drawn of each of reasoning_tasks and of held_out_tasks"
    )
    held_out_tasks: tuple[ReasoningTask, ...] = Field(description="families and difficulties that nothing trains on")
    instructions: InstructionsConfig
    ngram_tokens: Positive = Field(
        description="words (not tokens) in a row that a training text may not share with anything that is measured"
    )
    seed: int = Field(description="of all that is drawn")


class MixtureEntry(Frozen):
    """How much of a mixture one source makes up."""

    source: Name = Field(description="name of a source of corpora")
    weight: PositiveFloat = Field(
        description="share of the tokens, relative to the other entries; others fill the place of a source that runs "
        "dry"
    )


class LongContextTokens(Frozen):
    """Further training tokens of a mixture, of the same sources, in longer windows."""

    sequence_length: Positive = Field(description="tokens of a window; more than in any set before it")
    tokens: Positive = Field(description="training tokens, rounded up to whole windows")


class MixtureConfig(Frozen):
    """A packed token set: `tokens` for training and `validation_tokens` that no mixture trains on.

    `long_context` adds sets of longer windows, shortest first, for trainings that extend the context at their end.

    Which of the two a document serves depends on its text alone: one in sixteen, by its sha1, is only ever validation,
    whatever the mixture and its seed.
    """

    sequence_length: Positive = Field(description="tokens of a window")
    tokens: Positive = Field(description="training tokens, rounded up to whole windows")
    validation_tokens: Positive = Field(description="tokens that no mixture trains on, rounded up to whole windows")
    long_context: tuple[LongContextTokens, ...]
    entries: Annotated[tuple[MixtureEntry, ...], Field(min_length=1)]
    seed: int = Field(description="of the order of documents and windows")

    @model_validator(mode="after")
    def _windows_grow(self) -> Self:
        lengths = [self.sequence_length, *(more.sequence_length for more in self.long_context)]
        if lengths != sorted(set(lengths)):
            raise ValueError(f"long_context windows must grow from one set to the next, got {lengths} tokens")
        return self
