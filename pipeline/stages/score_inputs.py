"""What scoring stages measure, and on which windows, read from their inputs.

The search reads the mixture's validation windows in three parts, so that what chooses is not what judges:

    compared    the first: whole models, one of which is chosen
    rounds      parts of what lies between: a round of refinement each, the last windows first
    unseen      the last, as many as are compared: the chosen child and its baselines, by which nothing is chosen

block_scores begins with the first windows, too.
"""

import math
from dataclasses import dataclass

from pipeline.data.evaluation_sets import load_search_task
from pipeline.data.packed import PackedTokens, load_packed
from pipeline.errors import DataError
from pipeline.model.checkpoint import load_tokenizer
from pipeline.puzzle.score_functions import DivergenceScore, ScoreFunction, TaskScore
from pipeline.recipe import MultipleChoiceSet, RefinementConfig
from pipeline.stage import StageInputs


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchWindows:
    """The three parts of the validation windows."""

    compared: PackedTokens
    rounds: tuple[PackedTokens, ...]
    unseen: PackedTokens

    @classmethod
    def of(cls, validation: PackedTokens, refinement: RefinementConfig) -> "SearchWindows":
        """Return the parts that the recipe asks for.

        Raises:
            DataError: when the windows do not hold them, which a recipe's own check finds before any stage.
        """
        num_compared = math.ceil(refinement.tokens / validation.sequence_length)
        per_round = math.ceil(refinement.tokens_per_round / validation.sequence_length)
        num_rounds = (len(validation) - 2 * num_compared) // per_round
        if num_rounds < refinement.num_reads or len(validation) < 2 * num_compared:
            raise DataError(
                f"{len(validation):,} validation windows of {validation.sequence_length:,} tokens do not hold "
                f"search.refinement.tokens twice ({num_compared:,} windows each) and tokens_per_round ({per_round:,}) "
                f"for each of {refinement.num_reads} steps and rounds: enlarge distillation_mix.validation_tokens, or "
                "ask for fewer"
            )
        end = len(validation) - num_compared
        return cls(
            compared=validation.rows(slice(num_compared)),
            rounds=tuple(
                validation.rows(slice(end - (number + 1) * per_round, end - number * per_round))
                for number in range(num_rounds)
            ),
            unseen=validation.rows(slice(end, None)),
        )


def load_validation(inputs: StageInputs) -> PackedTokens:
    """Return all validation windows of the mixture."""
    return load_packed(inputs["distillation_mix"], "validation")


def score_functions(
    inputs: StageInputs, packed: PackedTokens, *, task: MultipleChoiceSet | None
) -> tuple[ScoreFunction, ...]:
    """Return the functions on these windows and on the items of the task."""
    divergence = DivergenceScore(packed=packed)
    if task is None:
        return (divergence,)
    items = load_search_task(inputs["evaluation_sets"])
    tokenizer = load_tokenizer(inputs["parent_checkpoint"])
    return divergence, TaskScore.of(items, tokenizer=tokenizer, max_tokens=packed.sequence_length)
